"""Losses whose examples have gradients of every kind, for the tests of these.

A model is a loss of parameters and of a batch, the parameters, and the batch. ``BASIC``
are what a model is made of, ``OTHER`` are what it may also have.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax
from oracle import random_array

import jaxlinear
import jaxlinear.linen
import jaxlinear.nnx
from jaxlinear import linear

BATCH, TOKENS, WIDTH, HIDDEN, CLASSES, LAYERS = 5, 6, 8, 12, 11, 3


def drawn(*shape, seed=0, scale=None):
    array = random_array((seed, *shape), shape, "float32")
    return array * (shape[-1] ** -0.5 if scale is None else scale)


def tokens(length=TOKENS):
    return jax.random.randint(jax.random.key(0), (BATCH, length), 0, CLASSES)


def mlp(p, x, **options):
    hidden = jnp.tanh(linear(x, p["up"], p["up_bias"], **options))
    return linear(hidden, p["down"], p["down_bias"], **options)


def mlp_parameters():
    up, down = drawn(HIDDEN, WIDTH), drawn(3, HIDDEN)
    biases = {"up_bias": drawn(HIDDEN, scale=0.1), "down_bias": drawn(3, scale=0.1)}
    return {"up": up, "down": down} | biases


def mean_square(y):
    return jnp.mean(y.astype("float32") ** 2)


def of_mlp(*leading, **options):
    def loss(p, x):
        return mean_square(mlp(p, x, **options))

    return loss, mlp_parameters(), (drawn(BATCH, *leading, WIDTH, scale=1),)


def layer(x, parameters):
    return x + jnp.tanh(linear(x, *parameters)), None


def stacked_parameters():
    return drawn(LAYERS, WIDTH, WIDTH), drawn(LAYERS, WIDTH, scale=0.1)


def of_scan(step=layer, **options):
    def loss(p, x):
        return mean_square(lax.scan(step, x, p, **options)[0])

    return loss, stacked_parameters(), (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_shared_loop():
    def loss(p, x):
        step = functools.partial(layer, parameters=p)
        return mean_square(lax.scan(lambda x, _: step(x), x, length=LAYERS)[0])

    parameters = drawn(WIDTH, WIDTH), drawn(WIDTH, scale=0.1)
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def normalized(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return (
        x * lax.rsqrt(mean_square(x) + 1e-3) * jnp.expand_dims(scale, range(x.ndim - 1))
    )


def log_loss(z, labels):
    log_p = jax.nn.log_softmax(z.astype("float32"))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], -1))


def of_tied_gpt(length=TOKENS):
    """An embedding that is the head, positions, a normalization, attention."""

    def loss(p, tokens):
        x = p["embed"][tokens] + jnp.expand_dims(p["position"][: tokens.shape[-1]], 0)
        q, k, v = (linear(normalized(x, p["norm"]), p[name]) for name in "qkv")
        scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
        x = x + linear(jnp.einsum("bts,bsd->btd", scores, v), p["out"], p["bias"])
        return log_loss(linear(x, p["embed"]), tokens)

    square = {name: drawn(WIDTH, WIDTH, seed=ord(name[0])) for name in [*"qkv", "out"]}
    parameters = square | {
        "embed": drawn(CLASSES, WIDTH),
        "position": drawn(600, WIDTH, scale=0.1),
        "norm": jnp.ones(WIDTH),
        "bias": drawn(WIDTH, scale=0.1),
    }
    return loss, parameters, (tokens(length),)


def of_modules():
    """A projection to heads and back, as modules of NNX."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(CLASSES, WIDTH, rngs=rngs)
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.heads = jaxlinear.nnx.Linear(WIDTH, (2, 4), rngs=rngs)
            self.back = jaxlinear.nnx.Linear((2, 4), WIDTH, axis=(-2, -1), rngs=rngs)
            self.head = jaxlinear.nnx.Linear(WIDTH, CLASSES, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            return self.head(x + self.back(jnp.tanh(self.heads(self.norm(x)))))

    graph, parameters = nnx.split(Model(nnx.Rngs(0)))

    def loss(parameters, tokens):
        return log_loss(nnx.merge(graph, parameters)(tokens), tokens)

    return loss, parameters, (tokens(),)


BASIC = {
    "vectors": of_mlp,
    "sequences": lambda: of_mlp(TOKENS),
    "stack under scan": of_scan,
    "one layer in a loop": of_shared_loop,
    "tied GPT": of_tied_gpt,
    "modules": of_modules,
}


# What else there is.


def of_linen():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jnp.tanh(jaxlinear.linen.Linear((3, 4))(x))
            return jaxlinear.linen.Linear(5, axis=(-2, -1))(x)

    model, x = Model(), drawn(BATCH, TOKENS, WIDTH, scale=1)
    parameters = model.init(jax.random.key(0), x)
    return lambda p, x: mean_square(model.apply(p, x)), parameters, (x,)


def of_flax():
    """Flax's own layers, with biases that are added outside a layer of ours."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(CLASSES, WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
            self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = jnp.tanh(self.mlp(x + self.attention(x)))
            return self.embed.attend(x)

    graph, parameters, others = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss(parameters, tokens):
        return log_loss(nnx.merge(graph, parameters, others)(tokens), tokens)

    return loss, parameters, (tokens(),)


def of_products(equation, shape, x_shape):
    def loss(p, x):
        return mean_square(jnp.tanh(jnp.einsum(equation, x, p)))

    return loss, drawn(*shape), (drawn(BATCH, *x_shape, scale=1),)


def of_lora():
    def loss(p, x):
        return mean_square(linear(x, lax.stop_gradient(p["w"])) + x @ p["a"] @ p["b"])

    parameters = {"w": drawn(3, WIDTH), "a": drawn(WIDTH, 2), "b": drawn(2, 3)}
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_both_layouts():
    """The same matrix as (out, in) and as (in, out), and as it is in a penalty."""

    def loss(p, x):
        y = linear(jnp.tanh(linear(x, p["w"], p["b"])), p["w"].T) @ p["v"]
        return mean_square(jnp.tanh(linear(y, p["v"]))) + 0.1 * jnp.sum(p["b"] ** 2)

    square = {"w": drawn(HIDDEN, WIDTH), "v": drawn(WIDTH, WIDTH)}
    parameters = square | {"b": drawn(HIDDEN, scale=0.1)}
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_two_axes():
    """One array that contracts another of its axes in each product."""

    def loss(p, x):
        y = jnp.einsum("bti,ijk->btjk", x, p)
        return mean_square(jnp.tanh(jnp.einsum("btjk,ijk->bti", y, p)))

    return loss, drawn(WIDTH, 2, 3), (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_cast(dtype="bfloat16"):
    """Parameters that are cast before a loop, and reshaped in it."""

    def loss(p, x):
        p = jax.tree.map(lambda a: a.astype(dtype), p)

        def step(x, p):
            return jnp.tanh(linear(x, p.reshape(WIDTH, WIDTH))), None

        return mean_square(lax.scan(step, x.astype(dtype), p, reverse=True)[0])

    parameters = drawn(LAYERS, WIDTH, 2, 4)
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_nested_loops():
    """Two loops: the outer slices the weights, the inner uses a slice in each step."""

    def loss(p, x):
        def outer(x, weight):
            return lax.fori_loop(
                0, 2, lambda _, x: jnp.tanh(linear(x, weight)), x
            ), None

        return mean_square(lax.scan(outer, x, p)[0])

    parameters = drawn(LAYERS, WIDTH, WIDTH)
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_two_stacks():
    """The slices of a stack in two loops, so that each layer is used twice."""

    def loss(p, x):
        up, _ = lax.scan(lambda x, w: (jnp.tanh(linear(x, w)), None), x, p)
        down, _ = lax.scan(lambda x, w: (jnp.tanh(linear(x, w)), None), up, p)
        return mean_square(down)

    parameters = drawn(LAYERS, WIDTH, WIDTH)
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_branches():
    def loss(p, x):
        return lax.cond(
            x.sum() > 0, mean_of_mlp, lambda p, x: 2 * mean_of_mlp(p, x), p, x
        )

    def mean_of_mlp(p, x):
        return mean_square(mlp(p, x))

    return loss, mlp_parameters(), (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_own_derivative():
    """A parameter inside a custom VJP, which nobody can look into."""

    @jax.custom_vjp
    def scaled(x, weight):
        return jnp.tanh(x @ weight)

    def backward(residuals, G):
        x, weight = residuals
        G = G * (1 - jnp.tanh(x @ weight) ** 2)
        return G @ weight.T, 2 * jnp.einsum("...i,...o->io", x, G)  # Twice as it is.

    scaled.defvjp(lambda x, weight: (scaled(x, weight), (x, weight)), backward)

    def loss(p, x):
        return mean_square(linear(scaled(x, p["inner"]), p["outer"]))

    parameters = {"inner": drawn(WIDTH, HIDDEN), "outer": drawn(3, HIDDEN)}
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_lookups(mode):
    """Rows of a table, also by numbers from the end and beyond it."""

    def loss(table, numbers):
        rows = table.at[numbers].get(mode=mode, fill_value=0)
        return mean_square(jnp.tanh(rows))

    return loss, drawn(CLASSES, WIDTH), (tokens().at[:, 0].set(-2).at[:, 1].set(99),)


def of_convolution():
    def loss(p, x):
        x = jnp.swapaxes(x, 1, 2)
        x = lax.conv_general_dilated(x, p["kernel"], (1,), "SAME")
        return mean_square(linear(jnp.tanh(jnp.swapaxes(x, 1, 2)), p["head"]))

    parameters = {"kernel": drawn(WIDTH, WIDTH, 3), "head": drawn(3, WIDTH)}
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_ensemble():
    """Two layers that `jax.vmap` applies to one input."""

    def loss(p, x):
        return mean_square(jax.vmap(lambda w: jnp.tanh(linear(x, w)))(p))

    return loss, drawn(2, 3, WIDTH), (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_unused():
    def loss(p, x):
        return mean_square(linear(x, p["used"])) + 0 * jnp.sum(x)

    parameters = {"used": drawn(3, WIDTH), "unused": drawn(3, WIDTH)}
    return loss, parameters, (drawn(BATCH, WIDTH, scale=1),)


def of_dropout():
    """A key for each example, and labels beside the inputs."""

    def loss(p, x, labels, keys):
        keep = jax.random.bernoulli(keys[0], 0.5, x.shape)
        return log_loss(mlp(p, jnp.where(keep, x, 0)), labels)

    keys = jax.random.split(jax.random.key(1), BATCH)
    labels = jax.random.randint(jax.random.key(0), (BATCH,), 0, 3)
    return loss, mlp_parameters(), (drawn(BATCH, WIDTH, scale=1), labels, keys)


def of_orders_of_axes():
    """One array with two orders of its axes, which have the same sizes."""

    def loss(p, x):
        kernels = p.transpose(1, 2, 0), p.transpose(1, 0, 2)
        y = [jnp.tanh(x @ kernel.reshape(WIDTH, WIDTH**2)) for kernel in kernels]
        return mean_square(y[0]) + mean_square(y[1] + 1)

    return loss, drawn(WIDTH, WIDTH, WIDTH), (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_complex_activations():
    """Of which the gradient of a real parameter has only the real part."""

    def loss(p, x):
        z = linear(lax.complex(x, x**2), p["w"], dtype="complex64")
        z @= p["v"].astype("complex64")
        return mean_square(jnp.abs(z + 1))

    parameters = {"w": drawn(HIDDEN, WIDTH), "v": drawn(HIDDEN, 3)}
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


def of_integers():
    """Parameters without a gradient, as integers, and integers times a parameter."""

    def loss(p, x):
        whole, eighths = p["w"].astype("int32"), (8 * x).astype("int8")
        y = linear(x, p["w"]) * linear(x, whole.astype("float32"))
        z = eighths.astype("int32") @ whole.T + whole[tokens()[:1]]
        axes = ((eighths.ndim - 1,), (1,)), ((), ())
        return mean_square(y + z.astype("float32")) + mean_square(
            lax.dot_general(eighths, p["v"], axes, preferred_element_type="float32")
        )

    parameters = {"w": drawn(WIDTH, WIDTH, scale=3), "v": drawn(50, WIDTH)}
    x = drawn(BATCH, TOKENS, WIDTH, scale=1)
    return loss, parameters, (x,)


def of_whole_contraction():
    """A matrix of which one product contracts both axes, and another one of them."""

    def loss(p, x):
        return jnp.tanh(jnp.tensordot(x[0], p, 2)) + mean_square(x @ p)

    return loss, drawn(WIDTH, WIDTH), (drawn(BATCH, WIDTH, WIDTH, scale=1),)


def of_no_elements():
    def loss(p, x):
        x, _ = lax.scan(layer, x, p["layers"])
        y = linear(x[..., :0], p["in"]) + x @ p["kernel"]
        nothing = jnp.sum(linear(x, p["out"], p["bias"])) + jnp.sum(x[:, :0] @ p["w"])
        return mean_square(y) + nothing

    parameters = {
        "layers": (drawn(0, WIDTH, WIDTH), drawn(0, WIDTH)),
        "kernel": drawn(WIDTH, 3),
        "in": drawn(3, 0, scale=1),
        "out": drawn(0, WIDTH),
        "bias": drawn(0, scale=1),
        "w": drawn(WIDTH, 3),
    }
    return loss, parameters, (drawn(BATCH, TOKENS, WIDTH, scale=1),)


checkpointed = jax.checkpoint(layer, prevent_cse=False)


@jax.checkpoint
def returning(x, parameters):
    """A layer that returns its parameters, as modules of NNX do under `nnx.remat`."""
    return layer(x, parameters)[0], parameters


OTHER = {
    "one token": lambda: of_mlp(1),
    "many tokens": lambda: of_mlp(64),
    "two leading axes": lambda: of_mlp(2, 3),
    "tied GPT of one token": lambda: of_tied_gpt(1),
    "tied GPT of 512 tokens": lambda: of_tied_gpt(512),
    "checkpoint": lambda: of_scan(checkpointed),
    "checkpoint with a policy": lambda: of_scan(
        jax.checkpoint(layer, policy=jaxlinear.save_linear_outputs)
    ),
    "returned parameters": lambda: of_scan(returning),
    "unrolled": lambda: of_scan(unroll=2, reverse=True),
    "Linen": of_linen,
    "Flax's layers": of_flax,
    "kernel": lambda: of_products("bti,io->bto", (WIDTH, 3), (TOKENS, WIDTH)),
    "weight": lambda: of_products("bti,oi->bto", (3, WIDTH), (TOKENS, WIDTH)),
    "to heads": lambda: of_products("bti,hoi->bhto", (2, 3, WIDTH), (TOKENS, WIDTH)),
    "from heads": lambda: of_products("btho,hoi->bti", (2, 3, WIDTH), (TOKENS, 2, 3)),
    "LoRA": of_lora,
    "both layouts": of_both_layouts,
    "two axes": of_two_axes,
    "cast": of_cast,
    "cast to itself": lambda: of_cast("float32"),
    "nested loops": of_nested_loops,
    "two stacks": of_two_stacks,
    "branches": of_branches,
    "own derivative": of_own_derivative,
    "lookups, fill": lambda: of_lookups("fill"),
    "lookups, clip": lambda: of_lookups("clip"),
    "orders of axes": of_orders_of_axes,
    "complex activations": of_complex_activations,
    "integers": of_integers,
    "whole contraction": of_whole_contraction,
    "no elements": of_no_elements,
    "convolution": of_convolution,
    "ensemble": of_ensemble,
    "unused": of_unused,
    "dropout": of_dropout,
    "bfloat16": lambda: of_mlp(TOKENS, dtype="bfloat16"),
    "float16": lambda: of_mlp(TOKENS, dtype="float16"),
    "INT8": lambda: of_mlp(TOKENS, products=jaxlinear.INT8),
    "FLOAT8": lambda: of_mlp(TOKENS, products=jaxlinear.FLOAT8),
}
ROUGH = {"cast": 2e-2, "bfloat16": 2e-2, "float16": 2e-3, "INT8": 5e-2, "FLOAT8": 2e-1}
"""How far the gradients of these may be from those that are rounded elsewhere."""


# What they are compared with.


def expanded(batch):
    return jax.tree.map(lambda a: a[:, None], batch)


def gradients(loss, parameters, batch):
    """Those of each example, which JAX computes."""
    axes = (None, *[0] * len(batch))
    return jax.vmap(jax.grad(loss), axes)(parameters, *expanded(batch))


def squared_norms(gradients):
    def squared_norm(array):
        array = array.astype("float32")
        return jnp.sum(array**2, range(1, array.ndim))

    return jax.tree.map(squared_norm, gradients)


def clipped(gradients, norms, bound):
    factors = jnp.minimum(1, bound / norms)

    def total(array):
        return jnp.tensordot(factors, array.astype("float32"), 1).astype(array.dtype)

    return jax.tree.map(total, gradients)
