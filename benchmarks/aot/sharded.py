"""Train steps over many devices: an axis of the mesh over rows, and one over layers."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.aot.programs import Case, mean_square


class Layout(NamedTuple):
    """The axis of the mesh that each of them is split over, if any."""

    rows: str | None
    hidden: str | None
    width: str | None

    def of_rows(self, features):
        """The split of an array (rows, features), where the features have this axis."""
        return P(self.rows, None if features == self.rows else features)


LAYOUTS = {
    "data": Layout("data", None, None),
    "fsdp": Layout("data", "data", None),
    "tensor": Layout(None, "model", None),
    "fsdp_tensor": Layout("data", "model", "data"),
}


class Sizes(NamedTuple):
    """Rows of each data shard, features, devices that split a layer, blocks."""

    rows: int = 512
    width: int = 1024
    hidden: int = 4096
    tensor: int = 4
    layers: int = 4


class Layer(NamedTuple):
    """Its features, and whether it is split by its output, as the first of a block."""

    ins: int
    outs: int
    by_output: bool


def layers_of(program, sizes):
    """The layers of a program: one, or a block of a stack.

    ``gpt`` is the linear layers of a transformer's block, with three elementwise
    operations in the place of the attention; ``gpt_three`` has a layer each for q, k
    and v.
    """
    width, hidden = sizes.width, sizes.hidden
    up, down = Layer(width, hidden, True), Layer(hidden, width, False)
    one, three = Layer(width, width, True), Layer(width, 3 * width, True)
    rest = {"proj": Layer(width, width, False), "up": up, "down": down}
    return {
        "column": {"up": up},
        "row": {"down": down},
        "mlp": {"up": up, "down": down},
        "gpt": {"qkv": three, **rest},
        "gpt_three": {"q": one, "k": one, "v": one, **rest},
    }[program]


@dataclasses.dataclass(frozen=True)
class Step:
    """The train step of a case over a mesh."""

    case: Case
    mesh: Mesh
    layout: Layout
    layers: dict[str, Layer]
    depth: int | None
    """How many blocks there are, or none: then it is one layer."""

    @property
    def is_explicit(self):
        return AxisType.Explicit in self.mesh.axis_types

    def axes(self, layer):
        """The axes over which its inputs and its outputs are split."""
        axes = self.layout.width, self.layout.hidden
        return axes if layer.by_output else axes[::-1]

    def parameters(self, layer):
        ins, outs = self.axes(layer)
        weight = (ins, outs) if self.case.is_transposed else (outs, ins)
        # Where types have shardings, a bias is added to rows that have this axis.
        bias = None if self.is_explicit and outs == self.layout.rows else outs
        stack = () if self.depth is None else (None,)
        return [
            array.update(sharding=NamedSharding(self.mesh, P(*stack, *axes)))
            for array, axes in zip(
                self.case.parameters(layer.ins, layer.outs, self.depth),
                (weight, (bias,)),
                strict=False,
            )
        ]

    def applied(self, name, parameters, x):
        out_sharding = None
        if self.is_explicit:
            split = self.layout.of_rows(self.axes(self.layers[name])[1])
            out_sharding = NamedSharding(self.mesh.abstract_mesh, split)
        return self.case.layer(parameters[name], x, out_sharding)

    def attended(self, parameters, x):
        """Elementwise operations in the place of the attention."""
        if "qkv" in self.layers:
            # Three values of each feature, so that no device needs another's.
            mixed = self.applied("qkv", parameters, x).reshape(*x.shape, 3)
            q, k, v = (mixed[..., i] for i in range(3))
        else:
            q, k, v = (self.applied(name, parameters, x) for name in "qkv")
        return self.applied("proj", parameters, q * jax.nn.sigmoid(k) + v)

    def block(self, parameters, x):
        if "proj" in self.layers:
            x = x + self.attended(parameters, x)
        up = jax.nn.gelu(self.applied("up", parameters, x))
        return x + self.applied("down", parameters, up)

    def loss(self, parameters, x):
        if self.depth is None:
            [name] = self.layers
            return mean_square(self.applied(name, parameters, x))
        step = jax.checkpoint(lambda x, p: (self.block(p, x), None))
        return mean_square(jax.lax.scan(step, x, parameters)[0])


def sharded(case, devices, layout, axes, sizes):
    """A train step's loss and gradients, and its arguments, over ``devices``."""
    split = LAYOUTS[layout]
    tensor = {"tensor": len(devices), "fsdp_tensor": sizes.tensor}.get(layout, 1)
    grid = np.array(devices).reshape(-1, tensor)
    kind = AxisType.Explicit if axes == "explicit" else AxisType.Auto
    mesh = Mesh(grid, ("data", "model"), axis_types=(kind, kind))
    layers = layers_of(case.program, sizes)
    depth = sizes.layers if len(layers) > 1 else None
    step = Step(case, mesh, split, layers, depth)
    first, *_ = layers.values()
    x = jax.ShapeDtypeStruct(
        (sizes.rows * (len(grid) if split.rows else 1), first.ins),
        case.dtype,
        sharding=NamedSharding(mesh, split.of_rows(step.axes(first)[0])),
    )
    parameters = {name: step.parameters(layer) for name, layer in layers.items()}
    of_gradients = jax.tree.map(lambda a: a.sharding, (parameters, x))
    return jax.jit(
        jax.value_and_grad(step.loss, argnums=(0, 1)),
        out_shardings=(NamedSharding(mesh, P()), of_gradients),
    ), (parameters, x)
