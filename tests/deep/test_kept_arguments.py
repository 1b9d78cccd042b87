"""`jax.checkpoint` around one layer: its arguments are kept, and nothing runs twice.

The backward pass reads X and W and never Y, so it runs no product again. In 8 bits the
policy keeps X as it is multiplied, and the scales.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from compiled import collectives
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import random_array

import jaxlinear
import jaxlinear.linen
import jaxlinear.nnx
from jaxlinear import Product, Products, linear
from jaxlinear._op import cpu

LAYERS, ROWS, LENGTH, WIDTH = 3, 8, 12, 16
WEIGHT = WIDTH, WIDTH

RECIPES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "float8": {"dtype": "bfloat16", "products": jaxlinear.FLOAT8},
    "float8 e4m3": {"dtype": "bfloat16", "products": jaxlinear.FLOAT8_E4M3},
    "int8": {"dtype": "bfloat16", "products": jaxlinear.INT8},
    "float8 forward": {
        "dtype": "bfloat16",
        "products": Products(forward=jaxlinear.FLOAT8.forward),
    },
    "wide gradients": {
        "dtype": "bfloat16",
        "products": Products(
            input_grad=Product(dtype="float32"), weight_grad=Product(dtype="float32")
        ),
    },
}
EIGHT_BITS = {"float8", "float8 e4m3", "int8"}
POLICY = jax.checkpoint_policies.save_only_these_names("linear_x", "linear_scale")
LINES = {
    "fenced": jax.checkpoint,
    "unfenced": functools.partial(jax.checkpoint, prevent_cse=False),
    "policy": functools.partial(jax.checkpoint, prevent_cse=False, policy=POLICY),
}

each_recipe = pytest.mark.parametrize("recipe", RECIPES)
each_line = pytest.mark.parametrize("line", LINES)
each_dtype = pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])


def layer_of(recipe):
    return lambda *arrays: linear(*arrays, **RECIPES[recipe])


def problem(x_dtype, layers=()):
    shapes = (ROWS, LENGTH, WIDTH), (*layers, *WEIGHT), (*layers, WIDTH)
    dtypes = x_dtype, "float32", "float32"
    every = zip(shapes, dtypes, strict=True)
    return [random_array((k,), *both) for k, both in enumerate(every)]


def is_argument(array, arguments):
    return any(
        (array.shape, array.dtype) == (a.shape, a.dtype) and bool((array == a).all())
        for a in arguments
    )


def kept_by(function, *arguments):
    """What the VJP keeps beside the arguments."""
    _, vjp = jax.vjp(function, *arguments)
    kept = [array for array in jax.tree.leaves(vjp) if array.size]
    arrays = jax.tree.leaves(arguments)
    return [array for array in kept if not is_argument(array, arrays)]


@each_recipe
@each_dtype
@pytest.mark.parametrize(
    ("line", "has_bias"), [("fenced", True), ("unfenced", False)], ids=str
)
def test_nothing_but_the_arguments_is_kept(line, has_bias, x_dtype, recipe):
    arguments = problem(x_dtype)[: 2 + has_bias]
    layer = LINES[line](layer_of(recipe))
    assert kept_by(layer, *arguments) == []
    assert kept_by(jax.jit(layer), *arguments) == []


@each_recipe
@each_dtype
def test_with_the_policy_x_is_kept_as_without_checkpoint(x_dtype, recipe):
    x, weight, bias = problem(x_dtype)

    def of_weight(layer):
        return kept_by(lambda w: layer(x, w, bias), weight)

    layer = layer_of(recipe)
    found = kept_by(LINES["policy"](layer), x, weight, bias)
    x_operand = [a for a in of_weight(layer) if not is_argument(a, [x])]
    scales = {"int8": WIDTH, "float8": 1, "float8 e4m3": 1}.get(recipe, 0)
    assert sum(a.nbytes for a in found) == (
        sum(a.nbytes for a in x_operand) + 4 * scales
    )
    for array in x_operand:
        assert is_argument(array, found)


def in_scan(layer):
    def step(x, parameters):
        return layer(x, *parameters).astype(x.dtype), None

    return lambda x, *stack: lax.scan(step, x, stack)[0]


def in_shard_map(layer):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = P("data"), P("model"), P("model")
    out = P("data", None, "model")
    return jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=out)


MODES = {
    "call": (lambda layer: layer, ()),
    "scan": (in_scan, (LAYERS,)),
    "vmap over x": (lambda layer: jax.vmap(layer, (0, None, None)), ()),
    "vmap over the weights": (
        lambda layer: jax.vmap(layer, (None, 0, 0)),
        (LAYERS,),
    ),
    "vmap over all": (lambda layer: jax.vmap(layer), (ROWS,)),
    "shard_map": (in_shard_map, ()),
}


def operations(program):
    text = program.as_text()
    counts = (len(re.findall(rf" {name}\(", text)) for name in ("dot", "reduce"))
    return *counts, collectives(program)


def passes(mode, layer):
    """The operations of a forward and a backward pass, and their values."""
    wrap, layers = MODES[mode]
    arguments = problem("bfloat16", layers)

    def both(arguments, G):
        Y, vjp = jax.vjp(wrap(layer), *arguments)
        return Y, vjp(G)

    G = jax.eval_shape(wrap(layer), *arguments)
    arrays = arguments, random_array(9, G.shape, G.dtype)
    program = jax.jit(both).lower(*arrays).compile()
    return operations(program), jax.tree.leaves(program(*arrays))


PASSES = [(mode, r) for mode in MODES for r in ("bfloat16", "float8", "int8")]
PASSES += [
    (mode, r) for mode in ("call", "scan") for r in ("float32", "wide gradients")
]


@pytest.mark.parametrize(("mode", "recipe"), PASSES)
def test_operations_and_values_are_those_without_checkpoint(mode, recipe):
    layer = layer_of(recipe)
    (*counts, sent), values = passes(mode, layer)
    # Without the policy X and W are quantized again, which takes their maxima.
    kept = 1 if recipe in EIGHT_BITS else 2
    for line, expected in {
        "unfenced": (*counts[:kept], sent),
        "policy": (*counts, sent),
    }.items():
        (*found, also_sent), others = passes(mode, LINES[line](layer))
        assert (*found[: len(expected) - 1], also_sent) == expected
        for ours, without in zip(others, values, strict=True):
            assert bool((ours == without).all())


@pytest.mark.parametrize("line", ["unfenced", "policy"])
@pytest.mark.parametrize("form", [cpu.NATIVE, cpu.SHARED, cpu.READ, cpu.WIDENED])
def test_so_they_are_in_each_form_of_bfloat16_products(use_form, form, line):
    use_form(form)
    layer = layer_of("bfloat16")
    (expected, values), (found, others) = (
        passes("call", layer),
        passes("call", LINES[line](layer)),
    )
    assert found == expected
    every = zip(others, values, strict=True)
    assert all(bool((ours == without).all()) for ours, without in every)


@each_recipe
@each_line
def test_forward_mode_is_that_without_checkpoint(line, recipe):
    arguments = problem("bfloat16")
    tangents = [random_array((7, k), a.shape, a.dtype) for k, a in enumerate(arguments)]

    def derivative(layer):
        return jax.jit(lambda *a: jax.jvp(layer, a, tuple(tangents)))(*arguments)

    layer = layer_of(recipe)
    every = zip(derivative(layer), derivative(LINES[line](layer)), strict=True)
    assert all(bool((ours == without).all()) for ours, without in every)


LAYOUTS = {  # specs of x, of the weight and of Y
    "data": (P("data"), P(), P("data")),
    "fully sharded": (P("data"), P("data", "model"), P("data")),
    "column": (P("data"), P("model"), P("data", None, "model")),
}


@pytest.mark.parametrize(
    ("axis_type", "layout"),
    [(AxisType.Auto, layout) for layout in LAYOUTS] + [(AxisType.Explicit, "data")],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["bfloat16", "float8"])
def test_a_scanned_stack_on_a_mesh_sends_what_it_sends_without_checkpoint(
    recipe, axis_type, layout
):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    x_spec, weight_spec, out_spec = LAYOUTS[layout]
    is_explicit = axis_type == AxisType.Explicit
    options = {"out_sharding": NamedSharding(mesh, out_spec)} if is_explicit else {}

    def layer(x, weight):
        return linear(x, weight, **RECIPES[recipe], **options)

    def on_mesh(shape, dtype, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    weights = on_mesh((LAYERS, *WEIGHT), "float32", None, *weight_spec)
    x = on_mesh((ROWS, LENGTH, WIDTH), "bfloat16", *x_spec)

    def sent(layer):
        def loss(weights, x):
            return jnp.sum(in_scan(layer)(x, weights).astype("float32") ** 2)

        return collectives(jax.jit(jax.grad(loss)).lower(weights, x).compile())

    line = "policy" if recipe in EIGHT_BITS else "unfenced"
    assert sent(LINES[line](layer)) == sent(layer)


@pytest.mark.parametrize("where", ["around the layer", "around the gather too"])
def test_on_an_explicit_mesh_a_gathered_weight_is_kept_or_gathered_again(where):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    rows = NamedSharding(mesh, P("data"))
    unfenced = LINES["unfenced"]

    def layer(x, weight):
        return linear(x, weight, dtype="bfloat16", out_sharding=rows)

    def gathered(layer):
        return lambda x, w: layer(x, jax.sharding.reshard(w, P()))

    inside = where == "around the gather too"
    line = unfenced(gathered(layer)) if inside else gathered(unfenced(layer))

    def figures(layer):
        def loss(weights, x):
            return jnp.sum(in_scan(layer)(x, weights).astype("float32") ** 2)

        shape, sharding = (LAYERS, 256, 256), NamedSharding(mesh, P(None, "data"))
        weights = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)
        x = jax.ShapeDtypeStruct((512, 256), "bfloat16", sharding=rows)
        with jax.set_mesh(mesh):
            program = jax.jit(jax.grad(loss)).lower(weights, x).compile()
        gathers = [c for c in collectives(program) if c[0] == "all-gather"]
        return len(gathers), program.memory_analysis().temp_size_in_bytes

    (expected, most), (found, held) = figures(gathered(layer)), figures(line)
    assert found == expected + inside
    assert held < most or not inside


# The modules.


NNX = {
    "one axis": (jaxlinear.nnx.Linear, (WIDTH, WIDTH)),
    "several axes": (jaxlinear.nnx.Linear, (WIDTH, (2, WIDTH // 2))),
}
LINEN = {
    "one axis": (jaxlinear.linen.Dense, (WIDTH,)),
    "several axes": (jaxlinear.linen.DenseGeneral, ((2, WIDTH // 2),)),
}


@each_recipe
@pytest.mark.parametrize("axes", NNX)
def test_a_layer_of_nnx_in_remat_keeps_its_arguments(axes, recipe):
    kind, sizes = NNX[axes]
    x = problem("bfloat16")[0]
    graph, parameters = nnx.split(kind(*sizes, rngs=nnx.Rngs(0), **RECIPES[recipe]))
    call = nnx.remat(kind.__call__)

    def apply(parameters, x):
        return call(nnx.merge(graph, parameters), x)

    assert kept_by(apply, parameters, x) == []


@each_recipe
@pytest.mark.parametrize("axes", LINEN)
def test_a_layer_of_linen_in_remat_keeps_its_arguments(axes, recipe):
    kind, sizes = LINEN[axes]
    x = problem("bfloat16")[0]
    layer = linen.remat(kind)(*sizes, **RECIPES[recipe])
    parameters = layer.init(jax.random.key(0), x)
    assert kept_by(layer.apply, parameters, x) == []


class Block(nnx.Module):
    def __init__(self, key, options):
        self.layer = jaxlinear.nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(key), **options)

    def __call__(self, x):
        call = nnx.remat(jaxlinear.nnx.Linear.__call__, prevent_cse=False)
        return jnp.tanh(call(self.layer, x).astype(x.dtype))


@each_recipe
def test_a_scanned_stack_of_nnx_keeps_one_copy_of_its_weights(recipe):
    make = nnx.vmap(lambda key: Block(key, RECIPES[recipe]))
    graph, parameters = nnx.split(make(jax.random.split(jax.random.key(0), LAYERS)))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def apply(block, x):
        return block(x)

    x = problem("bfloat16")[0]
    found = kept_by(lambda p, x: apply(nnx.merge(graph, p), x), parameters, x)
    assert not any(array.shape[-2:] == WEIGHT for array in found)


@each_recipe
def test_a_scanned_stack_of_linen_keeps_one_copy_of_its_weights(recipe):
    class LinenBlock(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            kind = linen.remat(jaxlinear.linen.Dense, prevent_cse=False)
            return jnp.tanh(kind(WIDTH, **RECIPES[recipe])(x).astype(x.dtype)), None

    stack = linen.scan(
        LinenBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=LAYERS,
    )()
    x = problem("bfloat16")[0]
    parameters = stack.init(jax.random.key(0), x, None)
    found = kept_by(lambda p, x: stack.apply(p, x, None)[0], parameters, x)
    assert not any(array.shape[-2:] == WEIGHT for array in found)
