"""What is accepted, what is refused, and what is said of it, before anything is run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import jaxlinear
from jaxlinear import ALTERNATIVE_FLOAT16, Product, Products, linear

flax_linen = pytest.importorskip("flax.linen")

X, W, B = jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones(4)
COMPLEX = X.astype("complex64"), W.astype("complex64")


def own(**fields):
    return {"products": Products(weight_grad=Product(**fields))}


PREFERRED = "`products.weight_grad.preferred_element_type` must be"
DTYPE = "`products.weight_grad.dtype` must be"
# name: arguments, options if there are any, error and message
DTYPE_OF_8_BITS = (
    "`products.weight_grad.dtype` of 8 bits must be a pair that some platform"
    " multiplies, such as (float8_e4m3fn, float8_e4m3fn), got"
)
REFUSED = {
    "scalar x": (
        (1.0, W, B),
        ValueError,
        "`x` must have at least one axis, (*, in), got a scalar",
    ),
    "weight vector": (
        (X, W[0], B),
        ValueError,
        "`weight` must be a matrix (out, in), got shape (3,)",
    ),
    "weight of three axes": (
        (X, W[None], B),
        ValueError,
        "`weight` must be a matrix (out, in), got shape (1, 4, 3)",
    ),
    "other in_features": (
        (X.T, W, B),
        ValueError,
        "`x` must have 3 elements along its last axis, as `weight` of shape (4, 3)"
        " does, got shape (3, 2)",
    ),
    "kernel (in, out) for the weight": (
        (X, W.T, B),
        ValueError,
        "`weight` must be (out, in), with the 3 elements of `x` along its last axis,"
        " got shape (3, 4). Did you mean `weight.T`?",
    ),
    "kernel (in, out) without a bias, and a vector": (
        (X[0], W.T, None),
        ValueError,
        "`weight` must be (out, in), with the 3 elements of `x` along its last axis,"
        " got shape (3, 4). Did you mean `weight.T`?",
    ),
    "weight that its transpose would not mend, for the bias": (
        (X, W.T, B[:2]),
        ValueError,
        "`x` must have 4 elements along its last axis, as `weight` of shape (3, 4)"
        " does, got shape (2, 3)",
    ),
    "bias of one element": (
        (X, W, B[:1]),
        ValueError,
        "`bias` must have shape (4,), one element for each row of `weight`,"
        " got shape (1,)",
    ),
    "bias matrix": (
        (X, W, B[None]),
        ValueError,
        "`bias` must have shape (4,), one element for each row of `weight`,"
        " got shape (1, 4)",
    ),
    "scalar bias": (
        (X, W, 0.5),
        ValueError,
        "`bias` must have shape (4,), one element for each row of `weight`,"
        " got shape ()",
    ),
    "list": (
        ([[1.0, 2.0, 3.0]], W, B),
        TypeError,
        "`x` must be an array, got list",
    ),
    "string": ((X, "weight", B), {}, TypeError, "`weight` must be an array, got str"),
    "function": (
        (X, jnp.ones, B),
        TypeError,
        "`weight` must be an array, got function",
    ),
    "no weight, with a precision": (
        (X, None, B),
        {"precision": "TF32_TF32_F32"},
        TypeError,
        "`weight` must be an array, got NoneType",
    ),
    "bias tuple": (
        (X, W, (1.0,) * 4),
        TypeError,
        "`bias` must be an array, got tuple",
    ),
    "sparse x": (
        (sparse.BCOO.fromdense(X), W, B),
        TypeError,
        "`x` must be an array, got BCOO, which is sparse: pass its `todense()`",
    ),
    "box": (
        (X, flax_linen.Partitioned(W, ("out", "in")), B),
        TypeError,
        "`weight` must be an array, got Partitioned, which is a box: pass what"
        " `flax.linen.unbox` takes out of it",
    ),
    "random keys": (
        (X, W, jax.random.split(jax.random.key(0), 4)),
        TypeError,
        "`bias` must hold numbers, got dtype key<fry>",
    ),
    "integer dtype": (
        (X, W, B),
        {"dtype": jnp.int32},
        TypeError,
        "`dtype` must be a floating or complex dtype, got int32",
    ),
    "boolean dtype": (
        (X, W, B),
        {"dtype": "bool"},
        TypeError,
        "`dtype` must be a floating or complex dtype, got bool",
    ),
    "no dtype": (
        (X, W, B),
        {"dtype": "float31"},
        TypeError,
        "`dtype` must be a floating or complex dtype, got 'float31'. Did you mean"
        " 'float32'?",
    ),
    **{
        f"{given} as dtype": (
            (X, W, B),
            {"dtype": given},
            TypeError,
            f"`dtype` must be a floating or complex dtype{required}, got {got}. Did you"
            f" mean {meant}?",
        )
        for given, required, got, meant in [
            ("bf16", "", "'bf16'", "'bfloat16'"),
            ("BF16", "", "'BF16'", "'bfloat16'"),
            ("fp16", "", "'fp16'", "'float16'"),
            ("f16", " of JAX's", "'f16'", "'float16'"),
            ("f32", "", "'f32'", "'float32'"),
            ("bfloat", "", "'bfloat'", "'bfloat16'"),
            ("fp8", "", "'fp8'", "`products=jaxlinear.FLOAT8`"),
            ("int8", "", "int8", "`products=jaxlinear.INT8`"),
            # Unscaled, an activation above 448 would be NaN.
            *(
                (kind, " of at least 16 bits", kind, "`products=jaxlinear.FLOAT8`")
                for kind in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")
            ),
        ]
    },
    "short dtype of a product": (
        (X, W, B),
        own(dtype="fp8"),
        TypeError,
        f"{DTYPE} a floating or complex dtype or int8, got 'fp8'. Did you mean"
        " 'float8_e4m3fn'?",
    ),
    "list as dtype": (
        (X, W, B),
        {"dtype": ["bfloat16"]},
        TypeError,
        "`dtype` must be a floating or complex dtype, got ['bfloat16']",
    ),
    "array as dtype": (
        (X, W, B),
        {"dtype": np.ones(1)},
        TypeError,
        "`dtype` must be a floating or complex dtype, got array([1.])",
    ),
    "real dtype of a complex x": (
        (COMPLEX[0], W, B),
        {"dtype": "float32"},
        TypeError,
        "`dtype` must be complex for complex arguments, got float32",
    ),
    "precision with a typo": (
        (X, W, B),
        {"precision": "hihg"},
        ValueError,
        "`precision` must be a jax.lax.Precision, a jax.lax.DotAlgorithmPreset, the"
        " name of either, or one of these for each operand, got 'hihg'. Did you mean"
        " 'high'?",
    ),
    "short precision of one product": (
        (X, W, B),
        own(precision="tf32"),
        ValueError,
        "`products.weight_grad.precision` must be a jax.lax.Precision, a"
        " jax.lax.DotAlgorithmPreset, the name of either, or one of these for each"
        " operand, got 'tf32'. Did you mean 'tensorfloat32'?",
    ),
    "number as precision": (
        (X, W, B),
        {"precision": 3},
        ValueError,
        "`precision` must be a jax.lax.Precision, a jax.lax.DotAlgorithmPreset, the"
        " name of either, or one of these for each operand, got 3",
    ),
    "one product as products": (
        (X, W, B),
        {"products": Product("bfloat16")},
        TypeError,
        "`products` must be a jaxlinear.Products, got Product: say for which, as in"
        " `Products(weight_grad=...)`",
    ),
    **{
        f"{given!r} as products": (
            (X, W, B),
            {"products": given},
            TypeError,
            f"`products` must be a jaxlinear.Products, got {got}",
        )
        for given, got in {
            "FLOAT8": "'FLOAT8'. Did you mean `jaxlinear.FLOAT8`?",
            "float8_e4m3": "'float8_e4m3'. Did you mean `jaxlinear.FLOAT8_E4M3`?",
            "fp8": "'fp8'. Did you mean `jaxlinear.FLOAT8`?",
            "int8": "'int8'. Did you mean `jaxlinear.INT8`?",
            jnp.int8: "'int8'. Did you mean `jaxlinear.INT8`?",
            "bf16": "'bf16'. Did you mean `dtype='bfloat16'`?",
            "highest": "'highest'. Did you mean `precision='highest'`?",
            "exact": "'exact'",
            tuple(Products()): "tuple. Did you mean `Products(*...)`?",
            float: "type",
        }.items()
    },
    "dict as products": (
        (X, W, B),
        {"products": {"forward": Product()}},
        TypeError,
        "`products` must be a jaxlinear.Products, got dict. Did you mean"
        " `Products(**...)`?",
    ),
    "recipe as product": (
        (X, W, B),
        {"products": Products(forward=jaxlinear.FLOAT8)},
        TypeError,
        "`products.forward` must be a jaxlinear.Product, got Products. Did you mean its"
        " `forward`?",
    ),
    "None as product": (
        (X, W, B),
        {"products": Products(weight_grad=None)},
        TypeError,
        "`products.weight_grad` must be a jaxlinear.Product, got NoneType",
    ),
    "dtype as product": (
        (X, W, B),
        {"products": Products("bfloat16")},
        TypeError,
        "`products.forward` must be a jaxlinear.Product, got 'bfloat16'. Did you mean"
        " `Product('bfloat16')`?",
    ),
    "product that leaves in another dtype": (
        (X, W, B),
        {"dtype": "bfloat16", **own(preferred_element_type="float16")},
        TypeError,
        f"{PREFERRED} float32 or bfloat16, got float16",
    ),
    "product that leaves below float32": (
        (X, W, B),
        own(preferred_element_type="bfloat16"),
        TypeError,
        f"{PREFERRED} float32, got bfloat16",
    ),
    "float32 gradient that leaves in bfloat16": (
        (X, W, B),
        {
            "dtype": "bfloat16",
            **own(dtype="float32", preferred_element_type="bfloat16"),
        },
        TypeError,
        f"{PREFERRED} float32, got bfloat16",
    ),
    "product that leaves in integers": (
        (X, W, B),
        own(preferred_element_type="int8"),
        TypeError,
        f"{PREFERRED} a floating or complex dtype, got int8",
    ),
    "integer operands": (
        (X, W, B),
        own(dtype="int16"),
        TypeError,
        f"{DTYPE} a floating or complex dtype or int8, got int16",
    ),
    "two dtypes": (
        (X, W, B),
        own(dtype=("bfloat16", "float16")),
        ValueError,
        f"{DTYPE} two equal dtypes, got bfloat16 and float16",
    ),
    "three dtypes": (
        (X, W, B),
        own(dtype=("bfloat16",) * 3),
        ValueError,
        f"{DTYPE} one dtype or two, got ('bfloat16', 'bfloat16', 'bfloat16')",
    ),
    "complex operands of a real layer": (
        (X, W, B),
        own(dtype="complex64"),
        TypeError,
        f"{DTYPE} floating as float32 is, got complex64",
    ),
    "real operands of a complex layer": (
        (*COMPLEX, None),
        own(dtype="bfloat16"),
        TypeError,
        f"{DTYPE} complex as complex64 is, got bfloat16",
    ),
    "alternative float16 forward": (
        (X, W, B),
        {"products": Products(forward=ALTERNATIVE_FLOAT16.weight_grad)},
        ValueError,
        "`products.forward.dtype` must be a dtype, got alternative_float16, which ROCm"
        " has only for gradients",
    ),
    "8 bits of which one operand has two": (
        (X, W, B),
        own(dtype=("float8_e4m3fn", "int8")),
        ValueError,
        f"{DTYPE_OF_8_BITS} float8_e4m3fn and int8",
    ),
    "8 bits beside 16": (
        (X, W, B),
        own(dtype=("float8_e4m3fn", "bfloat16")),
        ValueError,
        f"{DTYPE_OF_8_BITS} float8_e4m3fn and bfloat16",
    ),
    "e5m2 twice, which no platform multiplies": (
        (X, W, B),
        own(dtype="float8_e5m2"),
        ValueError,
        f"{DTYPE_OF_8_BITS} float8_e5m2 and float8_e5m2",
    ),
    "8 bits that leave in bfloat16": (
        (X, W, B),
        {
            "dtype": "bfloat16",
            **own(dtype="float8_e4m3fn", preferred_element_type="bfloat16"),
        },
        TypeError,
        f"{PREFERRED} float32, got bfloat16",
    ),
    "int8 that leaves in float32": (
        (X, W, B),
        own(dtype="int8", preferred_element_type="float32"),
        TypeError,
        f"{PREFERRED} int32, got float32",
    ),
    "float8 that leaves in int32": (
        (X, W, B),
        own(dtype="float8_e4m3fn", preferred_element_type="int32"),
        TypeError,
        f"{PREFERRED} a floating or complex dtype, got int32",
    ),
    "8 bits of a complex layer": (
        (*COMPLEX, None),
        own(dtype="int8"),
        TypeError,
        "`products.weight_grad.dtype` of 8 bits must be in a layer of a floating dtype,"
        " got complex64",
    ),
    "8 bits of a layer of integers": (
        (X.astype(int), W.astype(int), None),
        own(dtype="int8"),
        TypeError,
        "`products.weight_grad.dtype` of 8 bits must be in a layer of a floating dtype,"
        " got int32",
    ),
    "a scaling that is none": (
        (X, W, B),
        own(dtype="int8", scaling="per_block"),
        ValueError,
        "`products.weight_grad.scaling` must be 'per_tensor' or 'per_row', got"
        " 'per_block'",
    ),
    "a scaling without 8 bits": (
        (X, W, B),
        own(dtype="bfloat16", scaling="per_row"),
        ValueError,
        "`products.weight_grad.scaling` must be None without 8 bits, got 'per_row'",
    ),
    "dtype of products of integers": (
        (X.astype(int), W.astype(int), None),
        own(dtype="bfloat16"),
        TypeError,
        f"{DTYPE} integer as int32 is, got bfloat16",
    ),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_by_name(call):
    arguments, *options, error, message = call
    options = options[0] if options else {}

    def refused(layer):
        with pytest.raises(error, match=f"^{re.escape(message)}(\\n|$)") as refusal:
            layer(*arguments, **options)
        assert len(str(refusal.value).partition("\n")[0]) < 300

    refused(linear)
    with jaxlinear.plain_autodiff():
        refused(linear)
    refused(
        lambda *arguments, **options: jax.jit(lambda: linear(*arguments, **options))()
    )


def test_a_dtype_that_needs_x64_is_truncated_with_jax_own_warning():
    with pytest.warns(UserWarning, match="float64.*will be truncated to dtype float32"):
        assert linear(X, W, B, dtype="float64").dtype == "float32"


# What is accepted.


class JaxArrayLike:
    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


class NumPyArrayLike:
    def __init__(self, value):
        self.value = np.asarray(value)

    def __array__(self, dtype=None, copy=None):
        return self.value if dtype is None else self.value.astype(dtype)


def pytorch_tensor(value):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    return torch.from_numpy(np.array(value))


def flax_parameter(value):
    return pytest.importorskip("flax.nnx").Param(value)


KINDS = [np.asarray, JaxArrayLike, NumPyArrayLike, flax_parameter, pytorch_tensor]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whatever_jax_numpy_takes_for_an_array_is_one(kind):
    arrays = [kind(a) for a in (X, W, B)]
    expected = X @ W.T + B[None]
    np.testing.assert_array_equal(linear(*arrays), expected)
    np.testing.assert_array_equal(jax.jit(lambda: linear(*arrays))(), expected)
    for position, array in enumerate((X, W, B)):

        def loss(array, position=position):
            given = [*arrays[:position], array, *arrays[position + 1 :]]
            return jnp.sum(linear(*given))

        def reference(array, position=position):
            given = [X, W, B]
            given[position] = array
            return jnp.sum(linear(*given))

        np.testing.assert_array_equal(jax.grad(loss)(array), jax.grad(reference)(array))


INTEGERS = ["int8", "uint8", "int16", "int32", "bool"]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_where_all_arguments_are_integers_so_is_the_result(dtype, with_bias):
    generator = np.random.default_rng(0)
    shapes = (2, 5, 7), (3, 7), (3,)
    x, weight, bias = (
        jnp.asarray(generator.integers(0, 100, s)).astype(dtype) for s in shapes
    )
    expected = jnp.matmul(x, weight.T)
    if with_bias:
        expected += bias[None, None]
    actual = linear(x, weight, bias if with_bias else None)
    assert actual.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(actual, expected)  # Both wrap around.
    np.testing.assert_array_equal(jax.vmap(linear, (0, None))(x, weight), x @ weight.T)


def test_integers_of_several_kinds_are_promoted_as_jax_numpy_does():
    x, weight = jnp.full((2, 3), 100, "int8"), jnp.full((4, 3), 100, "int16")
    with jax.numpy_dtype_promotion("standard"):
        assert linear(x, weight).dtype == (x @ weight.T).dtype == "int16"
        floating = linear(x, weight.astype("bfloat16"))
        assert floating.dtype == (x @ weight.astype("bfloat16").T).dtype == "bfloat16"
    with pytest.raises(jax.dtypes.TypePromotionError):
        linear(x, weight)


def test_integer_results_are_those_of_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    generator = np.random.default_rng(1)
    arrays = [generator.integers(-9, 9, s).astype("int32") for s in ((5, 7), (3, 7), 3)]
    expected = torch.nn.functional.linear(*map(torch.from_numpy, arrays))
    np.testing.assert_array_equal(linear(*arrays), expected.numpy())


def test_integer_parameters_have_no_gradient_and_a_floating_input_has_one():
    x, weight, bias = X, jnp.arange(12).reshape(4, 3), jnp.arange(4)
    layer = functools.partial(linear, dtype="float32")
    gradients = jax.grad(lambda *a: layer(*a).sum(), (0, 1, 2), allow_int=True)
    of_x, *of_parameters = gradients(x, weight, bias)
    np.testing.assert_array_equal(of_x, np.tile(weight.sum(0), (2, 1)))
    assert all(gradient.dtype == jax.dtypes.float0 for gradient in of_parameters)
