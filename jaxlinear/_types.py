"""What a cotangent must look like: its dtype, manual axes and sharding."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ProductType:
    """What a product multiplies, and what it must return.

    The operands are cast to ``operand_dtype`` and multiplied with ``precision``.
    ``reduce_dtype`` is the dtype in which the product leaves its accumulator, and so
    the one in which XLA adds the partial sums of several devices; the result is then
    rounded to ``dtype``; None is the best of the platform, for Y with a bias.
    ``sharding`` is None where the mesh has no explicit axes.
    """

    operand_dtype: jnp.dtype
    precision: lax.PrecisionLike
    reduce_dtype: jnp.dtype | None
    dtype: jnp.dtype
    sharding: NamedSharding | PartitionSpec | None
    has_alternative_float16: bool = False


def is_traced_with_explicit_axes(array):
    return isinstance(array, Tracer) and _has_explicit_axes(
        jax.typeof(array).sharding.mesh
    )


def _has_explicit_axes(mesh):
    return AxisType.Explicit in mesh.axis_types


def accumulator(dtype):
    """The dtype in which sums of ``dtype`` are accumulated: float32 at least."""
    return jnp.dtype("float32") if jnp.finfo(dtype).bits < 32 else dtype


def output_type(dtype, precision, reduce_dtype, bias, out_sharding):
    """The type of Y, which the product rounds unless there is a bias to be added."""
    is_rounded_later = bias is not None and dtype != accumulator(dtype)
    default = None if is_rounded_later else dtype
    reduce_dtype = _own_dtype(reduce_dtype, dtype) or default
    return ProductType(dtype, precision, reduce_dtype, dtype, out_sharding)


def cotangent_type(primal, backward_dtype, precision, reduce_dtype):
    """The type that the cotangent of ``primal`` must have; None for None."""
    if primal is None:
        return None
    operand_dtype, has_alternative_float16 = backward_dtype
    aval = jax.typeof(primal).to_ct_aval()
    same = aval.dtype == operand_dtype  # Else the product must not round it first.
    default = operand_dtype if same else accumulator(operand_dtype)
    mesh, spec = aval.sharding.mesh, aval.sharding.spec
    if mesh.empty:  # An array made before the mesh was set is replicated over it.
        mesh = jax.sharding.get_abstract_mesh()
    return ProductType(
        operand_dtype,
        precision,
        _own_dtype(reduce_dtype, operand_dtype) or default,
        aval.dtype,
        NamedSharding(mesh, spec) if _has_explicit_axes(mesh) else None,
        has_alternative_float16,
    )


def _own_dtype(reduce_dtype, operand_dtype):
    """``reduce_dtype`` if a product of these operands can leave its sum in it."""
    own = operand_dtype, accumulator(operand_dtype)
    return reduce_dtype if reduce_dtype in own else None


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
