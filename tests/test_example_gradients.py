"""The gradients of single examples: their norms, their clipped sum, their noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_models import (
    BASIC,
    BATCH,
    OTHER,
    ROUGH,
    clipped,
    drawn,
    gradients,
    mlp_parameters,
    of_mlp,
    squared_norms,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxlinear
from jaxlinear import clipped_grad, gradient_noise, linear, squared_grad_norms


def check_close(found, expected, tolerance, scale):
    """Relative to the largest of the numbers, and to a scale that all have."""
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.shape == other.shape
        largest = jnp.max(jnp.abs(other), initial=0)
        error = jnp.max(jnp.abs(one.astype("float32") - other), initial=0)
        assert error <= tolerance * jnp.maximum(largest, 1e-2 * scale)


def check_model(name):
    """Norms, clipped gradients and values are those of JAX's gradients."""
    loss, parameters, batch = (BASIC | OTHER)[name]()
    places, tolerance = tuple(range(1, 1 + len(batch))), ROUGH.get(name, 5e-6)

    @jax.jit
    def expected(parameters, *batch):
        found = gradients(loss, parameters, batch)
        norms = squared_norms(found)
        total = jnp.sqrt(sum(jax.tree.leaves(norms)))
        bound = jnp.median(total)
        return norms, total, bound, clipped(found, total, bound)

    norms, total, bound, of_all = expected(parameters, *batch)
    found = jax.jit(squared_grad_norms(loss, batch_argnums=places))(parameters, *batch)
    check_close(found, norms, tolerance, jnp.max(total) ** 2)
    options = {"batch_argnums": places, "l2_clip_norm": float(bound)}
    for passes in 1, 2:
        grad = clipped_grad(loss, return_grad_norms=True, passes=passes, **options)
        found, examples = jax.jit(grad)(parameters, *batch)
        check_close(found, of_all, tolerance, jnp.max(total))
        check_close(examples.grad_norms, total, tolerance, 0)


@pytest.mark.parametrize("name", BASIC)
def test_gradients_are_those_of_vmap_of_grad(name):
    check_model(name)


def test_no_weight_gradient_of_an_example_is_made():
    def step(parameters, x):
        return jnp.mean(linear(jnp.tanh(linear(x, *parameters)), *parameters) ** 2)

    examples, width = 64, 128
    parameters, x = (drawn(width, width), drawn(width)), drawn(examples, width)
    for passes in 1, 2:
        grad = clipped_grad(step, l2_clip_norm=1.0, passes=passes)
        program = jax.jit(grad).lower(parameters, x).compile()
        temporaries = program.memory_analysis().temp_size_in_bytes
        assert temporaries < examples * width * width * 4 / 8


def test_an_example_of_nan_or_of_padding_contributes_nothing():
    loss, parameters, (x,) = of_mlp(3)
    rest, options = x[2:], {"l2_clip_norm": 0.1, "return_values": True}
    is_padding = jnp.arange(BATCH) == 1
    for passes in 1, 2:
        grad = jax.jit(clipped_grad(loss, passes=passes, **options))
        expected, _ = grad(parameters, rest)
        for bad in jnp.nan, jnp.inf:
            found, examples = grad(
                parameters, x.at[0, 1, 2].set(bad), is_padding_example=is_padding
            )
            check_close(found, expected, 1e-6, 1)
            # tanh makes infinity 1, but not its gradient.
            assert np.isfinite(examples.values).tolist() == [bad == jnp.inf] + 4 * [
                True
            ]
        none, _ = grad(parameters, x.at[:, 1, 2].set(jnp.nan))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))


def test_arguments_are_those_of_jax_privacy():
    def loss(first, x, second, *, factor):
        y = linear(x, first) + second
        assert x.ndim == 1
        return factor * jnp.sum(y**2), {"y": y}

    weight, bias = drawn(3, 4), drawn(3)
    x, bound = drawn(BATCH, 4, scale=1), 0.2
    grad = clipped_grad(
        loss,
        (0, 2),
        has_aux=True,
        l2_clip_norm=bound,
        normalize_by=BATCH,
        keep_batch_dim=False,
        return_values=True,
        return_grad_norms=True,
    )
    found, examples = jax.jit(grad, static_argnames="factor")(weight, x, bias, factor=2)
    each = [
        jax.value_and_grad(loss, (0, 2), has_aux=True)(weight, one, bias, factor=2)
        for one in x
    ]
    values, grads = zip(*each, strict=True)
    grads = jax.tree.map(lambda *a: jnp.stack(a), *grads)
    norms = jnp.sqrt(sum(jax.tree.leaves(squared_norms(grads))))
    expected = jax.tree.map(lambda a: a / BATCH, clipped(grads, norms, bound))
    check_close(found, expected, 1e-6, 1)
    check_close(examples.grad_norms, norms, 1e-6, 1)
    check_close(examples.values, jnp.stack([value for value, _ in values]), 1e-6, 1)
    check_close(examples.aux["y"], jnp.stack([aux["y"] for _, aux in values]), 1e-6, 1)


def test_infinite_bound_clips_nothing_and_zero_everything():
    loss, parameters, batch = of_mlp()
    grad = functools.partial(clipped_grad, loss)
    whole = grad(l2_clip_norm=jnp.inf, normalize_by=BATCH)(parameters, *batch)
    check_close(whole, jax.grad(loss)(parameters, *batch), 1e-5, 1)
    nothing = grad(l2_clip_norm=0.0)(parameters, *batch)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_noise_is_that_of_float64():
    loss, parameters, batch = of_mlp()
    grad = clipped_grad(
        loss, l2_clip_norm=jnp.inf, normalize_by=BATCH, return_grad_norms=True
    )
    mean, examples = grad(parameters, *batch)
    noise = gradient_noise(mean, examples.grad_norms**2)
    each = jax.tree.leaves(gradients(loss, parameters, batch))
    each = np.concatenate([np.float64(g).reshape(BATCH, -1) for g in each], axis=1)
    variance = np.var(each, axis=0, ddof=1).sum()
    squared_norm = (each.mean(0) ** 2).sum() - variance / BATCH
    np.testing.assert_allclose(noise.variance, variance, rtol=1e-5)
    np.testing.assert_allclose(noise.squared_norm, squared_norm, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(noise.scale, variance / squared_norm, rtol=1e-4)


def test_examples_of_all_devices_are_counted_inside_shard_map():
    loss, parameters, _ = of_mlp()
    x = drawn(16, 8, scale=1)
    options = {"l2_clip_norm": 0.1, "return_grad_norms": True}
    for passes in 1, 2:
        grad = clipped_grad(loss, passes=passes, **options)

        def on_device(parameters, x, grad=grad):
            found, examples = grad(parameters, x)
            return found, examples.grad_norms

        found, norms = jax.jit(
            jax.shard_map(
                on_device,
                mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
                in_specs=(P(), P("data")),
                out_specs=(P(), P("data")),
            )
        )(parameters, x)
        expected, examples = jax.jit(grad)(parameters, x)
        check_close(found, expected, 1e-6, 1)
        check_close(norms, examples.grad_norms, 1e-6, 1)


def weight_loss(weight, x):
    return jnp.sum(linear(x, weight))


WRONG = {  # What is called, and the error.
    "batch_argnums, none": (
        lambda: squared_grad_norms(weight_loss, batch_argnums=()),
        (ValueError, "`batch_argnums` must be other arguments than `argnums`"),
    ),
    "batch_argnums, the parameters": (
        lambda: clipped_grad(weight_loss, batch_argnums=0, l2_clip_norm=1),
        (ValueError, "`batch_argnums` must be other arguments than `argnums`"),
    ),
    "argnums, twice": (
        lambda: squared_grad_norms(weight_loss, (0, 0)),
        (ValueError, "each of them once and of both at least one"),
    ),
    "argnums, no array": (
        lambda: squared_grad_norms(weight_loss)({}, drawn(4, 3)),
        (ValueError, "the arguments of `argnums` must have an array"),
    ),
    "batch_argnums, not there": (
        lambda: squared_grad_norms(weight_loss, batch_argnums=2)(*matrices()),
        (ValueError, "must be places of the positional arguments, 0 to 1, got 2"),
    ),
    "l2_clip_norm": (
        lambda: clipped_grad(weight_loss, l2_clip_norm=-1.0),
        (ValueError, "`l2_clip_norm` must be 0 or more, got -1.0"),
    ),
    "l2_clip_norm, NaN": (
        lambda: clipped_grad(weight_loss, l2_clip_norm=float("nan")),
        (ValueError, "`l2_clip_norm` must be 0 or more, got nan"),
    ),
    "normalize_by": (
        lambda: clipped_grad(weight_loss, l2_clip_norm=1.0, normalize_by=0),
        (ValueError, "`normalize_by` must be greater than 0, got 0"),
    ),
    "passes": (
        lambda: clipped_grad(weight_loss, l2_clip_norm=1.0, passes=3),
        (ValueError, "`passes` must be 1 or 2, got 3"),
    ),
    "no examples' axis": (
        lambda: squared_grad_norms(weight_loss)(drawn(2, 3), jnp.float32(1)),
        (ValueError, "the arrays of `batch_argnums` must have the same first axis"),
    ),
    "numbers of examples": (
        lambda: squared_grad_norms(weight_loss)(
            drawn(2, 3), {"a": drawn(4, 3), "b": drawn(5, 3)}
        ),
        (ValueError, r"must have the same first axis.* got shapes \(4, 3\), \(5, 3\)"),
    ),
    "no examples": (
        lambda: squared_grad_norms(weight_loss)(drawn(2, 3), drawn(0, 3)),
        (ValueError, "`batch_argnums` must have one example at least"),
    ),
    "no array": (
        lambda: squared_grad_norms(weight_loss)(drawn(2, 3), {}),
        (ValueError, "the arguments of `batch_argnums` must have an array"),
    ),
    "integers": (
        lambda: squared_grad_norms(weight_loss)(
            {"a": [jnp.ones(2, "int32")]}, drawn(4, 3)
        ),
        (TypeError, r"`argnums` must be real and floating, got int32 at \['a'\]\[0\]"),
    ),
    "complex": (
        lambda: squared_grad_norms(weight_loss)(
            drawn(2, 3).astype("complex64"), drawn(4, 3)
        ),
        (TypeError, "must be real and floating, got complex64 at their root"),
    ),
    "losses": (
        lambda: squared_grad_norms(lambda w, x: linear(x, w)[:, 0])(*matrices()),
        (
            TypeError,
            r"`fun` must return a real scalar for one example, got float32\[1\]",
        ),
    ),
    "no pair": (
        lambda: clipped_grad(weight_loss, has_aux=True, l2_clip_norm=1.0)(*matrices()),
        (TypeError, "`fun` must return a pair with `has_aux`, got "),
    ),
    "padding": (
        lambda: clipped_grad(weight_loss, l2_clip_norm=1.0)(
            *matrices(), is_padding_example=jnp.zeros(3, bool)
        ),
        (ValueError, r"`is_padding_example` must be booleans \(4,\).*got bool\[3\]"),
    ),
    "one example": (
        lambda: gradient_noise(drawn(2), jnp.ones(1)),
        (ValueError, r"`squared_norms` must be those of two examples or more.*\(1,\)"),
    ),
}


def matrices():
    return drawn(2, 3), drawn(4, 3)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    call, (kind, message) = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_parameter_that_is_split_as_the_examples_are_is_refused():
    norms = jax.shard_map(
        lambda w, x: squared_grad_norms(weight_loss)(w, x),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    with pytest.raises(ValueError, match="the parameters must not vary over an axis"):
        norms(drawn(8, 3), drawn(8, 3))


def test_result_has_the_dtypes_of_the_parameters():
    parameters = jax.tree.map(lambda a: a.astype("bfloat16"), mlp_parameters())
    loss, _, (x,) = of_mlp()
    for passes in 1, 2:
        grad = clipped_grad(loss, l2_clip_norm=1.0, passes=passes)(
            parameters, x.astype("bfloat16")
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(grad)} == {jnp.dtype("bfloat16")}
    norms = squared_grad_norms(loss)(parameters, x.astype("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(norms)} == {jnp.dtype("float32")}


def test_names_of_the_package():
    for name in "clipped_grad", "squared_grad_norms", "gradient_noise":
        assert getattr(jaxlinear, name).__module__ == "jaxlinear._examples.functions"
