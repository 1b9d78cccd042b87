"""What is compiled: layers and train steps, on one device and sharded over many.

A program is a name, ``mlp-mixed-bias``: what it is, its dtypes, and whether there are
biases. On one device it is of ours, the naive formula and Flax's layer; sharded it is
also of ours with the gradients reduced in the compute dtype, as the others reduce them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxlinear
from benchmarks.workloads import WORKLOADS

DTYPES = {  # dtype of x and of the computation, dtype of the parameters
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "mixed": ("bfloat16", "float32"),
}
BIASES = ["bias", "plain"]
ROWS, WIDTH, HIDDEN = 4096, 2048, 8192
STACK = {"layers": 24, "width": 1024, "hidden": 4096}
LAYERS = {workload.name.replace(" ", "_"): workload for workload in WORKLOADS}
PROGRAMS = ["layer", "mlp", "stack", *LAYERS]
CASES = ["-".join(case) for case in itertools.product(PROGRAMS, DTYPES, BIASES)]


# The layers: a function of parameters, x and the sharding of its result, and how its
# parameters are made, weights (out, in) or Flax's kernels.


def naive(parameters, x, dtype, out_sharding=None):
    weight, *bias = parameters
    y = jnp.matmul(x.astype(dtype), weight.astype(dtype).T, out_sharding=out_sharding)
    return y + bias[0].astype(dtype) if bias else y


def ours(parameters, x, dtype, out_sharding=None, products=None):
    options = {"dtype": dtype, "products": products, "out_sharding": out_sharding}
    return jaxlinear.linear(x, *parameters, **options)


def reduced(parameters, x, dtype, out_sharding=None):
    """Ours, with what devices add up rounded to the compute dtype first."""
    product = jaxlinear.Product(preferred_element_type=dtype)
    products = jaxlinear.Products(product, product, product)
    return ours(parameters, x, dtype, out_sharding, products)


def flax(parameters, x, dtype, out_sharding=None):
    kernel, *bias = parameters
    out_features, has_bias = kernel.shape[-1], bool(bias)
    layer = nnx.eval_shape(
        lambda: nnx.Linear(
            kernel.shape[0],
            out_features,
            use_bias=has_bias,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
    )
    layer.kernel = nnx.Param(kernel)
    if bias:
        layer.bias = nnx.Param(bias[0])
    return layer(x, out_sharding=out_sharding)


CONTENDERS = {"ours": ours, "ours, reduced": reduced, "naive": naive, "Flax": flax}


def parameter_shapes(contender, in_features, out_features, dtype, has_bias):
    flat = (in_features, out_features)
    weight = flat if contender == "Flax" else flat[::-1]
    shapes = [weight, (out_features,)][: 1 + has_bias]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


# On one device.


def on_one(case, contender, device):
    """The function of a case and its arguments, on ``device``."""
    name, dtypes, bias = case.split("-")
    dtype, param_dtype = DTYPES[dtypes]
    apply = functools.partial(CONTENDERS[contender], dtype=dtype)
    shapes = functools.partial(
        parameter_shapes, contender, dtype=param_dtype, has_bias=bias == "bias"
    )
    if name in ("mlp", "stack"):
        function, arguments = (_mlp if name == "mlp" else _stack)(apply, shapes, dtype)
    else:
        workload = LAYERS.get(name)
        leading = workload.leading if workload else (ROWS,)
        ins = workload.in_features if workload else WIDTH
        outs = workload.out_features if workload else HIDDEN
        function = functools.partial(_layer, apply)
        x, G = ((*leading, size) for size in (ins, outs))
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in (x, G)]
        arguments = shapes(ins, outs), *arrays
    sharding = SingleDeviceSharding(device)
    return jax.jit(function), jax.tree.map(
        lambda a: a.update(sharding=sharding), arguments
    )


def _layer(apply, parameters, x, G):
    """Y and every gradient of one layer."""
    y, gradients = jax.vjp(apply, parameters, x)
    return y, gradients(G)


def _block(apply, parameters, x):
    """Two layers with GELU between them."""
    return apply(parameters[1], jax.nn.gelu(apply(parameters[0], x)))


def _mlp(apply, shapes, dtype):
    """A loss of two layers and its gradient."""

    def loss(parameters, x):
        return jnp.mean(jnp.square(_block(apply, parameters, x).astype("float32")))

    parameters = shapes(WIDTH, HIDDEN), shapes(HIDDEN, WIDTH)
    return jax.value_and_grad(loss), (
        parameters,
        jax.ShapeDtypeStruct((ROWS, WIDTH), dtype),
    )


def _stack(apply, shapes, dtype):
    """The same for a scanned stack of residual blocks, recomputed in the backward."""

    @jax.checkpoint
    def step(x, parameters):
        return x + _block(apply, parameters, x), None

    def loss(parameters, x):
        y, _ = jax.lax.scan(step, x, parameters)
        return jnp.mean(jnp.square(y.astype("float32")))

    width, hidden = STACK["width"], STACK["hidden"]
    parameters = jax.tree.map(
        lambda a: a.update(shape=(STACK["layers"], *a.shape)),
        (shapes(width, hidden), shapes(hidden, width)),
    )
    x = jax.ShapeDtypeStruct((ROWS, width), dtype)
    return jax.value_and_grad(loss), (parameters, x)


# Over many devices: an axis of the mesh over the rows, and one over the layers.

LAYOUTS = {  # names of the axes of the rows, of the hidden features, and of the width
    "data": ("data", None, None),
    "fsdp": ("data", "data", None),
    "tensor": (None, "model", None),
    "fsdp_tensor": ("data", "model", "data"),
}
# A layer's features, as multiples of the width and the hidden size, and whether it is
# split by its output, as the first layers of a block are, or by its input.
PARTS = {
    "up": ("width", "hidden", True),
    "down": ("hidden", "width", False),
    "qkv": ("width", "3 width", True),
    **dict.fromkeys("qkv", ("width", "width", True)),
    "proj": ("width", "width", False),
}
SHARDED = {
    "column": ["up"],
    "row": ["down"],
    "mlp": ["up", "down"],
    "gpt": ["qkv", "proj", "up", "down"],
    "gpt_three": ["q", "k", "v", "proj", "up", "down"],
}
"""Names of programs: one layer, or a stack of blocks, recomputed in the backward pass.

``gpt`` is the linear layers of a transformer's block, with three elementwise operations
in the place of the attention; ``gpt_three`` has a layer each for q, k and v.
"""
SIZES = {"rows": 512, "width": 1024, "hidden": 4096, "tensor": 4, "layers": 4}
"""Rows of each data shard, features, devices that split a layer, blocks of a stack."""


def sharded(case, contender, devices, layout, axis_type, sizes):
    """A train step's loss and gradients, and its arguments, over ``devices``."""
    name, dtypes, bias = case.split("-")
    dtype, param_dtype = DTYPES[dtypes]
    of_rows, of_hidden, of_width = LAYOUTS[layout]
    is_explicit, is_stacked = axis_type == "explicit", name not in ("column", "row")
    tensor = {"tensor": len(devices), "fsdp_tensor": sizes["tensor"]}.get(layout, 1)
    grid = np.array(devices).reshape(-1, tensor)
    kind = AxisType.Explicit if is_explicit else AxisType.Auto
    mesh = Mesh(grid, ("data", "model"), axis_types=(kind, kind))

    def named(*axes):
        return NamedSharding(mesh, P(*axes))

    def features(part):
        sizes_ = {**sizes, "3 width": 3 * sizes["width"]}
        return [sizes_[size] for size in PARTS[part][:2]]

    def names(part):
        return (of_width, of_hidden) if PARTS[part][2] else (of_hidden, of_width)

    def parameters_of(part):
        ins, outs = names(part)
        shapes = parameter_shapes(
            contender, *features(part), dtype=param_dtype, has_bias=bias == "bias"
        )
        weight = (ins, outs) if contender == "Flax" else (outs, ins)
        # Where types have shardings, a bias is added to rows that have this axis.
        of_bias = None if is_explicit and outs == of_rows else outs
        stack = (sizes["layers"],) if is_stacked else ()
        return [
            shape.update(
                shape=(*stack, *shape.shape),
                sharding=named(*[None] * len(stack), *axes),
            )
            for shape, axes in zip(shapes, (weight, (of_bias,)), strict=False)
        ]

    def layer(part, parameters, x):
        outs = names(part)[1]
        after = P(of_rows, None if outs == of_rows else outs)
        out_sharding = NamedSharding(mesh.abstract_mesh, after) if is_explicit else None
        return CONTENDERS[contender](parameters[part], x, dtype, out_sharding)

    def block(parameters, x):
        if name in ("column", "row"):
            return layer(SHARDED[name][0], parameters, x)
        if name != "mlp":
            if name == "gpt":
                # Three values of each feature, so that no device needs another's.
                mixed = layer("qkv", parameters, x).reshape(*x.shape, 3)
                q, k, v = (mixed[..., i] for i in range(3))
            else:
                q, k, v = (layer(part, parameters, x) for part in "qkv")
            x = x + layer("proj", parameters, q * jax.nn.sigmoid(k) + v)
        return x + layer("down", parameters, jax.nn.gelu(layer("up", parameters, x)))

    def loss(parameters, x):
        if is_stacked:
            step = jax.checkpoint(lambda x, p: (block(p, x), None))
            y, _ = jax.lax.scan(step, x, parameters)
        else:
            y = block(parameters, x)
        return jnp.mean(jnp.square(y.astype("float32")))

    parts = SHARDED[name]
    parameters = {part: parameters_of(part) for part in parts}
    ins = names(parts[0])[0]
    rows = sizes["rows"] * (grid.shape[0] if of_rows else 1)
    x = jax.ShapeDtypeStruct(
        (rows, features(parts[0])[0]),
        dtype,
        sharding=named(of_rows, None if ins == of_rows else ins),
    )
    results = named(), jax.tree.map(lambda a: a.sharding, (parameters, x))
    step = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(step, out_shardings=results), (parameters, x)
