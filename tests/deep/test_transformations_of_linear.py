"""Every cell of the page of transformations, and what its rows do not show of `linear`.

The layer and the naive formula pass everywhere, with the values of float64; the plain
`custom_vjp` does what the page says. The other layers are in `test_transformations.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import naive, random_problem, relative_error, wide
from transformations.layers import LAYERS, LINEAR, NAIVE, PLAIN
from transformations.measure import ROWS, TOPICS, check, outcome, rows_of
from transformations.page import in_words, recorded

from jaxlinear import linear


@pytest.mark.parametrize("row", ROWS)
def test_the_layer_passes(row):
    check(ROWS[row], LINEAR, LAYERS[LINEAR])


@pytest.mark.parametrize("row", ROWS)
def test_the_naive_formula_passes(row):
    check(ROWS[row], NAIVE, LAYERS[NAIVE])


@pytest.mark.parametrize("row", ROWS)
def test_a_plain_rule_does_what_the_page_says(row):
    assert outcome(ROWS[row], PLAIN, LAYERS[PLAIN]) == recorded()[in_words(row), PLAIN]


def test_no_row_has_the_name_of_another():
    assert len(ROWS) == sum(len(rows_of(module)) for module in TOPICS.values())


def test_the_page_has_every_row_and_no_failure_of_the_layer_or_the_naive_formula():
    cells = recorded()
    assert {row for row, _ in cells} == set(map(in_words, ROWS))
    assert {cells[row, c] for row, _ in cells for c in (LINEAR, NAIVE)} == {"✓"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient_through_a_scan_that_carries_a_bfloat16_weight(dtype):
    # A cotangent in another dtype than the weight's passes everywhere but here.
    *arguments, _ = random_problem((5,), 4, 4, "bfloat16")

    def gradients(layer):
        def loss(x, weight, bias):
            def step(carry, _):
                x, weight = carry
                Y = layer(x, weight, bias, dtype=dtype)
                return (jnp.tanh(Y).astype(x.dtype), weight), None

            (x, _), _ = lax.scan(step, (x, weight), length=3)
            return jnp.sum(x.astype("float32") ** 2)

        return jax.grad(loss, (0, 1, 2))(*arguments)

    tolerance = 4 * float(jnp.finfo("bfloat16").eps)
    for ours, expected in zip(gradients(linear), gradients(naive), strict=True):
        assert ours.dtype == "bfloat16"
        assert relative_error(ours, wide(expected)) < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_where_only_one_of_two_results_is_used(dtype):
    *arguments, _ = random_problem((5,), 4, 3, "float32")

    def gradients(layer):
        @jax.jit
        def two_results(x, weight, bias):
            return layer(x, weight, bias, dtype=dtype), jnp.sum(x**2)

        return jax.grad(lambda *a: two_results(*a)[1], (0, 1, 2))(*arguments)

    for ours, expected in zip(gradients(linear), gradients(naive), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_leak_checking_inside_shard_map():
    x, weight, bias, _ = random_problem((8,), 4, 2, "float32")

    def loss(x, weight, bias):
        return jnp.sum(linear(x, weight, bias) ** 2)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, whole = jax.P("data"), jax.P()
    mapped = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(data, whole, whole), out_specs=data
    )
    with jax.check_tracer_leaks(True):
        actual = jax.jit(mapped)(x, weight, bias)
    np.testing.assert_allclose(actual, 2 * naive(x, weight, bias) @ weight, rtol=1e-5)
