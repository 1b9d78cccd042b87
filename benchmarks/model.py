"""A training step of a small GPT with the linear layers of one library.

The libraries' losses are the same function of the logits, so that only the layers
differ. ``WITH_LOSS`` is our step once more, with `jaxlinear.linear_cross_entropy`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.checks import (
    as_float64,
    operand_roundoff,
    relative_error,
    require,
    roundoff,
)
from benchmarks.peers import TRANSPOSED, jax_peers, parameters_of
from benchmarks.results_file import AGAIN, NAIVE, OURS
from benchmarks.timing import compiled
from jaxlinear import linear_cross_entropy

OTHERS = [NAIVE, AGAIN, "Flax NNX", "Equinox"]
WITH_LOSS = "jaxlinear, with its loss"
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class GPT:
    """Pre-norm, GELU, causal attention.

    The batch is 4: with it a step under bfloat16 compute takes 2 to 3.4 s on two cores
    without bfloat16 instructions (Zen 3), and the four libraries take turns.

    ``rows``, ``in_features`` and ``out_features`` describe the head.
    """

    name: str = "GPT step"
    layers: int = 4
    in_features: int = 512
    heads: int = 8
    tokens: int = 256
    batch: int = 4
    out_features: int = 8192

    @property
    def rows(self):
        return self.batch * self.tokens

    @property
    def shapes(self):
        """(out, in) of every linear layer: q, k, v, output, up, down; the head."""
        d = self.in_features
        block = [(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]
        return block * self.layers + [(self.out_features, d)]


GPT_STEP = GPT()
GPT_DTYPES = ["float32", "mixed"]


def model_programs(gpt, dtype_name, compute_dtype, device):
    """The programs of a step, their errors, and their operations and least bytes.

    A step is the forward pass, the loss, its gradients and plain SGD. The parameters
    are float32. The loss and the gradients are checked, before anything is timed,
    against the naive formula in float32, all that is of one kind in one norm: the
    gradient of the bias of k is zero.
    """
    tokens = np.random.default_rng(0).integers(
        gpt.out_features, size=(gpt.batch, gpt.tokens + 1)
    )
    tokens = jax.device_put(tokens.astype(np.int32), device)
    layers, programs, errors = jax_peers(), {}, {}
    with jax.default_matmul_precision("highest"):
        loss = loss_of(gpt, layers[NAIVE], "float32")
        results = jax.jit(jax.value_and_grad(loss))(initial(gpt), tokens)
        exact = by_kind(results, False)
    limit = bound(gpt, compute_dtype, device)
    for name, loss in losses_of(gpt, layers, compute_dtype).items():
        parameters = jax.device_put(initial(gpt, name), device)
        results = jax.jit(jax.value_and_grad(loss))(parameters, tokens)
        found = by_kind(results, name in TRANSPOSED)
        distances = {k: relative_error(found[k], exact[k]) for k in exact}
        for quantity, error in distances.items():
            case = gpt.name, dtype_name, "step"
            require(case, name, quantity, error, limit)
        errors[name] = max(distances.values())
        programs[name] = compiled(sgd(loss), (parameters, tokens))
        programs[name].loss = float(results[0])
    count = sum(out * inputs for out, inputs in gpt.shapes)
    return programs, errors, 6 * count * gpt.rows, 8 * count


def bound(gpt, compute_dtype, device):
    """Independent roundings of the values in series, forward and backward: 4 √depth u.

    In float32 the sums weigh more than the last rounding, √n u with the longest n; and
    accelerators round the operands of the products by default.
    """
    depth = 2 * (10 * gpt.layers + 3)
    longest = max(gpt.rows, gpt.out_features)
    accumulated = longest**0.5 * roundoff("float32")
    rounded = roundoff(compute_dtype) + operand_roundoff(compute_dtype, device)
    return 4 * depth**0.5 * (rounded + accumulated)


def sgd(loss):
    def step(parameters, tokens):
        value, gradients = jax.value_and_grad(loss)(parameters, tokens)
        update = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, parameters, gradients)
        return value, update

    return step


def initial(gpt, library=NAIVE):
    """The parameters: {"linear", "other"}."""
    generator = np.random.default_rng(1)

    def normal(*shape, scale):
        return jnp.asarray(generator.standard_normal(shape, np.float32) * scale)

    linear = []
    for out, inputs in gpt.shapes:
        weight = normal(out, inputs, scale=np.float32(inputs**-0.5))
        linear.append(parameters_of(library, weight, jnp.zeros(out)))
    other = {
        "embedding": normal(gpt.out_features, gpt.in_features, scale=np.float32(1)),
        "position": normal(gpt.tokens, gpt.in_features, scale=np.float32(1)),
        "norms": jnp.ones((2 * gpt.layers + 1, gpt.in_features)),
    }
    return {"linear": linear, "other": other}


def losses_of(gpt, layers, dtype):
    """The loss with each of the libraries' ``layers``, and without our logits."""
    losses = {
        OURS: loss_of(gpt, layers[OURS], dtype),
        WITH_LOSS: loss_of(gpt, layers[OURS], dtype, without_logits),
    }
    others = [name for name in OTHERS if name in layers]
    return losses | {name: loss_of(gpt, layers[name], dtype) for name in others}


def loss_of(gpt, layer, dtype, head_loss=None):
    """loss(parameters, tokens) with this linear layer.

    ``head_loss(parameters, h, labels, dtype)`` is by the logits if it is None.
    """
    head_loss = head_loss or by_logits(layer)

    def loss(parameters, tokens):
        h = hidden(gpt, layer, dtype, parameters, tokens)
        return head_loss(parameters["linear"][-1], h, tokens[:, 1:], dtype)

    return loss


def by_logits(layer):
    def loss(parameters, h, labels, dtype):
        log_p = jax.nn.log_softmax(layer(parameters, h, dtype).astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], -1))

    return loss


def without_logits(parameters, h, labels, dtype):
    weight, bias = parameters
    return linear_cross_entropy(h, weight, labels, bias, dtype=dtype)


def hidden(gpt, layer, dtype, parameters, tokens):
    """What the head reads, of all tokens but the last."""
    other, weights = parameters["other"], iter(parameters["linear"])
    norms = iter(other["norms"])

    def linear(x):
        return layer(next(weights), x, dtype)

    x = other["embedding"][tokens[:, :-1]] + other["position"][None]
    x = x.astype(dtype)
    for _ in range(gpt.layers):
        x = block(gpt, linear, norms, x)
    return norm(x, next(norms))


def block(gpt, linear, norms, x):
    """Attention and an MLP; ``linear`` and ``norms`` take their parameters in turn."""
    normed = norm(x, next(norms))
    q, k, v = (linear(normed) for _ in range(3))
    x = x + linear(attention(gpt, q, k, v))
    return x + linear(jax.nn.gelu(linear(norm(x, next(norms)))))


def norm(x, weight):
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return (wide * scale * weight[None, None]).astype(x.dtype)


def attention(gpt, q, k, v):
    """Causal, with the softmax in float32."""
    q, k, v = (a.reshape(*a.shape[:2], gpt.heads, -1) for a in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32)
    is_past = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    scores = jnp.where(is_past, scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return mixed.reshape(*mixed.shape[:2], -1)


def by_kind(loss_and_gradients, transposed):
    """The loss and the gradients of one kind, as vectors in float64."""
    loss, gradients = loss_and_gradients
    weights, biases = [], []
    for layer in gradients["linear"]:
        by_rank = {leaf.ndim: as_float64(leaf) for leaf in jax.tree.leaves(layer)}
        weights.append((by_rank[2].T if transposed else by_rank[2]).ravel())
        biases.append(by_rank[1])
    others = [as_float64(leaf).ravel() for leaf in jax.tree.leaves(gradients["other"])]
    return {
        "loss": as_float64(loss),
        "weight gradients": np.concatenate(weights),
        "bias gradients": np.concatenate(biases),
        "other gradients": np.concatenate(others),
    }
