"""The layer over several axes at once, as attention's projections are.

The axes of a weight (*out, *in) that are contracted are its last ones, so it is a
matrix (out, in) whose rows and columns have several indices: reading it as that matrix
moves no value.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear._arguments import as_tuple, checked_axes
from jaxlinear._linear import linear


def linear_over_axes(x, weight, bias, axis, *, out_sharding=None, **options):
    """Y = X Wᵀ + B, contracting the axes ``axis`` of x, in ascending order.

    Args:
      x: input, whose axes ``axis`` have the sizes in.
      weight: (*out, *in), with as many axes in as ``axis`` has.
      bias: (*out,), or None.
      axis: an integer, or a tuple of them.
      out_sharding: sharding of Y on a mesh with explicit axes.
      **options: those of :func:`jaxlinear.linear`.

    Returns:
      Y (*, *out), where ``*`` are the other axes of x.
    """
    if axis == -1 and weight.ndim == 2:
        return linear(x, weight, bias, out_sharding=out_sharding, **options)
    axis = as_tuple(axis)
    out_shape, in_shape = weight.shape[: -len(axis)], weight.shape[-len(axis) :]
    in_axes = checked_axes(x, axis, in_shape)
    x = jnp.moveaxis(x, in_axes, range(-len(axis), 0))
    leading = x.shape[: -len(axis)]
    size = math.prod(in_shape)
    Y = linear(
        x.reshape(*leading, size),
        weight.reshape(math.prod(out_shape), size),
        None if bias is None else bias.reshape(-1),
        out_sharding=_of_the_matrix(out_sharding, len(leading)),
        **options,
    )
    return lax.reshape(Y, (*leading, *out_shape), out_sharding=out_sharding)


def _of_the_matrix(out_sharding, leading):
    """The sharding of Y with one last axis, which is split as the first of several."""
    if isinstance(out_sharding, NamedSharding):
        return out_sharding.update(spec=_of_the_matrix(out_sharding.spec, leading))
    return out_sharding and PartitionSpec(*out_sharding[: leading + 1])
