"""The layer over several axes at once, such as a projection of an attention.

A weight (*out, *in) has the contracted axes last. So in memory it is a matrix (out, in)
whose rows and columns have several indices, and reshaping it moves no value.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear._flax.checks import as_tuple
from jaxlinear._linear import linear


def linear_over_axes(x, weight, bias, axis, *, out_sharding=None, **options):
    """Y = X Wᵀ + B, contracting the axes ``axis`` of x, in ascending order.

    Args:
      x: input, whose axes ``axis`` have the sizes in.
      weight: (*out, *in), where *in are as many axes as ``axis`` has.
      bias: (*out,), or None.
      axis: an integer, or a tuple of them.
      out_sharding: sharding of Y on a mesh with explicit axes.
      **options: as in :func:`jaxlinear.linear`.

    Returns:
      Y (*, *out), where ``*`` are the other axes of x.
    """
    if axis == -1 and weight.ndim == 2:
        return linear(x, weight, bias, out_sharding=out_sharding, **options)
    axis = as_tuple(axis)
    out_shape, in_shape = weight.shape[: -len(axis)], weight.shape[-len(axis) :]
    in_axes = checked_axes(x, axis, in_shape)
    x = jnp.moveaxis(x, in_axes, range(-len(axis), 0))  # (*, *in)
    leading = x.shape[: -len(axis)]
    size = math.prod(in_shape)
    Y = linear(
        x.reshape(*leading, size),
        weight.reshape(math.prod(out_shape), size),
        None if bias is None else bias.reshape(-1),
        out_sharding=_matrix_sharding(out_sharding, len(leading)),
        **options,
    )  # (*, out)
    return lax.reshape(Y, (*leading, *out_shape), out_sharding=out_sharding)


def checked_axes(x, axis, sizes=None):
    """``axis`` of x as indices in ascending order, of axes that have these sizes."""
    if x.ndim < len(axis) or not all(-x.ndim <= one < x.ndim for one in axis):
        raise ValueError(f"`x` must have the axes {axis}, got shape {x.shape}")
    axes = sorted(one % x.ndim for one in axis)
    if len(set(axes)) < len(axes):
        raise ValueError(f"`axis` must not name an axis twice, got {axis}")
    if sizes is not None and [x.shape[one] for one in axes] != [*sizes]:
        raise ValueError(
            f"`x` must have in_features {tuple(sizes)} along its axes {axis}, got shape"
            f" {x.shape}"
        )
    return axes


def _matrix_sharding(sharding, leading):
    """The sharding of Y (*, out), whose last axis is split as the first of *out."""
    if sharding is None:
        return None
    if isinstance(sharding, NamedSharding):
        return sharding.update(spec=_matrix_sharding(sharding.spec, leading))
    return PartitionSpec(*sharding[: leading + 1])
