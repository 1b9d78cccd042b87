"""Stacks of layers, whose backward pass keeps something of every weight.

``scanned`` and ``written`` are square layers with GELU between them, under `scan` and
written out, and the gradients of their weights. ``gpt`` is scanned blocks of a
transformer and a step of SGD; ``remat`` has `jax.checkpoint` around each block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from benchmarks import model
from benchmarks.aot.programs import mean_square

ROWS_OVER = 4
"""The devices that share the rows, where there are several."""

LAYOUTS = {"fsdp": ("data", None), "tensor": ("model", None)}
"""The axes of the mesh over which a weight (out, in) is split."""


class Sizes(NamedTuple):
    """Layers or blocks, their features, rows."""

    layers: int = 8
    width: int = 2048
    rows: int = 512


class Stack(NamedTuple):
    """A loss of the parameters and x, what is done with it, and its arguments."""

    loss: Callable
    step: Callable
    parameters: dict[str, Any]  # "linear": the weights, as their layers have them.
    x: Any
    donated: tuple[int, ...] = ()


def stack(case, sizes):
    make = {"scanned": _scanned, "written": _written}.get(case.program, _gpt)
    return make(case, sizes)


def placed(case, devices, layout, sizes):
    """The function of a case and its arguments, on the first or on all ``devices``."""
    found = stack(case, sizes)
    if layout is None:
        of_weights = of_rows = SingleDeviceSharding(devices[0])
    else:
        mesh = Mesh(np.array(devices).reshape(ROWS_OVER, -1), ("data", "model"))
        axes = LAYOUTS[layout][:: -1 if case.is_transposed else 1]
        layers = (None,) if case.program == "scanned" else ()
        of_weights = NamedSharding(mesh, P(*layers, *axes))
        of_rows = NamedSharding(mesh, P("data"))
    parameters = jax.tree.map(lambda a: a.update(sharding=of_weights), found.parameters)
    gradients = (
        None if layout is None else jax.tree.map(lambda a: of_weights, parameters)
    )
    step = jax.jit(found.step, donate_argnums=found.donated, out_shardings=gradients)
    return step, (parameters, found.x.update(sharding=of_rows))


def _layer(case):
    return lambda x, weight: (jax.nn.gelu(case.layer(weight, x)), None)


def _scanned(case, sizes):
    def loss(parameters, x):
        return mean_square(jax.lax.scan(_layer(case), x, parameters["linear"])[0])

    weights = case.parameters(sizes.width, sizes.width, sizes.layers)
    x = jax.ShapeDtypeStruct((sizes.rows, sizes.width), case.dtype)
    return Stack(loss, jax.grad(loss), {"linear": weights}, x)


def _written(case, sizes):
    def loss(parameters, x):
        for weight in parameters["linear"]:
            x, _ = _layer(case)(x, weight)
        return mean_square(x)

    weights = [case.parameters(sizes.width, sizes.width)] * sizes.layers
    x = jax.ShapeDtypeStruct((sizes.rows, sizes.width), case.dtype)
    return Stack(loss, jax.grad(loss), {"linear": weights}, x)


def _gpt(case, sizes):
    gpt = model.GPT(layers=1, in_features=sizes.width, heads=sizes.width // 64)

    def block(x, parameters):
        weights = iter(parameters["linear"])

        def linear(x):
            return case.layer(next(weights), x)

        return model.block(gpt, linear, iter(parameters["norms"]), x), None

    step = jax.checkpoint(block) if case.program == "remat" else block

    def loss(parameters, x):
        return mean_square(jax.lax.scan(step, x, parameters)[0])

    *shapes, _ = gpt.shapes
    norm = jax.ShapeDtypeStruct((sizes.layers, sizes.width), case.param_dtype)
    parameters = {
        "linear": [case.parameters(ins, outs, sizes.layers) for outs, ins in shapes],
        "norms": [norm, norm],
    }
    x = jax.ShapeDtypeStruct((1, sizes.rows, sizes.width), case.dtype)
    return Stack(loss, model.sgd(loss), parameters, x, donated=(0,))
