"""Several devices: manual axes, explicit meshes, and the sharding of a cotangent."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlinear._op.by_platform import by_platform


class ArrayType(NamedTuple):
    """The dtype of a result, and its sharding, None on a mesh without explicit axes."""

    dtype: np.dtype
    sharding: NamedSharding | PartitionSpec | None


def cotangent_type(primal):
    """The type that the cotangent of ``primal`` must have."""
    aval = jax.typeof(primal).to_ct_aval()
    mesh, spec = aval.sharding.mesh, aval.sharding.spec
    if mesh.empty:  # An array made before the mesh was set is replicated over it.
        mesh = jax.sharding.get_abstract_mesh()
    sharding = NamedSharding(mesh, spec) if has_explicit_axes(mesh) else None
    return ArrayType(aval.dtype, sharding)


def is_traced_with_explicit_axes(array):
    return isinstance(array, Tracer) and has_explicit_axes(
        jax.typeof(array).sharding.mesh
    )


def has_explicit_axes(mesh):
    return AxisType.Explicit in mesh.axis_types


def broadcast_over_rows(vector, rows):
    """``vector`` for each element of the leading axes of ``rows``, (*, 0)."""
    shape, sharding = (*rows.shape[:-1], *vector.shape), jax.typeof(rows).sharding
    out_sharding = sharding if has_explicit_axes(sharding.mesh) else None
    return lax.broadcast_in_dim(
        vector, shape, (len(shape) - 1,), out_sharding=out_sharding
    )


def without_reduced_axes(array):
    """``array`` without the mark that its cotangent is to be left unreduced."""
    mesh, spec = jax.typeof(array).sharding.mesh, jax.typeof(array).sharding.spec
    if not spec.reduced:
        return array
    plain = PartitionSpec(*spec.partitions)
    return jax.sharding.reshard(array, NamedSharding(mesh, plain))


def sharded_as_factor(array, sharding):
    """``array`` resharded as a factor of an array that is split as ``sharding`` says.

    Axes of length one are not split.
    """
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    split = itertools.zip_longest(spec.partitions, array.shape)
    split = [None if n == 1 else names for names, n in split if n is not None]
    factor = PartitionSpec(*split, reduced=spec.unreduced)
    if isinstance(sharding, NamedSharding):
        factor = NamedSharding(sharding.mesh, factor)
    return jax.sharding.reshard(array, factor)


def rounded_over_devices(total, dtype):
    """``total``, a sum over several devices, with no more bits than ``dtype`` has."""
    return by_platform(_Rounded(dtype), total)


class _Rounded(NamedTuple):
    dtype: np.dtype

    platforms = ("tpu",)

    def plain(self, total):
        return total

    def on(self, platform, is_alone, total):
        if platform != "tpu":
            return total
        # XLA for TPUs moves a cast before the sum over the devices, even from behind a
        # barrier. This rounding stays where it is.
        bits = jnp.finfo(self.dtype)
        return lax.reduce_precision(total, bits.nexp, bits.nmant)
