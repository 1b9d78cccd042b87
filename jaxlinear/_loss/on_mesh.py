"""The loss on a mesh with explicit axes: each device walks over blocks of its own."""

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlinear._loss.layout import Layout


def on_mesh(function, h, weight, bias, labels, weights, spec, mesh, *, sums):
    """``function`` of the arrays and ``spec``, with each device's rows and classes.

    Its results are split as the rows are, or with ``sums`` are summed over all devices.
    """
    layout = Layout.of(_split(h), _split(weight))

    def put(array, spec):
        if array is None:
            return None
        return jax.sharding.reshard(array, NamedSharding(mesh, spec))

    arrays = (
        put(h, layout.of_h),
        put(weight, layout.of_weight),
        put(bias, layout.of_bias),
        put(labels, layout.of_rows),
        put(weights, layout.of_rows),
    )

    def of_device(h, weight, bias, labels, weights):
        weight, bias = layout.gathered(weight, bias)
        own = spec._replace(axes=layout.split_classes)
        found = function(h, weight, bias, labels, weights, own)
        return lax.psum(found, layout.row_axes) if sums and layout.row_axes else found

    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    mapped = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=jax.tree.map(lambda a: jax.typeof(a).sharding.spec, arrays),
        out_specs=P() if sums else layout.of_rows,
        axis_names={name for name, kind in kinds if kind is AxisType.Explicit},
    )
    return mapped(*arrays)


def _split(array):
    return jax.typeof(array).sharding.spec.partitions
