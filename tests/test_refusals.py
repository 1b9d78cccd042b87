"""Bad input is refused before anything is computed, by name."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxlinear import linear

X, W, B = jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones(4)

REFUSED = {
    "scalar x": (
        (1.0, W, B),
        {},
        ValueError,
        "`x` must have at least one axis, (*, in), got a scalar",
    ),
    "weight vector": (
        (X, W[0], B),
        {},
        ValueError,
        "`weight` must be a matrix (out, in), got shape (3,)",
    ),
    "weight of three axes": (
        (X, W[None], B),
        {},
        ValueError,
        "`weight` must be a matrix (out, in), got shape (1, 4, 3)",
    ),
    "other in_features": (
        (X.T, W, B),
        {},
        ValueError,
        "`x` must have 3 elements along its last axis, as `weight` of shape (4, 3)"
        " does, got shape (3, 2)",
    ),
    "bias of one element": (
        (X, W, B[:1]),
        {},
        ValueError,
        "`bias` must have shape (4,), one element for each row of `weight`,"
        " got shape (1,)",
    ),
    "bias matrix": (
        (X, W, B[None]),
        {},
        ValueError,
        "`bias` must have shape (4,), one element for each row of `weight`,"
        " got shape (1, 4)",
    ),
    "scalar bias": (
        (X, W, 0.5),
        {},
        ValueError,
        "`bias` must have shape (4,), one element for each row of `weight`,"
        " got shape ()",
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
    "reduce_dtype of no product": (
        (X, W, B),
        {"dtype": "bfloat16", "reduce_dtype": "float16"},
        TypeError,
        "`reduce_dtype` must be bfloat16 or float32, got float16",
    ),
    "reduce_dtype below float32": (
        (X, W, B),
        {"reduce_dtype": "bfloat16"},
        TypeError,
        "`reduce_dtype` must be float32, got bfloat16",
    ),
    "integer reduce_dtype": (
        (X, W, B),
        {"reduce_dtype": "int8"},
        TypeError,
        "`reduce_dtype` must be a floating or complex dtype, got int8",
    ),
    "reduce_dtype of neither pass": (
        (X, W, B),
        {"dtype": "float16", "backward_dtype": "bfloat16", "reduce_dtype": "float64"},
        TypeError,
        "`reduce_dtype` must be float16 or bfloat16 or float32, got float64",
    ),
    "integer backward_dtype": (
        (X, W, B),
        {"backward_dtype": "int8"},
        TypeError,
        "`backward_dtype` must be a floating or complex dtype, got int8",
    ),
    "complex backward_dtype": (
        (X, W, B),
        {"backward_dtype": "complex64"},
        TypeError,
        "`backward_dtype` must be floating as float32 is, got complex64",
    ),
    "real backward_dtype of complex arguments": (
        (X.astype("complex64"), W.astype("complex64"), None),
        {"backward_dtype": "bfloat16"},
        TypeError,
        "`backward_dtype` must be complex as complex64 is, got bfloat16",
    ),
    "no dtype": (
        (X, W, B),
        {"dtype": "float31"},
        TypeError,
        "`dtype` must be a floating or complex dtype, got 'float31'",
    ),
    "real dtype of a complex x": (
        (X.astype("complex64"), W, B),
        {"dtype": "float32"},
        TypeError,
        "`dtype` must be complex for complex arguments, got float32",
    ),
    "list": (
        ([[1.0, 2.0, 3.0]], W, B),
        {},
        TypeError,
        "`x` must be an array, got list",
    ),
    "no weight": (
        (X, None, B),
        {},
        TypeError,
        "`weight` must be an array, got NoneType",
    ),
    "bias tuple": (
        (X, W, (1.0,) * 4),
        {},
        TypeError,
        "`bias` must be an array, got tuple",
    ),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_bad_arguments_are_refused_by_name(call, wrapped):
    arguments, options, error, message = call
    with pytest.raises(error, match=f"^{re.escape(message)}(\\n|$)"):
        wrapped(lambda *a: linear(*a, **options))(*arguments)


def test_string_is_refused_by_jax_itself():
    with pytest.raises(TypeError, match="path weight"):
        linear(X, "weight")


def test_a_dtype_that_needs_x64_is_truncated_with_jax_own_warning():
    with pytest.warns(UserWarning, match="float64.*will be truncated to dtype float32"):
        assert linear(X, W, B, dtype="float64").dtype == "float32"
