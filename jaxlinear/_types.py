"""What a cotangent must look like: its dtype, manual axes and sharding."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ArrayType:
    """A dtype, and a sharding where the mesh has explicit axes."""

    dtype: jnp.dtype
    sharding: NamedSharding | PartitionSpec | None


def cotangent_type(primal):
    """The type that the cotangent of ``primal`` must have; None for None."""
    if primal is None:
        return None
    aval = jax.typeof(primal).to_ct_aval()
    mesh, spec = aval.sharding.mesh, aval.sharding.spec
    if mesh.empty:  # An array made before the mesh was set is replicated over it.
        mesh = jax.sharding.get_abstract_mesh()
    explicit = AxisType.Explicit in mesh.axis_types
    return ArrayType(aval.dtype, NamedSharding(mesh, spec) if explicit else None)


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
