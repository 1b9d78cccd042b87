"""Each product has what was asked of it: operands, precision, and how it leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.lax import DotAlgorithmPreset
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowered import lowered_products, products_by_shape
from oracle import (
    assert_rounded_once,
    exact,
    naive,
    output_and_gradients,
    random_problem,
    relative_error,
)

import jaxlinear
import jaxlinear.linen
import jaxlinear.nnx
from jaxlinear import ALTERNATIVE_FLOAT16, Product, Products, linear

ROWS, IN, OUT = 64, 32, 48  # Each product has a result of another shape.
SHAPES = {"forward": (ROWS, OUT), "input_grad": (ROWS, IN), "weight_grad": (OUT, IN)}


def problem(dtype="float32"):
    return random_problem((ROWS,), IN, OUT, dtype)


def lowered(argument_dtype="float32", platform="cuda", **options):
    """Each product of a forward and backward pass, by its field of ``Products``."""
    *arrays, cotangent = problem(argument_dtype)
    cotangent = cotangent.astype(options.get("dtype", argument_dtype))
    layer = functools.partial(linear, **options)
    passes = functools.partial(output_and_gradients, layer)
    found = products_by_shape(passes, *arrays, cotangent, platform=platform)
    return {field: found[shape] for field, shape in SHAPES.items()}


def gradients(products):
    return Products(input_grad=products, weight_grad=products)


# The layer in each API, and where programs differ: each a function of x and weight.


def in_nnx(x, weight, **options):
    layer = nnx.eval_shape(
        lambda: jaxlinear.nnx.Linear(
            IN, OUT, use_bias=False, rngs=nnx.Rngs(0), **options
        )
    )
    layer.weight = nnx.Param(weight)
    return layer(x)


def in_linen(x, weight, **options):
    layer = jaxlinear.linen.Linear(OUT, use_bias=False, **options)
    return layer.apply({"params": {"weight": weight}}, x)


def under_vmap(x, weight, **options):
    # Of one element: JAX sums the gradients of several, each in its own dtype.
    return jax.vmap(functools.partial(linear, **options), (0, None))(x[None], weight)[0]


def on_an_explicit_mesh(x, weight, **options):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.reshard(x, NamedSharding(mesh, P("data")))
    Y = linear(x, jax.reshard(weight, NamedSharding(mesh, P())), **options)
    return jax.reshard(Y, NamedSharding(mesh, P()))


EVERYWHERE = {
    "linear": linear,
    "jit": lambda x, weight, **options: jax.jit(functools.partial(linear, **options))(
        x, weight
    ),
    "nnx": in_nnx,
    "linen": in_linen,
    "vmap": under_vmap,
    "explicit mesh": on_an_explicit_mesh,
}
everywhere = pytest.mark.parametrize("layer", EVERYWHERE.values(), ids=EVERYWHERE)


@everywhere
def test_a_gradient_that_is_reduced_in_bfloat16_is_rounded_and_no_other(layer):
    x, weight, _, cotangent = problem()
    halved = Products(weight_grad=Product(preferred_element_type="bfloat16"))

    def values(products):
        apply = functools.partial(layer, dtype="bfloat16", products=products)
        Y, vjp = jax.vjp(apply, x, weight)
        return Y, *vjp(cotangent.astype("bfloat16"))

    (Y, of_x, of_weight), (Y_, of_x_, of_weight_) = values(halved), values(None)
    np.testing.assert_array_equal(Y, Y_)
    np.testing.assert_array_equal(of_x, of_x_)
    assert of_weight.dtype == "float32"
    np.testing.assert_array_equal(of_weight, of_weight.astype("bfloat16"))
    assert np.any(of_weight_ != of_weight_.astype("bfloat16").astype("float32"))


@everywhere
def test_gradients_that_float16_flushes_to_zero_survive_in_bfloat16(layer):
    # 1e-9 is less than half the smallest subnormal number of float16, 6e-8.
    x, weight = jnp.full((ROWS, IN), 1e-9), jnp.full((OUT, IN), 1e-9)
    cotangent = jnp.ones((ROWS, OUT), "float16")
    backward = gradients(Product("bfloat16"))
    for products, of_x, of_weight in (None, 0, 0), (backward, OUT, ROWS):
        apply = functools.partial(layer, dtype="float16", products=products)
        found = jax.vjp(apply, x, weight)[1](cotangent)
        eps = float(jnp.finfo("bfloat16").eps)
        for gradient, terms in zip(found, (of_x, of_weight), strict=True):
            np.testing.assert_allclose(gradient, terms * 1e-9, rtol=eps)


@everywhere
def test_one_precision_changes_one_product(layer):
    x, weight, *_ = problem()
    highest = Products(weight_grad=Product(precision="highest"))

    def gradients(x, weight):
        apply = functools.partial(layer, products=highest)
        Y, vjp = jax.vjp(apply, x, weight)
        return vjp(Y)

    found = lowered_products(gradients, x, weight, platform="tpu")
    precisions = {p.shape: "HIGHEST" in p.text for p in found}
    assert len(found) == 3
    assert precisions.pop(SHAPES["weight_grad"])
    assert not any(precisions.values())


# Precision.

THREE = Products(*(Product(precision=p) for p in ("highest", "high", "default")))
EACH = {"forward": "HIGHEST", "input_grad": "HIGH", "weight_grad": "DEFAULT"}
TF32_X3 = (
    "algorithm = <lhs_precision_type = tf32, rhs_precision_type = tf32,"
    " accumulation_type = f32, lhs_component_count = 1, rhs_component_count = 1,"
    " num_primitive_operations = 3"
)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_product_has_its_own_precision(dtype, platform):
    found = lowered(dtype, platform, products=THREE)
    for field, precision in EACH.items():
        assert f"precision = [{precision}, {precision}]" in found[field].text


PRECISIONS = {
    "tensorfloat32": "precision = [HIGH, HIGH]",
    lax.Precision.HIGHEST: "precision = [HIGHEST, HIGHEST]",
    ("highest", "default"): "precision = [HIGHEST, DEFAULT]",
    "TF32_TF32_F32_X3": TF32_X3,
    DotAlgorithmPreset.TF32_TF32_F32_X3: TF32_X3,
    DotAlgorithmPreset.DEFAULT: "precision = [DEFAULT, DEFAULT]",
}


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_precision_is_that_of_each_product_that_has_none_of_its_own(precision):
    own = Products(input_grad=Product(precision="high"))
    for products, field in (None, "input_grad"), (own, "forward"):
        found = lowered(precision=precision, products=products)
        assert PRECISIONS[precision] in found[field].text
    assert "precision = [HIGH, HIGH]" in found["input_grad"].text


def test_a_list_is_the_pair_that_a_tuple_is_also_inside_the_switch():
    x, weight, *_ = problem()
    layer = functools.partial(linear, precision=["highest", "default"])
    assert "[HIGHEST, DEFAULT]" in lowered_products(layer, x, weight)[0].text
    with jaxlinear.plain_autodiff():
        assert "[HIGHEST, DEFAULT]" in lowered_products(layer, x, weight)[0].text


def test_default_precision_is_that_under_which_the_call_is_made():
    # As autodiff of the naive formula has it.
    x, weight, bias, cotangent = problem()
    with jax.default_matmul_precision("highest"):
        _, vjp = jax.vjp(linear, x, weight, bias)
    with jax.default_matmul_precision("default"):
        found = products_by_shape(vjp, cotangent)
    assert "precision = [HIGHEST, HIGHEST]" in found[OUT, IN].text


def gradient_of_input_gradient(x, weight):
    def input_gradient(x, weight):
        return jax.grad(lambda x: jnp.sum(linear(x, weight, products=THREE) ** 3))(x)

    return jax.grad(lambda w: jnp.sum(input_gradient(x, w).astype("float32") ** 2))(
        weight
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_derivatives_have_the_precision_of_the_product_they_come_from(dtype):
    x, weight, *_ = problem(dtype)
    for platform in ("cpu", "cuda"):
        found = lowered_products(
            gradient_of_input_gradient, x, weight, platform=platform
        )
        texts = {}
        for product in found:
            # That of W may be transposed.
            shape = (
                SHAPES["weight_grad"] if product.shape == (IN, OUT) else product.shape
            )
            texts.setdefault(shape, []).append(product.text)

        def count(field, precision, texts=texts):
            return sum(f"[{precision}, {precision}]" in t for t in texts[SHAPES[field]])

        # Y = X Wᵀ, ∇X = G W, and the derivative of ∇X with respect to G.
        assert count("forward", "HIGHEST") == count("forward", "HIGH") == 1
        assert count("input_grad", "HIGH") == len(texts[SHAPES["input_grad"]])
        # Those with respect to W, of ∇X and of Y.
        assert count("weight_grad", "HIGH") == count("weight_grad", "HIGHEST") == 1


def test_inside_the_switch_all_products_have_the_precision_of_the_forward_product():
    with jaxlinear.plain_autodiff():
        found = lowered("float32", "cpu", products=THREE)
    assert all("[HIGHEST, HIGHEST]" in product.text for product in found.values())


@pytest.mark.parametrize("field", Products._fields)
def test_algorithm_that_the_device_does_not_have_is_refused_by_jax(field):
    x, weight, *_ = problem()
    unknown = Products(**{field: Product(precision="TF32_TF32_F32")})
    loss = jax.grad(lambda *a: jnp.sum(linear(*a, products=unknown)), (0, 1))
    with pytest.raises(ValueError, match=r"TF32_TF32_F32.* not supported .* CPU"):
        loss(x, weight)


def test_precision_changes_no_value_on_cpu():
    arguments = problem()
    expected = output_and_gradients(naive, *arguments)
    actual = output_and_gradients(functools.partial(linear, products=THREE), *arguments)
    for value, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5)


# Operands.

DTYPES = {
    # name: dtypes of the arguments, of the forward product and of the gradients
    "the note on ROCm": ("float16", "float16", ("bfloat16", "bfloat16")),
    "float32 arguments": ("float32", "float16", ("bfloat16", "bfloat16")),
    "float32 gradients": ("float32", "bfloat16", ("float32", "float32")),
    "low precision backward alone": ("float32", "float32", ("bfloat16", "bfloat16")),
    "each of its own": ("float32", "bfloat16", ("float16", "float32")),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("leading", [(ROWS,), (4, 16), ()], ids=str)
def test_every_product_is_rounded_once_from_operands_of_its_own_dtype(dtypes, leading):
    dtype, forward, (of_x, of_weight) = dtypes
    x, weight, bias, cotangent = random_problem(leading, IN, OUT, dtype)
    cotangent = cotangent.astype(forward)
    # A pair of equal dtypes is the same as one.
    own = Products(input_grad=Product(of_x), weight_grad=Product((of_weight,) * 2))
    layer = functools.partial(linear, dtype=forward, products=own)
    Y, *actual = output_and_gradients(layer, x, weight, bias, cotangent)

    def exact_in(dtype):
        x_, weight_, cotangent_ = (a.astype(dtype) for a in (x, weight, cotangent))
        return list(exact(x_, weight_, bias, cotangent_))

    assert Y.dtype == forward
    assert_rounded_once(Y, *exact_in(forward)[0], IN)
    rows = int(np.prod(leading))
    expected = (
        (*exact_in(of_x)[1], OUT),
        (*exact_in(of_weight)[2], rows),
        (*exact_in(forward)[3], rows),
    )
    for gradient, want in zip(actual, expected, strict=True):
        assert gradient.dtype == dtype
        assert_rounded_once(gradient, *want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_forward_product_of_another_dtype_than_the_output(dtype):
    x, weight, bias, cotangent = problem()
    own = Products(forward=Product(dtype))
    Y, of_x, *_ = output_and_gradients(
        functools.partial(linear, products=own), *problem()
    )
    rounded = (a.astype(dtype) for a in (x, weight))
    assert Y.dtype == "float32"
    assert_rounded_once(Y, *next(iter(exact(*rounded, bias, cotangent))), IN)
    assert_rounded_once(of_x, *list(exact(x, weight, bias, cotangent))[1], OUT)


def test_gradients_that_overflow_in_float16_survive():
    # Each sum of products is beyond 65504, the largest number of float16.
    x, weight = jnp.full((ROWS, IN), 100.0), jnp.full((OUT, IN), 100.0)
    arguments = x, weight, jnp.zeros(OUT), jnp.full((ROWS, OUT), 60_000, "float16")
    in_float16 = gradients(Product(preferred_element_type="float16"))
    for layer in (naive, functools.partial(linear, products=in_float16)):
        _, *found, _ = output_and_gradients(
            functools.partial(layer, dtype="float16"), *arguments
        )
        assert np.all(np.isinf(np.concatenate(found)))
    for preferred in (None, "bfloat16"):
        backward = gradients(Product("bfloat16", preferred_element_type=preferred))
        layer = functools.partial(linear, dtype="float16", products=backward)
        _, of_x, of_weight, _ = output_and_gradients(layer, *arguments)
        # The operands are rounded, and perhaps the result.
        eps = 3 * float(jnp.finfo("bfloat16").eps)
        np.testing.assert_allclose(of_x, OUT * 6e6, rtol=eps)
        np.testing.assert_allclose(of_weight, ROWS * 6e6, rtol=eps)


def test_float32_gradients_under_bfloat16_compute_are_those_of_float32():
    x, weight, bias, cotangent = problem()
    cotangent = cotangent.astype("bfloat16")
    (_, (of_x, _), (of_weight, _), _) = exact(x, weight, bias, cotangent)
    for products, low, high in (
        (None, 1e-4, 1e-1),
        (gradients(Product("float32")), 0, 1e-6),
    ):
        layer = functools.partial(linear, dtype="bfloat16", products=products)
        _, *found, _ = output_and_gradients(layer, x, weight, bias, cotangent)
        for gradient, want in zip(found, (of_x, of_weight), strict=True):
            assert low < relative_error(gradient, want) < high


def kept_bytes(**options):
    x, weight, bias, _ = problem("float16")
    layer = jax.jit(functools.partial(linear, **options))
    _, vjp = jax.vjp(layer, x, weight, bias)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))


def test_no_more_bytes_are_kept_for_gradients_of_the_same_width():
    backward = gradients(Product("bfloat16"))
    assert kept_bytes(products=backward) == kept_bytes() == 2 * (ROWS * IN + OUT * IN)
    wider = Products(input_grad=Product("float32"))
    assert kept_bytes(products=wider) == 2 * ROWS * IN + 4 * OUT * IN


def test_inside_the_switch_gradients_have_the_operands_of_the_forward_product():
    with jaxlinear.plain_autodiff():
        found = lowered("float32", "cpu", products=gradients(Product("bfloat16")))
    assert {p.operands for p in found.values()} == {("f32", "f32")}


# The hint for ROCm's alternative float16.

HINTS = {"input_grad": 'grad_x = "true"', "weight_grad": 'grad_y = "true"'}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"precision": "F16_F16_F32"},
        {"precision": "F16_F16_F16"},
        {"dtype": "float32"},
    ],
    ids=str,
)
@pytest.mark.parametrize("platform", ["rocm", "cuda"])
def test_alternative_float16_is_a_hint_whatever_else_is_asked(platform, asked):
    found = lowered("float16", platform, products=ALTERNATIVE_FLOAT16, **asked)
    assert "grad_" not in found["forward"].text
    for field, hint in HINTS.items():
        assert hint in found[field].text
        assert found[field].operands == ("f16", "f16")
        if algorithm := asked.get("precision"):
            accumulated = f"accumulation_type = {algorithm[-3:].lower()}"
            assert accumulated in found[field].text


def test_the_hint_may_stand_beside_what_a_product_has_for_itself():
    own = [
        p and p._replace(preferred_element_type="float32") for p in ALTERNATIVE_FLOAT16
    ]
    for field, hint in HINTS.items():
        product = lowered("float16", "rocm", products=Products(*own))[field]
        assert hint in product.text
        assert product.result == "f32"


def test_there_is_no_hint_by_default():
    for platform in ("rocm", "cpu"):
        found = lowered("float16", platform, products=gradients(Product("float16")))
        assert not any("grad_" in product.text for product in found.values())


def test_alternative_float16_has_the_values_of_float16_on_cpu():
    hinted = functools.partial(linear, products=ALTERNATIVE_FLOAT16)
    arguments = problem("float16")
    for actual, expected in zip(
        output_and_gradients(hinted, *arguments),
        output_and_gradients(linear, *arguments),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)


# The dtype in which a product leaves its accumulator.

# dtype of x and of the parameters, with a bias, what was asked: the dtypes in which the
# forward product, the input gradient and the weight gradient leave. None: Y is rounded
# once the bias is added, but for GPUs before.
LEAVING = {
    ("bfloat16", "bfloat16", True, None): [None, "bf16", "bf16"],
    ("bfloat16", "bfloat16", True, "float32"): ["f32", "f32", "f32"],
    ("bfloat16", "bfloat16", False, None): ["bf16", "bf16", "bf16"],
    ("bfloat16", "float32", True, None): [None, "bf16", "f32"],
    ("float32", "float32", False, None): ["bf16", "f32", "f32"],
    ("float32", "float32", True, "bfloat16"): ["bf16", "bf16", "bf16"],
    ("bfloat16", "bfloat16", False, "float32"): ["f32", "f32", "f32"],
}


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@pytest.mark.parametrize("case", LEAVING, ids=str)
def test_accelerators_multiply_in_bfloat16_and_round_where_it_is_free(case, platform):
    x_dtype, parameter_dtype, has_bias, asked = case
    x, _, _, cotangent = problem(x_dtype)
    _, weight, bias, _ = problem(parameter_dtype)
    parameters = (weight, bias) if has_bias else (weight,)
    own = Products(*3 * [Product(preferred_element_type=asked)])

    def passes(x, *parameters):
        layer = functools.partial(linear, dtype="bfloat16", products=own)
        Y, vjp = jax.vjp(layer, x, *parameters)
        return Y, vjp(cotangent.astype("bfloat16"))

    found = lowered_products(passes, x, *parameters, platform=platform)
    default = "f32" if platform == "tpu" else "bf16"
    assert [p.result for p in found] == [r or default for r in LEAVING[case]]
    assert {p.operands for p in found} == {("bf16", "bf16")}
