"""The loss on a mesh with explicit axes: each device walks over blocks of its own."""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def on_mesh(function, h, weight, bias, labels, weights, spec, *, sums):
    """``function`` of the arrays and ``spec``, with each device's rows and classes.

    Its results are split as the rows are, or with ``sums`` are summed over all devices.
    A weight that is split over axes of the mesh that also split the rows is gathered,
    and its gradient is summed and scattered over them.
    """
    layout = _Layout.of(h, weight)
    rows = P(*layout.rows)
    classes = layout.gathered_classes or layout.split_classes or None
    h = layout.put(h, P(*layout.rows, None))
    weight = layout.put(weight, P(classes, layout.gathered_features or None))
    bias = layout.put(bias, P(classes))
    labels, weights = layout.put(labels, rows), layout.put(weights, rows)

    def of_device(h, weight, bias, labels, weights):
        weight = _gathered(weight, layout.gathered_features, 1)
        weight = _gathered(weight, layout.gathered_classes, 0)
        bias = _gathered(bias, layout.gathered_classes, 0)
        own = spec._replace(axes=layout.split_classes)
        found = function(h, weight, bias, labels, weights, own)
        return lax.psum(found, layout.row_axes) if sums and layout.row_axes else found

    arrays = h, weight, bias, labels, weights
    given = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, arrays)
    mapped = jax.shard_map(
        of_device,
        mesh=layout.mesh,
        in_specs=given,
        out_specs=P() if sums else rows,
        axis_names=layout.axes,
    )
    return mapped(*arrays)


class _Layout(NamedTuple):
    """The axes of the mesh that split the rows, and each axis of the weight."""

    mesh: Any
    rows: tuple[Any, ...]
    classes: tuple[str, ...]
    features: tuple[str, ...]

    @classmethod
    def of(cls, h, weight):
        *rows, _ = _axes(h)
        return cls(jax.typeof(weight).sharding.mesh, tuple(rows), *_axes(weight))

    @property
    def row_axes(self):
        return tuple(name for names in self.rows for name in names)

    @property
    def gathered_classes(self):
        """The axes of the classes, if the rows are split over all of them."""
        return self.classes if {*self.classes} <= {*self.row_axes} else ()

    @property
    def split_classes(self):
        """The axes over which the classes stay split."""
        return tuple(name for name in self.classes if name not in self.row_axes)

    @property
    def gathered_features(self):
        """The axes of the features, if the rows are split over all of them.

        Over others the weight is gathered before: its gradient is no sum over them.
        """
        return self.features if {*self.features} <= {*self.row_axes} else ()

    @property
    def axes(self):
        kinds = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return {name for name, kind in kinds if kind is AxisType.Explicit}

    def put(self, array, spec):
        if array is None:
            return None
        return jax.sharding.reshard(array, NamedSharding(self.mesh, spec))


def _axes(array):
    """For each axis of ``array`` the names of the axes of the mesh that split it."""
    spec = jax.typeof(array).sharding.spec.partitions
    spec = (*spec, *[None] * (array.ndim - len(spec)))
    return [() if n is None else (n,) if isinstance(n, str) else tuple(n) for n in spec]


def _gathered(array, names, axis):
    if array is None or not names:
        return array
    return lax.all_gather(array, names, axis=axis, tiled=True)
