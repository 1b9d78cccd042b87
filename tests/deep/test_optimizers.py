"""Every optimizer of Optax's goes on after a conversion as if there had been none.

The oracle is the same model with Flax's layers, trained by the same optimizer, all in
float64: an update divides by what rounding leaves of a small gradient. What is refused
is in ``test_convert.py``.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlinear.linen import convert_tree, revert_tree
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
    """Projections to heads and back, a stack, a norm, a square layer, and LoRA."""

    def __init__(self, rngs, dtype):
        options = {"param_dtype": dtype, "rngs": rngs}
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, 3), **options)
        self.out = nnx.LinearGeneral((HEADS, 3), WIDTH, axis=(-2, -1), **options)

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(WIDTH, WIDTH, param_dtype=dtype, rngs=rngs)

        self.stack = stack(rngs)
        self.norm = nnx.LayerNorm(WIDTH, **options)
        self.square = nnx.Linear(WIDTH, WIDTH, **options)
        self.adapted = nnx.LoRALinear(
            WIDTH, 2 * WIDTH, lora_rank=2, lora_param_dtype=dtype, **options
        )
        self.head = nnx.Linear(2 * WIDTH, 3, **options)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return jnp.tanh(layer(x))

        x = through(self.out(self.query(x)), self.stack)
        return self.head(nnx.gelu(self.adapted(self.square(self.norm(x)))))


def loss_of(model):
    return jnp.mean((model(X.astype(model.head.bias.dtype)) - 1) ** 2)


@nnx.jit
def loss_and_gradients(model):
    graph, state = nnx.split(model)
    return jax.value_and_grad(lambda s: loss_of(nnx.merge(graph, s)))(state)


@partial(nnx.jit, static_argnames="takes_extra")
def update(model, optimizer, value, gradients, takes_extra):
    graph = nnx.graphdef(model)
    extra = {
        "value": value,
        "grad": nnx.as_pure(gradients),
        "value_fn": lambda parameters: loss_of(nnx.merge(graph, parameters)),
    }
    optimizer.update(model, gradients, **(extra if takes_extra else {}))


def step(model, optimizer, takes_extra):
    # The gradients are compiled once, and not for each optimizer.
    update(model, optimizer, *loss_and_gradients(model), takes_extra=takes_extra)


def assert_close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        if not jnp.issubdtype(jnp.asarray(b).dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance / 100)


def assert_goes_on(tx, dtype=jnp.float64, tolerance=1e-8, takes_extra=True):
    """Through a conversion, two steps, and back, with a step before and after."""
    tx = optax.with_extra_args_support(tx)
    flax = Model(nnx.Rngs(0), dtype)
    theirs = nnx.Optimizer(flax, tx, wrt=nnx.Param)
    step(flax, theirs, takes_extra)
    model, optimizer = nnx.clone((flax, theirs))
    report = convert(model, optimizer)
    assert list(report.converted) == ["head", "out", "query", "square", "stack"]
    for steps in 2, 1:
        for _ in range(steps):
            step(flax, theirs, takes_extra)
            step(model, optimizer, takes_extra)
        revert(model, optimizer)  # The second time there is nothing to revert.
        both = nnx.state((model, optimizer)), nnx.state((flax, theirs))
        assert_close(*both, tolerance)


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
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(
        learning_rate=lambda count: RATE / (count + 1)
    ),
    "MultiSteps": optax.MultiSteps(adam, 3).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(adam, 2),
    "apply_every": optax.chain(optax.apply_every(2), adam),
    "conditionally_mask": optax.conditionally_mask(adam, lambda count: count % 2 == 0),
    "conditionally_transform": optax.chain(
        optax.scale(RATE),
        optax.conditionally_transform(adam, lambda count: count % 2 == 1),
    ),
    "snapshot": optax.chain(adam, optax.snapshot("u", lambda updates: updates)),
    "measure_with_ema": optax.chain(
        adam, optax.measure_with_ema(lambda updates: updates, 0.9)
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
    # A variance from below zero, which it is without, makes it diverge.
    "acprop": contrib.acprop(1e-4, eps=1.0),
    "scale_by_acprop": optax.chain(
        contrib.scale_by_acprop(eps=1.0), optax.scale(-RATE)
    ),
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
    "hutchinson_estimator_diag_hessian": contrib.hutchinson_estimator_diag_hessian(0),
}
OF_THEIR_OWN = {
    "mechanize",  # Only float32.
    "sam",  # It takes no other arguments.
    "lookahead",  # Its parameters are pairs.
    # Refused.
    "flatten",
    "galore",
    "scale_by_galore",
    # Deprecated, and covered by `inject_hyperparams`.
    "inject_stateful_hyperparams",
    # About axes, with no state, and so another optimizer with our weights.
    "centralize",
    # They ask for the gradient of each example, and keep none.
    "dpsgd",
    "differentially_private_aggregate",
    # No optimizers.
    "stateless_with_tree_map",
    "with_extra_args_support",
}


def is_optimizer(function):
    signature = inspect.isfunction(function) and inspect.signature(function)
    return "GradientTransformation" in str(signature and signature.return_annotation)


def other_optimizers():
    """By name, the functions of Optax that need no more than a number, or nothing."""
    own = {*OPTIMIZERS, *RANDOM, *OF_THEIR_OWN}
    for name, make in {**vars(optax), **vars(contrib)}.items():
        # An old name may be that of another function.
        if is_optimizer(make) and not {name, make.__name__} & own:
            yield name, make


def made_by(make):
    if "learning_rate" in inspect.signature(make).parameters:
        return make(learning_rate=RATE)
    takes_a_number = make.__name__.startswith("clip") or make is optax.scale
    return optax.chain(make(*[0.1] * takes_a_number), optax.scale(-RATE))


OTHERS = dict(other_optimizers())


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_through_a_conversion_and_back(tx):
    assert_goes_on(tx)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Also old names.
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_training_goes_on_with_each_other_optimizer(make):
    assert_goes_on(made_by(make))


def test_sam_goes_on():
    away = optax.chain(contrib.normalize(), optax.sgd(0.05))
    assert_goes_on(contrib.sam(adam, away), takes_extra=False)


@pytest.mark.parametrize("tx", RANDOM.values(), ids=RANDOM)
def test_a_state_of_what_draws_numbers_comes_back_to_the_bit(tx):
    model = Model(nnx.Rngs(0), jnp.float64)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.split((model, optimizer))
    convert(model, optimizer)
    revert(model, optimizer)
    after = nnx.split((model, optimizer))
    assert before[0] == after[0]
    assert_close(after[1], before[1], tolerance=0)


def test_mechanize_goes_on():
    with jax.enable_x64(False):
        assert_goes_on(contrib.mechanize(adam), jnp.float32, 1e-3)


def test_lookahead_goes_on():
    """A plain state of Optax's, whose parameters are pairs, in a tree of Linen's."""
    start = {"up": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}}
    tx = optax.lookahead(adam, 2, 0.5)

    def trained(both, count):
        parameters, state = both
        for _ in range(count):
            gradients = jax.tree.map(lambda p: jnp.sin(p) + p, parameters.fast)
            updates, state = tx.update(gradients, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
        return parameters, state

    parameters = optax.LookaheadParams.init_synced(start)
    before = trained((parameters, tx.init(parameters)), 3)
    ours = trained(convert_tree(before, ["up"]), 3)
    assert_close(revert_tree(ours, ["up"]), trained(before, 3), 1e-12)


def test_adaptive_clipping_by_the_last_axis_is_that_of_flax_by_the_first():
    class Flat(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.up = nnx.Linear(4, 6, param_dtype=jnp.float64, rngs=rngs)

    clipped = {
        axis: optax.chain(optax.adaptive_grad_clip(1e-3, axis=axis), optax.sgd(1.0))
        for axis in (None, -1)
    }
    flax, ours = Flat(), Flat()
    convert(ours)
    gradient = np.random.default_rng(1).normal(size=(4, 6))
    for model, axis, gradients in (
        (flax, None, {"kernel": gradient, "bias": gradient[0]}),
        (ours, -1, {"weight": gradient.T, "bias": gradient[0]}),
    ):
        optimizer = nnx.Optimizer(model, clipped[axis], wrt=nnx.Param)
        state = {name: nnx.Param(jnp.asarray(g)) for name, g in gradients.items()}
        optimizer.update(model, nnx.State({"up": state}))
    np.testing.assert_allclose(ours.up.weight[...].T, flax.up.kernel[...], rtol=1e-12)
    np.testing.assert_allclose(ours.up.bias[...], flax.up.bias[...], rtol=1e-12)


def test_galore_with_our_dimension_numbers_projects_as_in_flax():
    """Also of square layers, which it would take for the other layout."""
    flax = {
        name: nnx.Linear(6, size, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        for name, size in {"square": 6, "wide": 9}.items()
    }
    ours = {name: nnx.clone(layer) for name, layer in flax.items()}
    flax, ours = nnx.Dict(flax), nnx.Dict(ours)
    report = convert(ours)
    numbers = dimension_numbers(report.converted, contrib.GaLoreDimensionNumbers)
    tx = contrib.galore(RATE, rank=2, weight_dimension_numbers=numbers)
    x = X.reshape(-1, WIDTH)[:, :6]

    def loss(model):
        return jnp.sum((model.wide(jnp.tanh(model.square(x))) - 1) ** 2)

    for model in flax, ours:
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(3):
            optimizer.update(model, nnx.grad(loss)(model))
    revert(ours)
    assert_close(nnx.state(ours), nnx.state(flax), 1e-8)
