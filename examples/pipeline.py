"""A pipeline of four devices, none of which holds a weight for its backward passes.

    python examples/pipeline.py

Each device has a stage of the network, and VJP objects of up to four microbatches
(1F1B). ``saveable_args`` leaves the weights out of them, and ``jax.checkpoint`` around
a layer what is made of its weight: the cast to bfloat16 and the transpose of ``w.T``.
"""

# pyright: reportCallIssue=false
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxlinear

jax.config.update("jax_num_cpu_devices", 4)
STAGES, LAYERS, MICROBATCHES, ROWS, WIDTH = 4, 2, 8, 32, 512


def naive(x, weight, *, dtype):
    return x.astype(dtype) @ weight.astype(dtype).T


def stage(layer, weights, x):
    for weight in weights:
        x = x + jnp.tanh(layer(x, weight)).astype(x.dtype)
    return x


def schedule():
    """1F1B: the stage, its microbatch, and whether this is the backward pass."""
    for tick in range(2 * (MICROBATCHES + STAGES - 1)):
        for k in range(STAGES):
            batch, is_backward = divmod(tick - k, 2)
            batch -= is_backward * (STAGES - 1 - k)
            if 0 <= batch < MICROBATCHES:
                yield k, batch, is_backward


@jax.jit
def backward(vjp, weights, G, sums):
    vjp.args_res[0] = weights
    gradients, grad_x = vjp(G)
    return jax.tree.map(jnp.add, sums, gradients), grad_x


def pipeline(layer, weights, inputs, targets):
    """The gradients of a squared loss, and the most bytes that the first stage held."""
    apply = functools.partial(stage, layer)
    forward = jax.jit(lambda *a: jax.vjp(apply, *a, saveable_args=(False, True)))
    devices = [jax.devices()[k % jax.device_count()] for k in range(STAGES)]
    weights = jax.device_put([[*w] for w in weights], devices)
    sums, most = jax.tree.map(jnp.zeros_like, weights), 0
    X, G, vjps = {}, {}, [[] for _ in range(STAGES)]
    for k, batch, is_backward in schedule():
        if is_backward:
            arrived = jax.device_put(G[k], devices[k])
            sums[k], G[k - 1] = backward(vjps[k].pop(0), weights[k], arrived, sums[k])
        else:
            arrived = jax.device_put(X[k] if k > 0 else inputs[batch], devices[k])
            X[k + 1], vjp = forward(weights[k], arrived)
            vjps[k].append(vjp)
            if k == STAGES - 1:
                G[k] = X[STAGES] - targets[batch]
        most = max(most, sum(a.nbytes for a in jax.tree.leaves(vjps[0])))
    return jax.device_get(sums), most


def plain_gradients(layer, weights, inputs, targets):
    def loss(weights, x, target):
        Y = functools.reduce(lambda x, w: stage(layer, w, x), weights, x)
        return jnp.sum((Y - target) ** 2) / 2

    gradients = jax.jit(jax.grad(loss))
    return sum(gradients(weights, *b) for b in zip(inputs, targets, strict=True))


def main():
    if jax.__version_info__ < (0, 11, 1):
        raise SystemExit(f"`saveable_args` needs JAX 0.11.1, not {jax.__version__}.")
    draw = np.random.default_rng(0).normal
    inputs, targets = draw(size=(2, MICROBATCHES, ROWS, WIDTH)).astype("float32")
    weights = draw(size=(STAGES, LAYERS, WIDTH, WIDTH)).astype("float32") / WIDTH**0.5
    print(f"weights of a stage: {weights[0].nbytes:,} bytes")
    for dtype in "float32", "bfloat16":
        for name, layer in ("jaxlinear", jaxlinear.linear), ("x @ w.T", naive):
            layer = functools.partial(layer, dtype=dtype)
            right = plain_gradients(layer, weights, inputs, targets)
            for note, form in ("", layer), (" checkpointed", jax.checkpoint(layer)):
                found, held = pipeline(form, weights, inputs, targets)
                same = np.array_equal(found, right)
                print(f"{dtype}, {name}{note}: {held:,} bytes held; same bits: {same}")


if __name__ == "__main__":
    main()
