"""Run a row with a layer, and compare with the naive formula in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
from oracle import naive, random_problem, relative_error, wide
from table import (
    batching,
    forward_mode,
    memory,
    programs,
    reverse_mode,
    sharding,
    solvers,
    values,
)

TOPICS = {
    "Reverse mode": reverse_mode,
    "Forward mode": forward_mode,
    "Solvers": solvers,
    "`vmap`": batching,
    "Memory and operations of `vmap`": memory,
    "Programs": programs,
    "Values and settings": values,
    "Sharding": sharding,
}


# There is no complex bfloat16.
NOT_APPLICABLE = {("complex_numbers", "`linear`, bfloat16")}
# On CPU a product of bfloat16 leaves in float32, whether it is mapped or not.
NOT_APPLICABLE |= {
    (row, "`linear`, bfloat16") for row, function in vars(memory).items()
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
    in a row are good to 8 eps.
    """
    if row.__module__ == memory.__name__:
        memory.check(row, layer)
        return
    actual = jax.tree.leaves(row(layer, *_arrays()))
    for ours, exact in zip(actual, _expected(row), strict=True):
        eps = float(jnp.finfo(ours.dtype).eps)
        tolerance = 64 * min(eps, float(jnp.finfo("float32").eps)) + eps
        if "bfloat16" in name:
            tolerance = max(tolerance, 8 * float(jnp.finfo("bfloat16").eps))
        assert ours.shape == exact.shape
        assert relative_error(ours, exact) < tolerance, "wrong value"


def outcome(row, name, layer):
    """The text of a cell."""
    if (row.__name__, name) in NOT_APPLICABLE:
        return "–"
    try:
        check(row, name, layer)
    except AssertionError as error:
        return f"✗ {error}".split("\n")[0]
    except Exception as error:  # Whatever a peer raises is what the table is to say.
        return f"✗ {type(error).__name__}"
    return "✓"
