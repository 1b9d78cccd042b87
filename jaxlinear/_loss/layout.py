"""How rows, classes and features are split over the axes of a mesh."""

from typing import NamedTuple

from jax import lax
from jax.sharding import PartitionSpec as P


class Layout(NamedTuple):
    """The axes of the mesh that split each leading axis of h and each of the weight.

    A weight whose classes or features are split over axes that also split the rows is
    gathered over them, and its gradient is summed and scattered. Over other axes the
    classes stay split, and the features do not: each of these devices computes all.
    """

    rows: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    features: tuple[str, ...]

    @classmethod
    def of(cls, h, weight):
        """Of what splits each axis of both, None or one name or several."""
        *rows, _ = map(names_of, h)
        return cls(tuple(rows), *map(names_of, weight))

    @property
    def row_axes(self):
        return tuple(name for names in self.rows for name in names)

    @property
    def gathered_classes(self):
        return self.classes if {*self.classes} <= {*self.row_axes} else ()

    @property
    def split_classes(self):
        return tuple(name for name in self.classes if name not in self.row_axes)

    @property
    def gathered_features(self):
        return self.features if {*self.features} <= {*self.row_axes} else ()

    # How each kind of array is split over the devices.

    @property
    def of_rows(self):
        return P(*(names or None for names in self.rows))

    @property
    def of_h(self):
        return P(*self.of_rows, None)

    @property
    def of_weight(self):
        return P(*self.of_bias, self.gathered_features or None)

    @property
    def of_bias(self):
        return P(self.gathered_classes or self.split_classes or None)

    # What a device does with its part.

    def gathered(self, weight, bias):
        weight = _gathered(weight, self.gathered_features, 1)
        weight = _gathered(weight, self.gathered_classes, 0)
        return weight, _gathered(bias, self.gathered_classes, 0)

    def summed(self, gradients):
        """The gradients of all devices together, each split as its array is."""
        grad_h, grad_W, grad_B = gradients
        if grad_h is not None and self.split_classes:
            grad_h = lax.psum(grad_h, self.split_classes)
        grad_W = self._summed(
            grad_W, {0: self.gathered_classes, 1: self.gathered_features}
        )
        grad_B = self._summed(grad_B, {0: self.gathered_classes})
        return type(gradients)(grad_h, grad_W, grad_B)

    def _summed(self, gradient, scattered):
        if gradient is None:
            return None
        for axis, names in scattered.items():
            if names:
                gradient = lax.psum_scatter(
                    gradient, names, scatter_dimension=axis, tiled=True
                )
        done = {name for names in scattered.values() for name in names}
        rest = tuple(name for name in self.row_axes if name not in done)
        return lax.psum(gradient, rest) if rest else gradient


def names_of(entry):
    """The axes of the mesh in one entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else (*entry,)


def _gathered(array, names, axis):
    if array is None or not names:
        return array
    return lax.all_gather(array, names, axis=axis, tiled=True)
