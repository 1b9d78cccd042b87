"""What `jax.vmap` makes of a linear map where the axis is not one more leading axis.

The map stays one map, with a level for each `jax.vmap` around it, the innermost first.
Its value is ``apply`` under as many `jax.vmap`. Its transpose is that of each operand:
mapped where the operand is, and contracted, not added up, where only the residual is.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear._product import accumulator


class Level(NamedTuple):
    """One `jax.vmap`, over the first axis of the arguments with a 0 in ``axes``."""

    axes: tuple[int | None, ...]  # of every residual and operand, there or not
    axis_size: int
    spmd_axis_name: Any

    def mapped(self, function, in_axes):
        size, name = self.axis_size, self.spmd_axis_name
        return jax.vmap(function, in_axes, axis_size=size, spmd_axis_name=name)


def depth(levels, slot):
    """Over how many axes a residual or operand is mapped."""
    return sum(level.axes[slot] == 0 for level in levels)


def to_axis(array, place, axis):
    return array if place is None else jnp.moveaxis(array, place, axis)


def mapped_over(levels, slots, function, copies=1):
    """``function`` of a list of the arguments in ``slots``, or of lists of them."""
    for level in levels:
        axes = [level.axes[slot] for slot in slots]
        axes = axes if copies == 1 else [axes] * copies
        function = level.mapped(function, (axes,))
    return function


def cotangents(wanted, G, residuals, kind, levels):
    """Those of the operands ``wanted``: all at once, or one by one where mapped."""
    if levels:
        return {k: _cotangent(k, G, residuals, kind, levels) for k in wanted}
    every = kind.transpose(kind.statics, residuals, G)
    return {k: every[k] for k in wanted}


def _cotangent(k, G, residuals, kind, levels):
    """The cotangent of operand ``k``: an array for each element that it has."""
    read, cotangent_axis = kind.terms[k]

    def product(residual, G):
        alone = [residual if r == read else None for r in range(len(residuals))]
        return kind.transpose(kind.statics, alone, G)[k]

    def is_contracted(level):
        return level.axes[len(residuals) + k] is None and level.axes[read] == 0

    for number, level in enumerate(levels):
        in_residual = read is not None and level.axes[read] == 0
        if level.axes[len(residuals) + k] == 0:
            product = level.mapped(product, (0 if in_residual else None, 0))
        elif read is None:
            product = _contracted(product, None, number)
        elif in_residual:
            # Behind the axes of the inner levels, and before those of the outer ones.
            outer = sum(map(is_contracted, levels[number + 1 :]))
            place = cotangent_axis - outer if cotangent_axis else number
            product = _contracted(product, depth(levels[:number], read), place)
        else:
            product = _of_the_sum(product)
    return product(None if read is None else residuals[read], G)


def _contracted(product, residual_axis, cotangent_axis):
    def of_one_more_axis(residual, G):
        if residual is not None:
            to = partial(jnp.moveaxis, source=0, destination=residual_axis)
            residual = jax.tree.map(to, residual)
        return product(residual, jnp.moveaxis(G, 0, cotangent_axis))

    return of_one_more_axis


def _of_the_sum(product):
    def of_sum(residual, G):
        return product(residual, jnp.sum(G, 0, dtype=accumulator(G.dtype)))

    return of_sum
