"""Run a row with a layer, and compare with the naive formula in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest
from oracle import naive, random_problem, relative_error, wide
from transformations import (
    batching,
    forward_mode,
    last_layer,
    memory,
    programs,
    reverse_mode,
    sharding,
    solvers,
    values,
    vjp_objects,
)

TOPICS = {
    "Reverse mode": reverse_mode,
    "VJP objects": vjp_objects,
    "Forward mode": forward_mode,
    "Solvers": solvers,
    "`vmap`": batching,
    "Memory and operations of `vmap`": memory,
    "Programs": programs,
    "Values and settings": values,
    "Loss of a last layer": last_layer,
    "Sharding": sharding,
}


# What these ask of a VJP object came with JAX 0.11.1.
NEWER = {"saveable_args", "saveable_args_under_checkpoint", "in_nzs", "with_logs"}

# What is kept in 8 bits has no room for a tangent.
SECOND_ORDER = {
    "hessian_vector_product_forward_over_reverse",
    "hessian_vector_product_reverse_over_reverse",
    "hessian_vector_product_reverse_over_forward",
    "hessian_vector_product_forward_over_forward",
    "jacfwd_of_jacfwd",
    "jacrev_of_jacfwd",
    "hessian_of_a_loss",
    "third_derivative_in_three_modes",
    "jvp_under_each_checkpoint_policy",
    "exported_with_symbolic_leading_axes",  # Each gradient also has a derivative.
}
TOLERANCES = {
    "bfloat16": 8 * float(jnp.finfo("bfloat16").eps),
    "float8": 0.25,
    "int8": 0.06,
}


def rows_of(module):
    return [
        function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
        and name != "check"
    ]


ROWS = {row.__name__: row for module in TOPICS.values() for row in rows_of(module)}


def applies(row, name):
    """Whether a row is also one for a layer of few bits.

    There is no complex bfloat16, and on CPU a product of few bits returns float32,
    whether it is mapped or not. The loss of few bits has tests of its own.
    """
    of_wide = [memory.__name__, last_layer.__name__]
    is_wide = row is values.complex_numbers or row.__module__ in of_wide
    return not (is_wide and name in TOLERANCES)


def _arrays():
    return random_problem((8, 3), 16, 8, "float32")[:3]


@functools.cache
def _expected(row):
    with jax.enable_x64(True):
        arrays = [a.astype("float64") for a in _arrays()]
        return [wide(a) for a in jax.tree.leaves(row(naive, *arrays))]


def check(row, name, layer):
    """Raise what the row raises, or an AssertionError for a wrong value.

    Float32 sums of up to 200 terms, a few in a row, are good to 64 eps, and the result
    is rounded to its dtype; with bfloat16 operands, each rounded once, a few products
    in a row are good to 8 eps. Sums so short are good to 0.25 in float8 and to 0.06 in
    int8: `test_eight_bits.py` has the figures of one product.
    """
    if row.__name__ in NEWER and jax.__version_info__ < (0, 11, 1):
        pytest.skip("needs JAX 0.11.1")
    if row.__name__ in SECOND_ORDER and name in ("float8", "int8"):
        with pytest.raises(TypeError, match="has no second derivative"):
            row(layer, *_arrays())
        return
    if row.__module__ == memory.__name__:
        memory.check(row, layer)
        return
    actual = jax.tree.leaves(row(layer, *_arrays()))
    for ours, exact in zip(actual, _expected(row), strict=True):
        eps = float(jnp.finfo(ours.dtype).eps)
        tolerance = 64 * min(eps, float(jnp.finfo("float32").eps)) + eps
        tolerance = max(tolerance, TOLERANCES.get(name, 0))
        assert ours.shape == exact.shape
        assert relative_error(ours, exact) < tolerance, "wrong value"


def outcome(row, name, layer):
    """The text of a cell."""
    try:
        check(row, name, layer)
    except AssertionError as error:
        return f"✗ {error}".split("\n")[0]
    except Exception as error:  # Whatever a peer raises is what the page is to say.
        return f"✗ {type(error).__name__}"
    return "✓"
