"""Does it matter? Trainings whose layers differ only in how gradients are rounded.

    python -m benchmarks.outcomes [NAME ...]

Each experiment is a function of a layer and a seed, and its docstring says what it
measures. All contenders have the same start and the same data, and the parameters at
the end are judged in float64 by NumPy. It writes `benchmarks/results/outcomes.json`,
in which named experiments replace their older rows, and `python -m benchmarks.pages`
writes the page. All of it takes half an hour on two cores.
"""

import argparse
import functools
import inspect
import itertools
import json
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from benchmarks import peers, results_file
from benchmarks.machine import ROOT, describe
from benchmarks.progress import Cells

RESULTS = ROOT / "benchmarks" / "results" / "outcomes.json"


# The contenders: functions of x (*, in), a weight (out, in) and a bias (out,).


def float32(x, weight, bias):
    return peers.naive((weight, bias), x, "float32")


def ours(x, weight, bias):
    return peers.ours((weight, bias), x, "bfloat16")


def flax(x, weight, bias):
    return peers.flax_nnx((weight.T, bias), x, "bfloat16")


def naive(x, weight, bias):
    return peers.naive((weight, bias), x, "bfloat16")


def with_bias_gradient(layer, bias_gradient):
    """The layer, with another gradient of the bias: a function of G (*, out)."""

    @jax.custom_vjp
    def changed(x, weight, bias):
        return layer(x, weight, bias)

    def backward(arguments, G):
        grad_x, grad_weight, _ = jax.vjp(layer, *arguments)[1](G)
        return grad_x, grad_weight, bias_gradient(G).astype(arguments[2].dtype)

    changed.defvjp(lambda *arguments: (changed(*arguments), arguments), backward)
    return changed


def summed_by_xla(G):
    """In bfloat16, as autodiff sums it; `jnp.sum` would sum in float32."""

    def broadcast(bias):
        return jnp.broadcast_to(bias, G.shape)

    return jax.linear_transpose(broadcast, G[(0,) * (G.ndim - 1)])(G)[0]


def summed_in_float32(G):
    return jnp.sum(G.astype("float32"), tuple(range(G.ndim - 1)))


def summed_like_an_h100(G):
    """In bfloat16, in the order of the kernels that XLA compiles for an H100.

    From 16,384 rows on, √n partial sums of √n rows each, and then their sum. 8,192 rows
    in one array of rows are split into 64 of 128; a reduction over (32, 256) is not
    split, as in `tests/deep/targets/test_bias_sums.py`.
    """
    rows = G.reshape(-1, G.shape[-1]).astype("float32")
    split = int(len(rows) ** 0.5)
    if split >= 128:
        rows = jax.vmap(_by_32_threads)(rows.reshape(split, split, -1))
    return _by_32_threads(rows)


def _by_32_threads(rows):
    """Each adds every 32nd row; then halves are added. Each sum is rounded."""

    def add(a, b):
        return jax.lax.reduce_precision(a + b, 8, 7), None

    rows = rows.reshape(-1, 32, rows.shape[-1])
    sums = jax.lax.scan(add, jnp.zeros_like(rows[0]), rows)[0]
    while len(sums) > 1:
        sums, _ = add(*jnp.split(sums, 2))
    return sums[0]


CONTENDERS = {
    "float32": float32,
    "jaxlinear": ours,
    "Flax NNX": flax,
    "naive formula": naive,
    "Flax NNX, ∇B in float32": with_bias_gradient(flax, summed_in_float32),
    "jaxlinear, ∇B in bfloat16": with_bias_gradient(ours, summed_by_xla),
    "Flax NNX, ∇B as on an H100": with_bias_gradient(flax, summed_like_an_h100),
}
"""The fifth and the sixth find the cause: one of the two gradients is the other's."""


# The cause, without a training.


def equal_terms(layer, seed, shape):
    """The gradient of a bias over the exact one, where all its terms are 1."""

    @jax.jit
    def gradient(x, weight, bias, G):
        Y, vjp = jax.vjp(functools.partial(layer, x, weight), bias)
        return vjp(G.astype(Y.dtype))[0]

    # All are arguments: XLA sums constants in another order.
    zeros = jnp.zeros((*shape, IN)), jnp.zeros((OUT, IN)), jnp.zeros(OUT)
    return float(gradient(*zeros, jnp.ones((*shape, OUT))).mean()) / np.prod(shape)


# Training and judging, which all experiments share.


def trained(loss, parameters, optimizer, batches):
    """The parameters after a step on ``loss(parameters, batch)`` for each batch."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, batch):
        parameters, state = carry
        value, gradients = jax.value_and_grad(loss)(parameters, batch)
        # What a line search asks for; the other optimizers ignore it.
        search = {"value": value, "grad": gradients}
        search["value_fn"] = functools.partial(loss, batch=batch)
        updates, state = optimizer.update(gradients, state, parameters, **search)
        return (optax.apply_updates(parameters, updates), state), None

    carry = parameters, optimizer.init(parameters)
    return jax.lax.scan(step, carry, batches)[0][0]


def outputs(x, weight, bias):
    """In float64."""
    x, weight, bias = (np.asarray(a, np.float64) for a in (x, weight, bias))
    return x @ weight.T + bias


# One layer, its whole data in each step.

IN, OUT = 16, 8
DECAY = 1e-2


def drawn(seed, shape, offset):
    """The generator, x (*shape, in) and the mean of a linear model (*shape, out)."""
    draws = np.random.default_rng(seed)
    x = draws.standard_normal((*shape, IN), np.float32)
    return draws, x, x @ draws.normal(0, 0.25, (IN, OUT)) + offset


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def mean_entropy(z, y, parameters):
    return optax.sigmoid_binary_cross_entropy(z, y).mean()


def decayed_entropy(z, y, parameters):
    squares = sum(jnp.sum(p**2) for p in parameters)
    return mean_entropy(z, y, parameters) + DECAY / 2 * squares


def poisson(z, y, parameters):
    return jnp.mean(jnp.exp(z) - y * z)


def squared(z, y, parameters):
    return jnp.mean(jnp.sum((z - y) ** 2, -1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 6))
def fitted(layer, loss, optimizer, x, y, offset, steps):
    """The weight and the bias, which start at 0 and at ``offset``."""

    def of_parameters(parameters, batch):
        z = layer(x, *parameters).astype("float32")
        return loss(z, y, parameters)

    start = jnp.zeros((OUT, IN)), jnp.full(OUT, offset, "float32")
    return trained(of_parameters, start, optimizer, jnp.arange(steps))


ADAM = optax.adam(optax.cosine_decay_schedule(0.05, 200))
SGD = optax.sgd(0.05)


def events(layer, seed, shape=(64, 64), rate=0.01, steps=200):
    """Rare events (1 %): how many the model predicts on its data, over the observed.

    A logistic regression of 8 events. With a bias the ratio is 1 at the minimum. Its
    bias starts at the log odds of the rate. Adam, 200 steps on all of the data.
    """
    offset = np.log(rate / (1 - rate))
    draws, x, z = drawn(seed, shape, offset)
    y = np.float32(draws.uniform(size=z.shape) < sigmoid(z))
    parameters = fitted(layer, mean_entropy, ADAM, x, y, offset, steps)
    return sigmoid(outputs(x, *parameters)).sum() / y.sum(dtype=np.float64)


def common_events(layer, seed, **sizes):
    """The same with events of 30 %."""
    return events(layer, seed, rate=0.3, **sizes)


def one_axis(layer, seed, **sizes):
    """Rare events once more, with all 4,096 tokens in one axis instead of two."""
    return events(layer, seed, shape=(4096,), **sizes)


def three_axes(layer, seed, **sizes):
    """Rare events once more, with 4,096 tokens in three axes, as images have them."""
    return events(layer, seed, shape=(16, 16, 16), **sizes)


def counts(layer, seed, shape=(64, 64), steps=200):
    """Counts of mean 5 (Poisson regression): the predicted total over the observed."""
    draws, x, z = drawn(seed, shape, np.log(5))
    y = np.float32(draws.poisson(np.exp(z)))
    parameters = fitted(layer, poisson, ADAM, x, y, np.log(5), steps)
    return np.exp(outputs(x, *parameters)).sum() / y.sum(dtype=np.float64)


def offset(layer, seed, shape=(64, 64), steps=100):
    """A target whose mean is 10, with noise of 1: mean squared error after 100 steps.

    A linear regression with gradient descent, whose bias starts at 0.
    """
    draws, x, z = drawn(seed, shape, 10)
    y = np.float32(z + draws.standard_normal(z.shape))
    parameters = fitted(layer, squared, SGD, x, y, 0, steps)
    return np.mean((outputs(x, *parameters) - y) ** 2)


# Second-order methods: how near they come to the minimum of a convex function.


def excess(x, y, parameters):
    """The loss at the parameters minus the least one, both in float64."""
    x = np.asarray(x, np.float64).reshape(-1, IN)
    x = np.append(x, np.ones((len(x), 1)), 1)
    y = np.asarray(y, np.float64).reshape(-1, OUT)

    def loss(w):  # (out, in + 1)
        z = x @ w.T
        return np.mean(np.logaddexp(0, z) - y * z) + DECAY / 2 * np.sum(w**2)

    best = np.zeros((OUT, IN + 1))
    for _ in range(20):  # Newton's method, for each output.
        p = sigmoid(x @ best.T)
        gradient = (p - y).T @ x / y.size + DECAY * best
        for k in range(OUT):
            curvature = (x * (p * (1 - p))[:, k : k + 1]).T @ x / y.size
            curvature += DECAY * np.eye(IN + 1)
            best[k] -= np.linalg.solve(curvature, gradient[k])
    weight, bias = (np.asarray(p, np.float64) for p in parameters)
    return loss(np.append(weight, bias[:, None], 1)) - loss(best)


LBFGS = optax.lbfgs()


def minimized(layer, seed, shape, optimizer, steps):
    draws, x, z = drawn(seed, shape, 0)
    y = np.float32(draws.uniform(size=z.shape) < sigmoid(z))
    return excess(x, y, fitted(layer, decayed_entropy, optimizer, x, y, 0, steps))


def lbfgs(layer, seed, shape=(64, 64), steps=40):
    """L-BFGS with Optax's zoom line search: the loss above the minimum.

    A logistic regression of events of 50 % with weight decay, 40 iterations.
    """
    return minimized(layer, seed, shape, LBFGS, steps)


def conjugate():
    """The direction of nonlinear conjugate gradients, of Polak and Ribière."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros

    def update(updates, state, params=None):
        before, direction = state
        change = jax.tree.map(jnp.subtract, updates, before)
        dot = optax.tree.vdot
        length = jnp.asarray(dot(before, before))
        beta = jnp.where(length > 0, dot(updates, change) / length, 0)
        beta = jnp.maximum(beta, 0)
        direction = jax.tree.map(lambda d, g: beta * d - g, direction, updates)
        return direction, (updates, direction)

    return optax.GradientTransformation(init, update)


CONJUGATE = optax.chain(conjugate(), optax.scale_by_zoom_linesearch(20))


def conjugate_gradients(layer, seed, shape=(64, 64), steps=40):
    """Nonlinear conjugate gradients, with the same line search, on the same loss."""
    return minimized(layer, seed, shape, CONJUGATE, steps)


# A character model: eight characters, embedded, through two hidden layers.

CONTEXT, EMBEDDED, WIDTH, CLASSES = 8, 16, 128, 128


def as_characters(text):
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8)


@functools.cache
def english():
    """Python's own manual: 700,000 characters."""
    topics = pydoc_data.topics.topics
    return as_characters("\n".join(topics[name] for name in sorted(topics)))


@functools.cache
def python():
    """The source of a module of Python's library."""
    return as_characters(inspect.getsource(argparse))


def halves(text):
    """What is trained on, and a tenth to judge by."""
    return np.split(text, [len(text) * 9 // 10])


def windows(text, first, length):
    """Characters (batch, length, context) and those that follow (batch, length)."""
    places = first[:, None] + jnp.arange(length)
    return text[places[..., None] + jnp.arange(CONTEXT)], text[places + CONTEXT]


def character_model(seed):
    draws = np.random.default_rng(seed)

    def normal(*shape):
        return draws.standard_normal(shape, np.float32)

    shapes = (WIDTH, CONTEXT * EMBEDDED), (WIDTH, WIDTH), (CLASSES, WIDTH)
    layers = [
        (normal(out, inputs) * np.float32(inputs**-0.5), np.zeros(out, np.float32))
        for out, inputs in shapes
    ]
    return {"layers": layers, "table": normal(CLASSES, EMBEDDED)}


def character_loss(layer, is_cast_first, parameters, contexts, labels):
    table = parameters["table"]
    if is_cast_first and layer is not float32:
        table = table.astype("bfloat16")
    h = table[contexts].reshape(*labels.shape, -1)
    for weight, bias in parameters["layers"][:-1]:
        h = jnp.tanh(layer(h, weight, bias))
    z = layer(h, *parameters["layers"][-1]).astype("float32")
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 6))
def read(layer, is_cast_first, optimizer, text, parameters, first, length):
    """The parameters after a batch of windows for each of ``first`` (steps, batch)."""

    def loss(parameters, batch):
        data = windows(text.astype("int32"), batch, length)
        return character_loss(layer, is_cast_first, parameters, *data)

    return trained(loss, parameters, optimizer, first)


def after_reading(
    layer, seed, text, optimizer, shape, steps, *, model=None, cast_first=False
):
    """The parameters of ``model``, or of a new one, after steps on (batch, length)."""
    batch, length = shape
    last = len(text) - length - CONTEXT
    first = np.random.default_rng(seed).integers(last, size=(steps, batch))
    model = model or character_model(seed)
    return read(layer, cast_first, optimizer, text, model, first, length)


def held_out(text, parameters):
    """The loss of 8,192 characters, in float64."""
    places = np.arange(min(8192, len(text) - CONTEXT))
    h = np.asarray(parameters["table"], np.float64)
    h = h[text[places[:, None] + np.arange(CONTEXT)]].reshape(len(places), -1)
    for layer in parameters["layers"][:-1]:
        h = np.tanh(outputs(h, *layer))
    z = outputs(h, *parameters["layers"][-1])
    log_sum = np.logaddexp.reduce(z, 1)
    return np.mean(log_sum - z[places, text[places + CONTEXT]])


FAST, SLOW, TINY = optax.adam(3e-3), optax.adam(1e-5), optax.sgd(1e-3)
ACCUMULATED = optax.MultiSteps(FAST, 64).gradient_transformation()


def characters(
    layer,
    seed,
    shape=(32, 256),
    steps=150,
    optimizer: optax.GradientTransformation = FAST,
    **options,
):
    """A character model, 8,192 tokens a batch: held-out loss after 150 steps of Adam.

    Its layers have 128 features.
    """
    text, rest = halves(english())
    found = after_reading(layer, seed, text, optimizer, shape, steps, **options)
    return held_out(rest, found)


def embedding(layer, seed, **sizes):
    """The same beside an embedding that is cast to bfloat16 before the look-up."""
    return characters(layer, seed, **sizes, cast_first=True)


def long(layer, seed, shape=(8, 32), steps=2000):
    """2,000 steps of Adam at a learning rate of 1e-5, 256 tokens a batch."""
    return characters(layer, seed, shape, steps, SLOW)


def accumulated(layer, seed, shape=(4, 32), steps=50 * 64):
    """50 updates of 64 microbatches of 128 tokens, summed by `optax.MultiSteps`."""
    return characters(layer, seed, shape, steps, ACCUMULATED)


def finetuned(layer, seed, shape=(8, 32), steps=1000):
    """Fine-tuning with tiny updates: SGD at 1e-3, from English to a Python module.

    The start is trained in float32, for 200 steps.
    """
    (first, _), (second, rest) = halves(english()), halves(python())
    model = after_reading(float32, seed, first, FAST, shape, 200)
    found = after_reading(layer, seed, second, TINY, shape, steps, model=model)
    return held_out(rest, found)


SUMS = [(65536,), (256, 256), (64, 32, 32)]
"""The axes of 65,536 tokens."""

SIZES = [(16, 16), (32, 32), (64, 64), (128, 128), (256, 256)]
"""Of the batches of rare events that are drawn."""

EXPERIMENTS = {
    **{
        f"events-{a * b}": functools.partial(events, shape=(a, b))  # (rows, tokens)
        for a, b in SIZES
    },
    "events-one-axis": one_axis,
    "events-three-axes": three_axes,
    "events-common": common_events,
    "counts": counts,
    "offset": offset,
    "characters": characters,
    "embedding": embedding,
    "long": long,
    "accumulated": accumulated,
    "finetuned": finetuned,
    "lbfgs": lbfgs,
    "conjugate-gradients": conjugate_gradients,
    **{
        f"sum-{'-'.join(map(str, shape))}": functools.partial(equal_terms, shape=shape)
        for shape in SUMS
    },
}
OF_CHARACTERS = "characters", "embedding", "long", "accumulated", "finetuned"
YARDSTICKS = "float32", "jaxlinear", "Flax NNX", "naive formula"


def seeds(name):
    if name.startswith("sum-"):
        return range(1)  # Nothing is drawn.
    return range(3 if name in OF_CHARACTERS else 5)


def contenders(name):
    """Of the dearer experiments the first four."""
    return YARDSTICKS if name in OF_CHARACTERS else CONTENDERS


def rows_of(name):
    """The outcome of an experiment for each contender and seed."""
    for contender, seed in itertools.product(contenders(name), seeds(name)):
        outcome = float(EXPERIMENTS[name](CONTENDERS[contender], seed))
        row = {"experiment": name, "contender": contender, "seed": seed}
        yield row | {"outcome": outcome}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.outcomes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    names = parser.parse_args().names or [*EXPERIMENTS]
    if unknown := sorted({*names} - {*EXPERIMENTS}):
        parser.error(f"no experiment is named {', '.join(unknown)}")
    cpu = jax.devices("cpu")[0]
    document = describe(cpu) | {"rows": []}
    if RESULTS.exists():
        document["rows"] = json.loads(RESULTS.read_text())["rows"]
    with jax.default_device(cpu), Cells(Console(), [1] * len(names)) as progress:
        for name in names:
            progress.begin(name)
            rows = [row for row in document["rows"] if row["experiment"] != name]
            rows += rows_of(name)
            rows.sort(key=lambda row: [*EXPERIMENTS].index(row["experiment"]))
            document["rows"] = rows
            results_file.write(document, RESULTS)
            progress.finish(name)


if __name__ == "__main__":
    main()
