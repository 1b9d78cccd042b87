"""What a cotangent must look like: its dtype, manual axes and sharding."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ArrayType:
    """What a product must return, and how it gets there.

    ``reduce_dtype`` is the dtype in which the product leaves its accumulator, and so
    the one in which XLA adds the partial sums of several devices. ``sharding`` is None
    where the mesh has no explicit axes.
    """

    dtype: jnp.dtype
    reduce_dtype: jnp.dtype
    sharding: NamedSharding | PartitionSpec | None


def is_traced_with_explicit_axes(array):
    return isinstance(array, Tracer) and _has_explicit_axes(
        jax.typeof(array).sharding.mesh
    )


def _has_explicit_axes(mesh):
    return AxisType.Explicit in mesh.axis_types


def accumulator(dtype):
    """The dtype in which sums of ``dtype`` are accumulated: float32 at least."""
    return jnp.dtype("float32") if jnp.finfo(dtype).bits < 32 else dtype


def output_type(compute_dtype, reduce_dtype, bias, out_sharding):
    """The type of Y, which the product rounds unless there is a bias to be added."""
    default = compute_dtype if bias is None else accumulator(compute_dtype)
    return ArrayType(compute_dtype, reduce_dtype or default, out_sharding)


def cotangent_type(primal, compute_dtype, reduce_dtype):
    """The type that the cotangent of ``primal`` must have; None for None."""
    if primal is None:
        return None
    aval = jax.typeof(primal).to_ct_aval()
    same = aval.dtype == compute_dtype  # Else the product must not round it first.
    default = compute_dtype if same else accumulator(compute_dtype)
    mesh, spec = aval.sharding.mesh, aval.sharding.spec
    if mesh.empty:  # An array made before the mesh was set is replicated over it.
        mesh = jax.sharding.get_abstract_mesh()
    sharding = NamedSharding(mesh, spec) if _has_explicit_axes(mesh) else None
    return ArrayType(aval.dtype, reduce_dtype or default, sharding)


def round_to(dtype, cotangent):
    """``cotangent`` in ``dtype``: for a real dtype, the real part of a complex one."""
    if jnp.issubdtype(dtype, jnp.floating):
        cotangent = cotangent.real
    return cotangent.astype(dtype)


def vary_together(*operands):
    """Cast the operands, where not None, to vary over the manual axes of them all.

    JAX transposes the cast into the sum of a cotangent over the axes of
    ``jax.shard_map`` along which its primal does not vary.
    """
    varying = [
        jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(operands)
    ]
    axes = frozenset().union(*varying)

    def cast(a):
        missing = axes - jax.typeof(a).manual_axis_type.varying
        return lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a

    return jax.tree.map(cast, operands)
