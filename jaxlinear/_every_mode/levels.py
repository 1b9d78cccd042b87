"""`jax.vmap` around an op or its tangent.

A mapped axis becomes one more leading axis where everything that has leading axes is
mapped, and nothing else. Otherwise the equation stays one equation, with a level for
each `jax.vmap` around it, the innermost first. Its value is that of a function under as
many `jax.vmap`. Its transpose is the backward rule, mapped or contracted.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Term(NamedTuple):
    """What the cotangent of an argument reads of the residuals.

    Attributes:
      residual: the name of the one residual that it reads, or None.
      contracted: where the backward rule gets an axis of G over which it sums: 0, or
        negative, from the end. The residual has that axis first; without a residual it
        is 0. If the residual is not mapped, G is summed before, in float32 at least.
    """

    residual: str | None
    contracted: int


class Level(NamedTuple):
    """One `jax.vmap`, over the first axis of the arrays with a 0 in ``axes``."""

    axes: tuple[int | None, ...]
    axis_size: int
    axis_name: Any
    spmd_axis_name: Any

    def mapped(self, function, in_axes):
        names = {"axis_name": self.axis_name, "spmd_axis_name": self.spmd_axis_name}
        return jax.vmap(function, in_axes, axis_size=self.axis_size, **names)


def under_levels(levels, function, copies=1):
    """``function`` of a list of all arrays, or of several such lists."""
    for level in levels:
        axes = [*level.axes]
        axes = axes if copies == 1 else [axes] * copies
        function = level.mapped(function, (axes,))
    return function


def batched(axis, arrays, places, has_leading_axes, levels):
    """The arrays and the levels under one more `jax.vmap`, and where results have it.

    ``places`` are the mapped axes of the arrays, or None, and ``has_leading_axes`` says
    of every array whether it has the leading axes of the result.
    """
    mapped = [place is not None for place in places]
    if not any(mapped):
        return arrays, levels, None
    if mapped == has_leading_axes:
        # Behind the axes of the levels, which are the first.
        new = [_depth(levels, k) for k in range(len(arrays))]
        place = len(levels)
    else:
        new, place = [0] * len(arrays), 0
        axes = tuple(0 if is_mapped else None for is_mapped in mapped)
        levels = (*levels, Level(axes, axis.size, axis.name, axis.spmd_name))
    moved = [
        array if old is None else jnp.moveaxis(array, old, to)
        for array, old, to in zip(arrays, places, new, strict=True)
    ]
    return moved, levels, place


def _depth(levels, k):
    """Over how many axes array ``k`` is mapped."""
    return sum(level.axes[k] == 0 for level in levels)


def mapped_cotangents(backward, wanted, residuals, G, levels):
    """The cotangents of operands, from ``backward(residuals, G)`` for each element.

    The residuals are the first arrays, and ``wanted`` are the places of the operands
    among the arrays and in the tuple of cotangents. Where an operand is not mapped,
    elements are summed, in float32 at least.
    """

    def of_wanted(residuals, G):
        every = backward(residuals, G)
        return {k: every[k] for k in wanted}

    for level in levels:
        axes = [*level.axes[: len(residuals)]]
        shared = {k for k, place in wanted.items() if level.axes[place] is None}
        of_wanted = _summed(level.mapped(of_wanted, (axes, 0)), shared)
    return of_wanted(residuals, G)


def _summed(backward, shared):
    def summed(residuals, G):
        found = backward(residuals, G)
        return {
            k: jax.tree.map(_sum, c) if k in shared else c for k, c in found.items()
        }

    return summed


def contracted_cotangent(backward, place, reads, contracted, residuals, G, levels):
    """The cotangent of one operand, from ``backward(residuals, G)`` that contracts.

    ``place`` is the operand's among the arrays. ``residuals`` are the arrays of the one
    residual that it reads, at the places ``reads``, all mapped at the same levels.
    """
    for number, level in enumerate(levels):
        axes = [level.axes[k] for k in reads]
        if level.axes[place] == 0:
            backward = level.mapped(backward, (axes, 0))
        elif not reads:
            backward = _contracted(backward, 0, number)
        elif 0 not in axes:
            backward = _of_the_sum(backward)
        else:
            # Behind the axes of the inner levels, and before those of the outer ones.
            outer = sum(
                outer.axes[place] is None and outer.axes[reads[0]] == 0
                for outer in levels[number + 1 :]
            )
            to = contracted - outer if contracted else number
            inner = _depth(levels[:number], reads[0])
            backward = _contracted(backward, inner, to)
    return backward(residuals, G)


def _contracted(backward, residual_axis, cotangent_axis):
    """``backward`` that sums over a first axis of its arguments, moved elsewhere."""

    def of_one_more_axis(residuals, G):
        to = partial(jnp.moveaxis, source=0, destination=residual_axis)
        residuals = jax.tree.map(to, residuals)
        to = partial(jnp.moveaxis, source=0, destination=cotangent_axis)
        return backward(residuals, jax.tree.map(to, G))

    return of_one_more_axis


def _of_the_sum(backward):
    return lambda residuals, G: backward(residuals, jax.tree.map(_sum, G))


def _sum(array):
    """The sum over the first axis, in float32 at least."""
    is_low = jnp.finfo(array.dtype).bits < 32
    return jnp.sum(array, 0, dtype=jnp.float32 if is_low else array.dtype)
