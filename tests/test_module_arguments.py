"""What the constructors of both modules refuse, before anything is drawn."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as flax_linen
from flax import nnx as flax_nnx

from jaxlinear import Product, Products, linen, nnx

X = jnp.ones((2, 3))
initializers = flax_nnx.initializers
leaves_in_bfloat16 = Product(preferred_element_type="bfloat16")


class NNX:
    def __new__(cls, features=4, **options):
        return nnx.Linear(3, features, rngs=flax_nnx.Rngs(0), **options)

    features = "out_features"


class Linen:
    """A module whose parameters are drawn when it is constructed, as those of NNX."""

    def __new__(cls, features=4, **options):
        module = linen.Linear(features, **options)
        return module.bind(module.init(jax.random.key(0), X))

    features = "features"


each_api = pytest.mark.parametrize("layer", [NNX, Linen], ids=lambda api: api.__name__)

# What the constructor is given: the error, and its message. FEATURES: their name.
REFUSED = {
    "fractional features": (
        {"features": 3.5},
        TypeError,
        "`FEATURES` must be an integer, got 3.5",
    ),
    "negative features": (
        {"features": -1},
        ValueError,
        "`FEATURES` must not be negative, got -1",
    ),
    "features as an array": (
        {"features": jnp.int32(4)},
        TypeError,
        "`FEATURES` must be an integer, got a JAX array",
    ),
    "integer dtype": (
        {"dtype": "int32"},
        TypeError,
        "`dtype` must be a floating or complex dtype, got int32",
    ),
    "integer param_dtype": (
        {"param_dtype": int},
        TypeError,
        "`param_dtype` must be a floating or complex dtype, got int64",
    ),
    "no param_dtype": (
        {"param_dtype": None},
        TypeError,
        "`param_dtype` must be a floating or complex dtype, got None",
    ),
    "param_dtype of four bits": (
        {"param_dtype": "float4_e2m1fn"},
        TypeError,
        "`param_dtype` must have a sign and at least 8 bits, else most parameters would"
        " be drawn as zeros, got float4_e2m1fn",
    ),
    "param_dtype without a sign": (
        {"param_dtype": "float8_e8m0fnu"},
        TypeError,
        "`param_dtype` must have a sign and at least 8 bits, else most parameters would"
        " be drawn as zeros, got float8_e8m0fnu",
    ),
    "no device": (
        {"device": "cpu"},
        TypeError,
        "`device` must be a jax.Device or a jax.sharding.Sharding, got 'cpu'",
    ),
    "precision with a typo": (
        {"precision": "hihg"},
        ValueError,
        "`precision` must be a jax.lax.Precision, a jax.lax.DotAlgorithmPreset, the"
        " name of either, or one of these for each operand, got 'hihg'. Did you mean"
        " 'high'?",
    ),
    "a product in another dtype than it can leave in": (
        {"dtype": "float32", "products": Products(weight_grad=leaves_in_bfloat16)},
        TypeError,
        "`products.weight_grad.preferred_element_type` must be float32, got bfloat16",
    ),
    "number as initializer": (
        {"kernel_init": 0.0},
        TypeError,
        "`kernel_init` must be a function init(key, shape, dtype), got 0.0",
    ),
    "array as initializer": (
        {"bias_init": np.zeros(2)},
        TypeError,
        "`bias_init` must be a function init(key, shape, dtype), got array([0., 0.])",
    ),
    "factory that was not called": (
        {"kernel_init": initializers.zeros_init},
        TypeError,
        "`kernel_init` must be a function init(key, shape, dtype), got"
        f" {initializers.zeros_init!r}: too many positional arguments. If it makes"
        " initializers, call it",
    ),
    "factory that takes three arguments": (
        {"kernel_init": initializers.he_normal},
        TypeError,
        "`kernel_init` must return an array of shape (3, 4), got function. If it makes"
        " initializers, call it",
    ),
    "initializer of another shape": (
        {"kernel_init": lambda *_: jnp.ones((4, 3))},
        ValueError,
        "`kernel_init` must return an array of shape (3, 4), got shape (4, 3)",
    ),
    "initializer of a box of ours": (
        {"bias_init": lambda *_: [0.0] * 4},
        TypeError,
        "`bias_init` must return an array of shape (4,), got list. If it makes"
        " initializers, call it",
    ),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
@each_api
def test_bad_arguments_are_refused_by_name(layer, refused):
    options, error, message = refused
    message = re.escape(message.replace("FEATURES", layer.features))
    with pytest.raises(error, match=f"^{message}(\n|$)"):
        layer(**options)


def test_a_dtype_that_would_draw_zeros_alone_is_refused():
    message = "^`param_dtype` must have values inside ±0.001 other than zero, got float"
    with pytest.raises(ValueError, match=message):
        nnx.Linear(1_000_000, 1, param_dtype="float8_e4m3fn", rngs=flax_nnx.Rngs(0))


@each_api
def test_bad_input_is_refused_by_name(layer):
    apply = layer()
    for x, error, message in (
        ([1.0, 2.0, 3.0], TypeError, "`x` must be an array, got list"),
        (1.0, ValueError, "`x` must have at least one axis, (*, in), got a scalar"),
        (X.T, ValueError, "`x` must have 3 elements along its last axis, as `weight`"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            apply(x)


@pytest.mark.parametrize("bad", [{"device": "cpu"}, {"bias_init": 0.0}], ids=str)
def test_nothing_is_drawn_before_a_bad_argument_is_refused(bad):
    rngs = flax_nnx.Rngs(0)
    with pytest.raises(TypeError, match=f"`{next(iter(bad))}`"):
        nnx.Linear(3, 4, rngs=rngs, **bad)
    assert rngs.params.count[...] == 0


def test_a_box_that_cannot_be_placed_is_refused_with_what_to_do():
    boxed = flax_nnx.with_partitioning(initializers.zeros, ("in", "out"))
    with pytest.raises(TypeError, match=r"^an initializer must return an array where"):
        NNX(kernel_init=boxed, device=jax.devices()[1])
    boxed = flax_linen.with_partitioning(initializers.zeros, ("in", "out"))
    weight = Linen(kernel_init=boxed, device=jax.devices()[1]).variables["params"][
        "weight"
    ]
    assert weight.value.devices() == {jax.devices()[1]}


@each_api
def test_modules_with_lists_for_pairs_have_a_hash(layer):
    pair = Product(["bfloat16", "bfloat16"], ["highest", "default"])
    module = layer(precision=["highest", "default"], products=Products(pair))
    static = flax_nnx.graphdef(module) if layer is NNX else module.clone(parent=None)
    assert isinstance(hash(static), int)
