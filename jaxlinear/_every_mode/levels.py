"""`jax.vmap` around an op or its tangent.

A mapped axis becomes one more leading axis where everything that has leading axes is
mapped, and nothing else. Otherwise the equation stays one equation, with a level for
each `jax.vmap` around it, the innermost first. Its value is that of a function under as
many `jax.vmap`. Its transpose is made operand by operand.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Term(NamedTuple):
    """What the cotangent of an argument reads of the residuals.

    Attributes:
      residual: the name of the one residual that it reads, or None.
      contracted: how the backward rule sums over an axis that is mapped, but not in the
        argument. The residual, if there is one, then has that axis first, and the
        cotangent of the result has it here. None: the backward rule is mapped, and its
        results are summed.
    """

    residual: str | None
    contracted: int | None = None


class Level(NamedTuple):
    """One `jax.vmap`, over the first axis of the arrays in the slots with a 0."""

    axes: tuple[int | None, ...]  # of every slot, filled or not
    axis_size: int
    spmd_axis_name: Any

    def mapped(self, function, in_axes):
        size, name = self.axis_size, self.spmd_axis_name
        return jax.vmap(function, in_axes, axis_size=size, spmd_axis_name=name)


def under_levels(levels, slots, function, copies=1):
    """``function`` of a list of the arrays in ``slots``, or of several such lists."""
    for level in levels:
        axes = [level.axes[slot] for slot in slots]
        axes = axes if copies == 1 else [axes] * copies
        function = level.mapped(function, (axes,))
    return function


def batched(axis, arrays, places, slots, has_leading_axes, levels):
    """The arrays and the levels under one more `jax.vmap`, and where results have it.

    ``places`` are the mapped axes of the arrays, or None, and ``has_leading_axes`` says
    of every slot whether it has the leading axes of the result.
    """
    mapped = {s for s, p in zip(slots, places, strict=True) if p is not None}
    if not mapped:
        return arrays, levels, None
    if mapped == {slot for slot in slots if has_leading_axes[slot]}:
        # Behind the axes of the levels, which are the first.
        new = [_depth(levels, slot) for slot in slots]
        place = len(levels)
    else:
        new, place = [0] * len(slots), 0
        axes = tuple(0 if s in mapped else None for s in range(len(has_leading_axes)))
        levels = (*levels, Level(axes, axis.size, axis.spmd_name))
    moved = [
        array if old is None else jnp.moveaxis(array, old, to)
        for array, old, to in zip(arrays, places, new, strict=True)
    ]
    return moved, levels, place


def _depth(levels, slot):
    """Over how many axes the array in a slot is mapped."""
    return sum(level.axes[slot] == 0 for level in levels)


def cotangent(backward, slot, read, contracted, residuals, G, levels):
    """The cotangent of the operand in ``slot``, by ``backward(residuals, G)``.

    The residuals are in the first slots, and ``read`` are the slots of those that the
    backward rule reads for it. Where elements are summed, it has float32 at least.
    """
    only = [r if k in read else None for k, r in enumerate(residuals)]

    for number, level in enumerate(levels):
        axes = [level.axes[k] if k in read else None for k in range(len(residuals))]
        if level.axes[slot] == 0:
            backward = level.mapped(backward, (axes, 0))
        elif contracted is not None and not read:
            backward = _contracted(backward, 0, number)
        elif 0 not in axes:
            backward = _of_the_sum(backward)
        elif contracted is None:
            backward = _summed(level.mapped(backward, (axes, 0)))
        else:
            # Behind the axes of the inner levels, and before those of the outer ones.
            (residual,) = read
            outer = sum(
                outer.axes[slot] is None and outer.axes[residual] == 0
                for outer in levels[number + 1 :]
            )
            place = contracted - outer if contracted else number
            inner = _depth(levels[:number], residual)
            backward = _contracted(backward, inner, place)
    return backward(only, G)


def _contracted(backward, residual_axis, cotangent_axis):
    """``backward`` that sums over a first axis of its arguments, moved elsewhere."""

    def of_one_more_axis(residuals, G):
        to = partial(jnp.moveaxis, source=0, destination=residual_axis)
        residuals = jax.tree.map(to, residuals)
        to = partial(jnp.moveaxis, source=0, destination=cotangent_axis)
        return backward(residuals, jax.tree.map(to, G))

    return of_one_more_axis


def _summed(backward):
    return lambda residuals, G: jax.tree.map(_sum, backward(residuals, G))


def _of_the_sum(backward):
    return lambda residuals, G: backward(residuals, jax.tree.map(_sum, G))


def _sum(array):
    """The sum over the first axis, in float32 at least."""
    is_low = jnp.finfo(array.dtype).bits < 32
    return jnp.sum(array, 0, dtype=jnp.float32 if is_low else array.dtype)
