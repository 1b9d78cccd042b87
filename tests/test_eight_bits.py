"""Products of 8 bits: against float64, and against a quantizer of NumPy.

What JAX makes of them, mode by mode, is in `deep/test_transformations_of_linear.py`;
what is refused in `test_arguments.py`; what GPUs and TPUs run in
`deep/targets/test_eight_bits.py`.
"""

import contextlib
import functools
import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import collectives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle import exact, output_and_gradients, random_problem, relative_error, wide
from test_collectives import BATCH, LAYOUTS, LENGTH, OUT, compiled_gradients

import jaxlinear
from jaxlinear import Product, Products, _op, linear

# name: recipe, largest relative error of Y and of the gradients, 512 features wide
RECIPES = {
    "float8": (jaxlinear.FLOAT8, 3.9e-2, 6.2e-2),
    "e4m3": (jaxlinear.FLOAT8_E4M3, 3.9e-2, 3.9e-2),
    "int8": (jaxlinear.INT8, 1.2e-2, 1.2e-2),
}
each_recipe = pytest.mark.parametrize("name", RECIPES)
TOP = {"float8_e4m3fn": 448, "float8_e5m2": 57344, "int8": 127}


def layer(name, dtype=None):
    return functools.partial(linear, dtype=dtype, products=RECIPES[name][0])


@pytest.mark.parametrize("dtypes", [("float32", None), ("float32", "bfloat16")])
@each_recipe
def test_errors_against_float64_of_the_arguments(name, dtypes):
    dtype, compute_dtype = dtypes
    problem = random_problem((4, 64), 512, 512, dtype)
    cotangent = problem[3].astype(compute_dtype or dtype)
    actual = output_and_gradients(layer(name, compute_dtype), *problem[:3], cotangent)
    _, of_Y, of_gradients = RECIPES[name]
    limits = of_Y, of_gradients, of_gradients, 4e-3
    for ours, (expected, _), limit in zip(actual, exact(*problem), limits, strict=True):
        assert relative_error(ours, expected) < limit


def quantized(array, dtype, axis):
    """By NumPy: the array as its 8 bits and its scale have it."""
    array = np.asarray(array, np.float32)
    scale = np.max(np.abs(array), axis, keepdims=True) / np.float32(TOP[str(dtype)])
    values = array / scale
    values = np.round(values) if dtype == "int8" else values
    return wide(values.astype(jnp.dtype(dtype))) * wide(scale)


def reference(products, X, W, G):
    """Y, ∇X and ∇W of quantized operands, with the magnitudes of their terms."""
    formulas = [
        (X, W, 1, 1, lambda X, W: X @ W.T),
        (G, W, 1, 0, lambda G, W: G @ W),
        (G, X, 0, 0, lambda G, X: G.T @ X),
    ]
    for product, (a, b, a_axis, b_axis, multiplied) in zip(
        products, formulas, strict=True
    ):
        pair = (product.dtype,) * 2 if isinstance(product.dtype, str) else product.dtype
        axes = (a_axis, b_axis) if product.scaling == "per_row" else (None, None)
        a, b = (quantized(*o) for o in zip((a, b), pair, axes, strict=True))
        yield multiplied(a, b), multiplied(np.abs(a), np.abs(b))


@pytest.mark.parametrize("is_alone", [True, False])
@each_recipe
def test_products_are_those_of_the_quantized_operands(name, is_alone, replace):
    # One CPU device multiplies them in bfloat16, and eight multiply them as they are.
    replace(_op.quantized, "has_one_device", lambda: is_alone)
    x, weight, _, cotangent = random_problem((48,), 96, 64, "float32")
    Y, vjp = jax.vjp(layer(name), x, weight)
    expected = reference(RECIPES[name][0], x, weight, cotangent)
    for ours, (product, magnitude) in zip((Y, *vjp(cotangent)), expected, strict=True):
        eps = float(jnp.finfo("float32").eps)
        assert np.all(np.abs(wide(ours) - product) <= 100 * eps * magnitude)


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit])
@each_recipe
def test_half_the_bytes_of_bfloat16_are_kept(name, wrapped):
    problem = random_problem((256,), 512, 384, "float32")[:3]

    def kept(apply):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(apply, *problem)[1]))

    of_bfloat16 = kept(wrapped(functools.partial(linear, dtype="bfloat16")))
    assert kept(wrapped(layer(name, "bfloat16"))) <= 0.52 * of_bfloat16


def test_a_product_alone_may_have_8_bits():
    x, weight, _, cotangent = random_problem((16,), 32, 24, "float32")
    in_float32 = jax.vjp(linear, x, weight)
    for k, field in enumerate(Products._fields):
        products = Products(**{field: jaxlinear.INT8[k]})
        Y, vjp = jax.vjp(functools.partial(linear, products=products), x, weight)
        found = [Y, *vjp(cotangent)]
        expected = [in_float32[0], *in_float32[1](cotangent)]
        is_equal = [bool(jnp.all(a == b)) for a, b in zip(found, expected, strict=True)]
        assert is_equal == [j != k for j in range(3)]


def test_the_bias_gradient_is_not_quantized():
    problem = random_problem((64,), 32, 16, "float32")
    *_, actual = output_and_gradients(layer("float8"), *problem)
    *_, expected = output_and_gradients(linear, *problem)
    assert jnp.array_equal(actual, expected)


# Values that are not normal.


def test_an_outlier_spoils_its_own_row_alone_with_a_scale_per_row():
    x, weight, *_ = random_problem((64,), 128, 32, "float32")
    x = x.at[5, 7].set(1e4)
    Y, expected = wide(layer("int8")(x, weight)), wide(x) @ wide(weight).T
    others = np.arange(64) != 5
    assert relative_error(Y[others], expected[others]) < 1.2e-2
    spoiled = wide(linear(x, weight, products=jaxlinear.FLOAT8))
    assert relative_error(spoiled[others], expected[others]) > 1.2e-2


@each_recipe
def test_zeros_have_zero_products_and_gradients(name):
    x, weight, *_ = random_problem((8,), 16, 4, "float32")
    x = x.at[3].set(0)
    Y = layer(name)(x, weight)
    assert jnp.all(Y[3] == 0)
    assert jnp.all(jnp.isfinite(Y))
    Y, vjp = jax.vjp(layer(name), 0 * x, 0 * weight)
    assert not any(jnp.any(a) for a in (Y, *vjp(0 * Y)))


@pytest.mark.parametrize("size", [1e-9, 1e-30, 1e25])
@each_recipe
def test_tiny_and_huge_gradients_have_the_same_relative_error(name, size):
    x, weight, _, cotangent = random_problem((64,), 64, 64, "float32")
    _, vjp = jax.vjp(layer(name), x, weight)
    ordinary, scaled = vjp(cotangent), vjp(cotangent * size)
    for a, b in zip(ordinary, scaled, strict=True):
        assert relative_error(b, wide(a) * size) < 1e-2


@each_recipe
def test_a_constant_is_exact_however_long_the_sum(name):
    rows = 140_000  # With 127 in each, int32 overflows at 133,145.
    x, G = jnp.full((rows, 2), 0.3), jnp.full((rows, 3), -0.7)
    gradient = jax.vjp(layer(name), x, jnp.ones((3, 2)))[1](G)[1]
    np.testing.assert_allclose(gradient, -0.21 * rows, rtol=1e-4)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@each_recipe
def test_infinities_and_nan_end_up_where_they_would_unquantized(name, value):
    x, weight, *_ = random_problem((8,), 16, 4, "float32")
    x = x.at[2, 5].set(value)
    Y, expected = layer(name)(x, weight), linear(x, weight)
    assert jnp.array_equal(jnp.isfinite(Y), jnp.isfinite(expected))
    if name == "int8":  # Float8 of one kind has no infinity: it is a NaN.
        np.testing.assert_array_equal(np.isnan(Y), np.isnan(expected))
        rows = ~np.isfinite(expected)
        np.testing.assert_array_equal(Y[rows], expected[rows])


# Maps, programs and devices.


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_value_is_lost_in_the_maximum_of_many(dtype, is_alone, replace):
    """XLA's maximum on CPUs drops NaN from 4,096 elements on."""
    replace(_op.quantized, "has_one_device", lambda: is_alone)
    x, weight, _, cotangent = random_problem((256,), 512, 384, "float32")
    x, weight, cotangent = (a.astype(dtype) for a in (x, weight, cotangent))

    def all_of(apply):
        def found(x, weight, G):
            Y, vjp = jax.vjp(apply, x, weight)
            return Y, *vjp(G)

        return jax.jit(found)

    ours, exactly = all_of(layer("int8")), all_of(linear)
    for value, k in itertools.product([np.inf, np.nan], range(3)):
        arrays = [x, weight, cotangent]
        arrays[k] = arrays[k].at[3, 5].set(value)
        for found, expected in zip(ours(*arrays), exactly(*arrays), strict=True):
            assert not jnp.any(jnp.isfinite(found) & ~jnp.isfinite(expected)), (
                value,
                k,
            )


@pytest.mark.parametrize("spec", [("data", None), (None, "data"), (None, None)])
def test_a_nan_is_found_in_a_sharded_array(spec):
    x, weight, _, _ = random_problem((256,), 512, 384, "float32")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    x = jax.device_put(x.at[3, 5].set(np.nan), sharding)
    Y = jax.jit(layer("int8"))(x, weight)
    assert jnp.all(jnp.isnan(Y).any(1) == (jnp.arange(256) == 3))


@pytest.mark.parametrize("rows", [1000, 150_000])
def test_sums_of_a_size_that_is_not_known_yet_do_not_overflow(rows, replace):
    replace(_op.quantized, "has_one_device", lambda: False)
    n, k = jax.export.symbolic_shape("n, k")

    def gradient(x, weight, G):
        return jax.vjp(layer("int8"), x, weight)[1](G)[1]

    def abstract(*shape):
        return jax.ShapeDtypeStruct(shape, "float32")

    exported = jax.export.export(jax.jit(gradient))(
        abstract(n, 2), abstract(3, 2), abstract(n, 3)
    )
    ones = functools.partial(jnp.ones, dtype="float32")
    found = exported.call(ones((rows, 2)), ones((3, 2)), ones((rows, 3)))
    np.testing.assert_allclose(found, rows, rtol=1e-3)
    exported = jax.export.export(jax.jit(layer("int8")))(abstract(2, k), abstract(3, k))
    found = exported.call(ones((2, rows)), ones((3, rows)))
    np.testing.assert_allclose(found, rows, rtol=1e-3)


@each_recipe
def test_the_maximum_of_a_constant_weight_is_left_to_the_program(name):
    """XLA's interpreter would take a minute for it in a large weight."""
    x, weight, _, _ = random_problem((4,), 64, 96, "float32")

    def maxima(function, *arrays):
        text = jax.jit(function).lower(*arrays).compile().as_text()
        return text.count("maximum(")

    closed_over = maxima(lambda x: layer(name)(x, weight), x)
    assert closed_over == maxima(layer(name), x, weight)


@each_recipe
def test_each_element_of_a_map_is_quantized_by_itself(name):
    x, weight, *_ = random_problem((3, 8), 16, 4, "float32")
    x = x * jnp.array([1, 1e3, 1e-3])[:, None, None]
    weights = jnp.stack([weight, 1e3 * weight, weight[::-1]])
    for arrays, axes in [((x, weight), (0, None)), ((x[0], weights), (None, 0))]:
        mapped = jax.vmap(layer(name), axes)(*arrays)
        for k in range(3):
            one = [a if i is None else a[k] for a, i in zip(arrays, axes, strict=True)]
            np.testing.assert_allclose(mapped[k], layer(name)(*one), rtol=1e-5)


@pytest.mark.parametrize("differentiated", [0, 1])
@pytest.mark.parametrize("mapped", ["x", "weight"])
@each_recipe
def test_gradients_of_a_map_are_as_accurate_as_those_without(
    name, mapped, differentiated
):
    x, weight, _, _ = random_problem((4, 64), 256, 256, "float32")
    arrays = (x, weight) if mapped == "x" else (x[0], jnp.stack([weight] * 4) * 2)
    axes = (0, None) if mapped == "x" else (None, 0)
    _, vjp = jax.vjp(jax.vmap(layer(name), axes), *arrays)
    _, exactly = jax.vjp(jax.vmap(linear, axes), *arrays)
    cotangent = random_problem((4, 64), 256, 256, "float32", seed=1)[3]
    expected = wide(exactly(cotangent)[differentiated])
    assert relative_error(vjp(cotangent)[differentiated], expected) < RECIPES[name][2]


@pytest.mark.parametrize("axis_type", [None, AxisType.Explicit])
@pytest.mark.parametrize("bias_axis", [None, 0])
@pytest.mark.parametrize("name", [*RECIPES, "float8 by rows"])
def test_a_map_over_x_materialises_no_weight_gradient_of_each_element(
    name, bias_axis, axis_type
):
    x, weight, bias, _ = random_problem((64, 8), 128, 256, "float32")
    bias = bias if bias_axis is None else jnp.stack([bias] * 64)
    by_rows = Products(*[Product("float8_e4m3fn", scaling="per_row")] * 3)
    products = RECIPES[name][0] if name in RECIPES else by_rows
    apply = functools.partial(linear, products=products)

    def loss(weight, x, bias):
        return jnp.sum(jax.vmap(apply, (0, None, bias_axis))(x, weight, bias) ** 2)

    with contextlib.ExitStack() as stack:
        if axis_type is not None:
            mesh = jax.make_mesh((1,), ("data",), axis_types=(axis_type,))
            stack.enter_context(jax.set_mesh(mesh))
        compiled = jax.jit(jax.grad(loss)).lower(weight, x, bias).compile()
    assert f"f32[64,{weight.shape[0]},{weight.shape[1]}]" not in compiled.as_text()


@each_recipe
def test_second_derivatives_need_gradient_products_of_more_bits(name):
    x, weight, *_ = random_problem((4,), 8, 8, "float32")

    def loss(products, x, weight):
        for _ in range(2):
            x = jnp.tanh(linear(x, weight / 8, products=products))
        return jnp.sum(x**2)

    def curvature(products):
        gradient = jax.grad(functools.partial(loss, products), (0, 1))
        return jax.jvp(gradient, (x, weight), (x, weight))[1]

    recipe = RECIPES[name][0]
    with pytest.raises(
        TypeError, match=r"in \S+ for the backward .*\.Products\(forward"
    ):
        curvature(recipe)
    for ours, plain in zip(
        curvature(Products(recipe.forward)), curvature(None), strict=True
    ):
        assert relative_error(ours, wide(plain)) < 0.1


def test_tangents_are_not_quantized():
    x, weight, *_ = random_problem((8,), 16, 4, "float32")
    dW = weight.at[0, 0].set(1e6)
    _, dY = jax.jvp(lambda w: layer("float8")(x, w), (weight,), (dW,))
    kept = quantized(x, "float8_e4m3fn", None)
    assert relative_error(dY, kept @ wide(dW).T) < 1e-6


@pytest.mark.parametrize(
    ("saved", "quantized_again"),
    [
        (["linear", "linear_x", "linear_weight"], 0),
        (["linear", "linear_x", "linear_scale"], 0),
        (["linear", "linear_x"], 3),
        (["linear"], 6),
    ],
)
def test_nothing_is_quantized_again_where_remat_saves_it(saved, quantized_again):
    weights = [random_problem((1,), 32, 32, "float32", seed)[1] for seed in range(3)]
    x = random_problem((16,), 32, 32, "float32")[0]
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    @functools.partial(jax.checkpoint, policy=policy)
    def network(x, weights):
        for weight in weights:
            x = jnp.tanh(layer("float8")(x, weight))
        return x

    Y, vjp = jax.vjp(network, x, weights)
    backward = jax.jit(lambda vjp, G: vjp(G)).lower(vjp, Y).compile().as_text()
    # The maximum of each G, which is new, and of each X and W that is not saved.
    maxima = re.findall(r" reduce\(", backward)
    assert len(maxima) == len(weights) + quantized_again


@pytest.mark.parametrize(
    "layout", ["data", "column", "row", "fsdp over the output features"]
)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["float8", "int8"])
def test_collectives_are_those_of_bfloat16_and_the_maxima(name, axis_type, layout):
    def of(apply):
        case = axis_type, LAYOUTS[layout], ("bfloat16", "float32", "bfloat16"), True
        found = collectives(compiled_gradients(apply, *case))
        reductions = Counter(size for kind, _, size in found if kind == "all-reduce")
        gathered = sum(size for kind, _, size in found if kind == "all-gather")
        assert reductions.total() + sum(k == "all-gather" for k, *_ in found) == len(
            found
        )
        return reductions, gathered

    (ours, gathered), (theirs, gathered_in_float32) = of(layer(name)), of(linear)
    assert theirs <= ours
    # Over each mesh axis that splits X, W or G one number, or one for a row each.
    x_spec, weight_spec, _, G_spec = LAYOUTS[layout]
    axes = [a for spec in (x_spec, weight_spec, G_spec) for a in spec if a is not None]
    maxima = ours - theirs
    assert maxima.total() <= len(axes)
    assert max(maxima) == 4 if name == "float8" else max(maxima) <= 4 * BATCH * LENGTH
    # In 8 bits and, in XLA's CPU backend, in 16; the scales of rows beside them.
    assert gathered <= gathered_in_float32 / 2 + 3 * 4 * OUT * (name == "int8")


@each_recipe
def test_data_parallel_with_a_weight_that_is_replicated(name):
    x, weight, _, cotangent = random_problem((64,), 64, 32, "float32")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P()
    )
    def gradient(x, weight, G):
        return jax.vjp(layer(name), x, weight)[1](G)[1]

    expected = wide(cotangent).T @ wide(x)
    found = gradient(x, weight, cotangent)
    assert relative_error(found, expected) < RECIPES[name][2]


@each_recipe
def test_a_scan_over_layers_keeps_8_bits(name):
    x, weight, _, _ = random_problem((64,), 128, 128, "float32")
    weights = jnp.stack([weight / 12] * 4)

    def network(x, weights):
        def step(x, weight):
            return jnp.tanh(layer(name, "bfloat16")(x, weight)).astype(x.dtype), None

        return jax.lax.scan(step, x.astype("bfloat16"), weights)[0]

    found = jaxlinear.explain(network, x, weights)
    stacked = {(a.dtype, a.shape) for a in found.saved if len(a.shape) == 3}
    dtype = "int8" if name == "int8" else "float8_e4m3fn"
    assert (dtype, (4, 64, 128)) in stacked
    assert (dtype, (4, 128, 128)) in stacked


@each_recipe
def test_both_modules_take_a_recipe(name):
    from flax import nnx

    import jaxlinear.linen
    import jaxlinear.nnx

    x = random_problem((8,), 16, 4, "float32")[0]
    options = {"dtype": "bfloat16", "products": RECIPES[name][0]}
    module = jaxlinear.nnx.Linear(16, 4, rngs=nnx.Rngs(0), **options)
    weight, bias = module.weight[...], module.bias[...]
    expected = layer(name, "bfloat16")(x, weight, bias)
    assert jnp.array_equal(module(x), expected)
    linen = jaxlinear.linen.Linear(4, **options)
    params = {"params": {"weight": weight, "bias": bias}}
    assert jnp.array_equal(linen.apply(params, x), expected)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_multiply_8_bits(platform):
    x, weight, bias, _ = random_problem((16,), 32, 8, "bfloat16")

    def step(*arrays):
        Y, vjp = jax.vjp(layer("float8", "bfloat16"), *arrays)
        return Y, vjp(Y)

    traced = jax.jit(step).trace(x, weight, bias)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    operands = re.findall(
        r"dot_general.*: \(tensor<\w+x(\w+)>, tensor<\w+x(\w+)>", text
    )
    assert operands == [("f8E4M3FN",) * 2] + [("f8E5M2", "f8E4M3FN")] * 2


def test_a_product_may_leave_in_its_accumulator_alone():
    x, weight, *_ = random_problem((8,), 16, 4, "bfloat16")
    for recipe, own in [(jaxlinear.FLOAT8, "float32"), (jaxlinear.INT8, "int32")]:
        forward = recipe.forward._replace(preferred_element_type=own)
        Y = linear(x, weight, products=Products(forward))
        assert jnp.array_equal(Y, linear(x, weight, products=recipe))
    amd = Product(("float8_e5m2fnuz", "float8_e4m3fnuz"), scaling="per_row")
    gradients = jax.grad(
        lambda w: jnp.sum(
            linear(x, w, products=Products(weight_grad=amd)).astype("float32")
        )
    )(weight)
    assert relative_error(gradients, np.ones((8, 4)).T @ wide(x)) < 6e-2
