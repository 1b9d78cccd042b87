"""Every optimizer of Optax's goes on after a conversion as if there had been none.

The oracle is the same model with Flax's layers, trained by the same optimizer. All is in
float64: an update divides by what rounding leaves of a small gradient.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlinear.nnx import convert, dimension_numbers, revert

contrib = optax.contrib
WIDTH, HEADS, LAYERS = 8, 2, 3
RATE = 1e-2
X = np.random.default_rng(0).normal(size=(2, 5, WIDTH))


@pytest.fixture(autouse=True)
def _settings_of_optax():
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


class Model(nnx.Module):
    """Projections to heads and back, a stack of layers, a norm, square, wide and LoRA."""

    def __init__(self, rngs):
        options = {"param_dtype": jnp.float64, "rngs": rngs}
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, 3), **options)
        self.out = nnx.LinearGeneral((HEADS, 3), WIDTH, axis=(-2, -1), **options)

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(WIDTH, WIDTH, param_dtype=jnp.float64, rngs=rngs)

        self.stack = stack(rngs)
        self.norm = nnx.LayerNorm(WIDTH, **options)
        self.square = nnx.Linear(WIDTH, WIDTH, **options)
        self.adapted = nnx.LoRALinear(WIDTH, 2 * WIDTH, lora_rank=2, **options)
        self.head = nnx.Linear(2 * WIDTH, 3, **options)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return jnp.tanh(layer(x))

        x = through(self.out(self.query(x)), self.stack)
        return self.head(nnx.gelu(self.adapted(self.square(self.norm(x)))))


def loss_of(model):
    return jnp.mean((model(X) - 1) ** 2)


@partial(jax.jit, static_argnums=0)
def value_and_grad(graph, state):
    return jax.value_and_grad(lambda state: loss_of(nnx.merge(graph, state)))(state)


def step(model, optimizer):
    graph, state = nnx.split(model)
    value, gradients = value_and_grad(graph, state)
    optimizer.update(
        model,
        gradients,
        value=value,
        grad=nnx.as_pure(gradients),
        value_fn=lambda parameters: loss_of(nnx.merge(graph, parameters)),
    )


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        if not jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11)


def assert_goes_on(tx):
    """Through a conversion and back, with two steps before and after each."""
    tx = optax.with_extra_args_support(tx)
    flax = Model(nnx.Rngs(0))
    theirs = nnx.Optimizer(flax, tx, wrt=nnx.Param)
    for _ in range(2):
        step(flax, theirs)
    model, optimizer = nnx.clone((flax, theirs))
    report = convert(model, optimizer)
    assert list(report.converted) == ["head", "out", "query", "square", "stack"]
    for change in revert, convert:
        for _ in range(2):
            step(flax, theirs)
            step(model, optimizer)
        change(model, optimizer)
        if change is revert:
            assert_close(nnx.state((model, optimizer)), nnx.state((flax, theirs)))
    revert(model, optimizer)
    assert_close(nnx.state((model, optimizer)), nnx.state((flax, theirs)))


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def by_path(of_path):
    """A function of parameters: what is made of the path of each one."""
    return lambda parameters: jax.tree.map_with_path(
        lambda path, _: of_path(name_of(path)), parameters
    )


def is_matrix(path):
    return "kernel" in path or "weight" in path


LAYERS_BY_PATH = {"query": (1, 2), "out": (2, 1), "adapted": (1, 1)}
LAYERS_BY_PATH |= dict.fromkeys(["head", "square", "stack"], (1, 1))
numbers_of_muon = dimension_numbers(LAYERS_BY_PATH, contrib.MuonDimensionNumbers)
adam = optax.adam(RATE)
nothing = optax.set_to_zero()

# A mask that stops above the parameters is good for both.
FROZEN = dict.fromkeys(["adapted", "norm", "out", "query", "square", "stack"], False)
FROZEN = nnx.State({"head": True, **FROZEN})

# What needs other arguments than a learning rate.
OPTIMIZERS = {
    "nadam": optax.nadam(RATE),
    "nadamw": optax.nadamw(RATE),
    "sgd with momentum": optax.sgd(RATE, 0.9, nesterov=True),
    "adamw with a mask": optax.adamw(RATE, weight_decay=0.1, mask=by_path(is_matrix)),
    "muon": contrib.muon(RATE, muon_weight_dimension_numbers=numbers_of_muon),
    "muon, consistent": contrib.muon(
        RATE,
        consistent_rms=0.2,
        weight_decay=0.1,
        muon_weight_dimension_numbers=numbers_of_muon,
    ),
    "masked": optax.masked(adam, by_path(is_matrix)),
    "masked, others": optax.masked(adam, by_path(lambda path: not is_matrix(path))),
    "partition": optax.partition(
        {"fast": adam, "slow": optax.sgd(RATE, 0.9), "frozen": nothing},
        by_path(lambda path: "slow" if is_matrix(path) else "fast"),
    ),
    "partition, frozen": optax.multi_transform(
        {"trained": adam, "frozen": nothing},
        by_path(lambda path: "trained" if "head" in path else "frozen"),
    ),
    "chain": optax.chain(optax.clip_by_global_norm(0.1), adam),
    "ema": optax.chain(optax.ema(0.9), adam),
    "named_chain": optax.named_chain(("clip", optax.clip(0.1)), ("adam", adam)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
    "inject_stateful_hyperparams": optax.inject_stateful_hyperparams(optax.adamw)(
        learning_rate=optax.schedules.WrappedSchedule(lambda count: RATE / (count + 1))
    ),
    "MultiSteps": optax.MultiSteps(adam, 3).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(adam, 2),
    "apply_every": optax.chain(optax.apply_every(2), adam),
    "conditionally_mask": optax.conditionally_mask(adam, lambda count: count % 2 == 0),
    "conditionally_transform": optax.conditionally_transform(
        adam, lambda count: count % 2 == 0
    ),
    "snapshot": optax.chain(adam, optax.snapshot("u", lambda updates: updates)),
    "measure_with_ema": optax.chain(
        adam, optax.measure_with_ema(lambda u, *_: optax.global_norm(u), 0.9)
    ),
    "adaptive_grad_clip": optax.chain(
        adam, optax.masked(optax.adaptive_grad_clip(0.01, axis=()), by_path(is_matrix))
    ),
    "trace": optax.chain(optax.trace(0.9), optax.scale(-RATE)),
    "add_decayed_weights": optax.chain(optax.add_decayed_weights(0.1), adam),
    "keep_params_nonnegative": optax.chain(adam, optax.keep_params_nonnegative()),
    "stateless": optax.chain(optax.stateless(lambda u, _: u), adam),
    "scale_by_schedule": optax.chain(
        optax.scale_by_schedule(lambda count: 1 / (count + 1)), optax.scale(-RATE)
    ),
    "scale_by_backtracking_linesearch": optax.chain(
        optax.sgd(RATE), optax.scale_by_backtracking_linesearch(5, store_grad=False)
    ),
    "scale_by_zoom_linesearch": optax.chain(
        optax.sgd(RATE), optax.scale_by_zoom_linesearch(5)
    ),
    "lbfgs": optax.lbfgs(),
    "polyak_sgd": optax.polyak_sgd(),
    "reduce_on_plateau": optax.chain(adam, contrib.reduce_on_plateau(patience=1)),
    "schedule_free": contrib.schedule_free(adam, RATE),
    "mechanize": contrib.mechanize(adam),
    "sam": contrib.sam(adam, optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "scale_by_muon": optax.chain(
        optax.masked(
            contrib.scale_by_muon(weight_dimension_numbers=numbers_of_muon),
            by_path(lambda path: "head" in path and is_matrix(path)),
        ),
        optax.scale(-RATE),
    ),
    "split_real_and_imaginary": contrib.split_real_and_imaginary(adam),
    "freeze": optax.chain(adam, optax.freeze(FROZEN)),
    "selective_transform": optax.selective_transform(adam, freeze_mask=FROZEN),
}

# They draw numbers for each element of a parameter, in the order of its memory.
RANDOM = {
    "add_noise": optax.chain(optax.add_noise(0.1, 0.5, key=0), adam),
    "noisy_sgd": optax.noisy_sgd(RATE, key=0),
    "sophia": contrib.sophia(RATE),
}
# They ask for the gradient of each example, or are about axes and keep nothing.
ELSEWHERE = {"dpsgd", "differentially_private_aggregate", "centralize", "lookahead"}
REFUSED = {
    "flatten": (optax.flatten(adam), "keep the parameters apart.* in ScaleByAdamState"),
    "galore": (
        contrib.galore(RATE, 2),
        r"none of a projection .* in GaLoreState\.proj",
    ),
    "galore, full": (contrib.galore(RATE), r"none of a projection .* in GaLoreState"),
    "adafactor, factored": (
        optax.adafactor(RATE, min_dim_size_to_factor=2),
        r"2 axes or more at 'head\.kernel' in FactoredState\.v_row",
    ),
    "a filter of names": (
        optax.masked(adam, by_path(lambda path: "kernel" in path)),
        r"can be converted: .* in ScaleByAdamState\.mu, where a new state has nothing",
    ),
    "a mask of names": (
        optax.freeze(nnx.State({**FROZEN, "head": {"bias": False, "kernel": True}})),
        r"`tx` that starts for the converted model\. A mask, a label",
    ),
}


def is_optimizer(function):
    named = inspect.isfunction(function) and inspect.signature(function)
    return named and "GradientTransformation" in str(named.return_annotation)


def all_optimizers():
    """By name, what Optax has that is called with a learning rate, or with nothing."""
    wrappers = {"scale", "with_extra_args_support", "stateless_with_tree_map"}
    for name, function in {**vars(optax), **vars(contrib)}.items():
        own = {*OPTIMIZERS, *RANDOM, *ELSEWHERE, *REFUSED, *wrappers}
        if not is_optimizer(function) or {name, function.__name__} & own:
            continue
        if "learning_rate" in inspect.signature(function).parameters:
            yield name, partial(function, learning_rate=RATE)
        elif name.startswith("clip"):
            yield name, lambda f=function: optax.chain(f(0.1), adam)
        else:
            yield name, lambda f=function: optax.chain(f(), optax.scale(-RATE))


OPTIMIZERS |= {name: make() for name, make in all_optimizers()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_through_a_conversion_and_back(name):
    assert_goes_on(OPTIMIZERS[name])
