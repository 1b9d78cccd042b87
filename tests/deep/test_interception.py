"""Quantizers and K-FAC find our products inside ``jaxlinear.plain_autodiff()``.

The oracle is what the same library makes of Flax's layer or of the naive formula.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import random_array, random_problem

nnx, linen = pytest.importorskip("flax.nnx"), pytest.importorskip("flax.linen")

import jaxlinear.linen  # noqa: E402
import jaxlinear.nnx  # noqa: E402
from jaxlinear import linear, plain_autodiff  # noqa: E402

# The libraries use what JAX and Flax have deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

close = {"rtol": 1e-6, "atol": 1e-6}  # Eight eps of float32, at values of about 1.


def naive(x, weight, bias=None):
    y = lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
    return y if bias is None else y + jnp.expand_dims(bias, 0)


def differ(a, b):
    return np.max(np.abs(a - b)) > 1e-3


# Qwix exchanges the code of `lax.dot_general` while a quantized model is called.


@pytest.fixture
def qwix():
    module = pytest.importorskip("qwix", reason="Qwix is not installed")
    with jax.numpy_dtype_promotion("standard"):  # It multiplies int32 by float32.
        yield module


def same_models():
    """Two layers of ours, and two of Flax with the same parameters."""

    def model(layer):
        hidden, head = layer(16, 24, rngs=nnx.Rngs(0)), layer(24, 3, rngs=nnx.Rngs(1))
        return nnx.Sequential(hidden, jnp.tanh, head)

    ours, flax = model(jaxlinear.nnx.Linear), model(nnx.Linear)
    for mine, theirs in zip(ours.layers[::2], flax.layers[::2], strict=True):
        theirs.kernel[...], theirs.bias[...] = mine.weight[...].T, mine.bias[...]
    return ours, flax, random_array(0, (5, 16), "float32")


def quantize(qwix, model, x, provider=None):
    rule = qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
    return qwix.quantize_model(model, (provider or qwix.QtProvider)([rule]), x)


def test_qwix_keeps_our_weights_quantized_as_those_of_flax_inside_the_switch(qwix):
    ours, flax, x = same_models()
    expected = quantize(qwix, flax, x, qwix.PtqProvider)(x)
    with plain_autodiff():
        actual = quantize(qwix, ours, x, qwix.PtqProvider)(x)
    np.testing.assert_allclose(actual, expected, **close)
    assert differ(expected, flax(x))


def test_qwix_trains_our_layers_quantized_inside_the_switch(qwix):
    def gradients(model):
        return jax.tree.leaves(nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model))

    ours, flax, x = same_models()
    expected = gradients(quantize(qwix, flax, x))
    with plain_autodiff():
        actual = gradients(quantize(qwix, ours, x))
    for mine, theirs, plain in zip(actual, expected, gradients(flax), strict=True):
        np.testing.assert_allclose(mine.T, theirs, rtol=1e-5, atol=1e-5)
        assert differ(theirs, plain)


@pytest.mark.parametrize("first", ["quantized", "unquantized"])
def test_no_cache_serves_a_quantized_product_to_an_unquantized_call(qwix, first):
    ours, flax, x = same_models()
    unquantized, quantized = flax(x), quantize(qwix, flax, x)(x)
    assert differ(quantized, unquantized)
    jax.clear_caches()
    if first == "unquantized":
        np.testing.assert_allclose(ours(x), unquantized, **close)
    with plain_autodiff():
        model = quantize(qwix, ours, x)
        for _ in range(2):
            np.testing.assert_allclose(model(x), quantized, **close)
            np.testing.assert_allclose(ours(x), unquantized, **close)
    np.testing.assert_allclose(ours(x), unquantized, **close)


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("kept", ["weights", "weights and activations", "training"])
def test_qwix_quantizes_our_layers_as_those_of_flax(qwix, kept, called_before):
    ours, flax, x = same_models()
    unquantized = flax(x)
    if called_before:
        np.testing.assert_allclose(ours(x), unquantized, **close)
    else:
        jax.clear_caches()
    activations = {} if kept == "weights" else {"act_qtype": jnp.int8}
    rules = [qwix.QuantizationRule(weight_qtype=jnp.int8, **activations)]
    provider = qwix.QtProvider if kept == "training" else qwix.PtqProvider

    def quantized(model):
        model = qwix.quantize_model(model, provider(rules), x)
        return model(x), [leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))]

    (actual, dtypes), (expected, expected_dtypes) = map(quantized, (ours, flax))
    np.testing.assert_allclose(actual, expected, **close)
    assert sorted(map(str, dtypes)) == sorted(map(str, expected_dtypes))
    assert differ(expected, unquantized)
    # And nothing of it is left behind.
    np.testing.assert_allclose(ours(x), unquantized, **close)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("called_before", [False, True])
def test_qwix_adds_lora_to_our_layers_as_to_those_of_flax(qwix, called_before):
    ours, flax, x = same_models()
    if called_before:
        ours(x)
    else:
        jax.clear_caches()
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=1.0)

    def adapted(model):
        model = qwix.apply_lora_to_model(model, provider, x)
        sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
        return model(x), sorted(sizes)

    (actual, sizes), (expected, expected_sizes) = map(adapted, (ours, flax))
    np.testing.assert_allclose(actual, expected, **close)
    assert sizes == expected_sizes
    assert len(sizes) == 4


def test_a_backward_pass_that_is_traced_beside_a_replaced_product_is_ours():
    x, weight, _, cotangent = random_problem((4,), 16, 8, "bfloat16")
    weight = weight.astype("float32")

    def refused(*args, **kwargs):
        raise AssertionError("somebody's product")

    jax.clear_caches()
    _, vjp = jax.vjp(lambda x, w: linear(x, w, dtype="bfloat16"), x, weight)
    _, linearized = jax.linearize(lambda w: linear(x, w, dtype="bfloat16"), weight)
    with mock.patch.object(lax, "dot_general", refused):
        beside = [*vjp(cotangent), linearized(weight)]
    afterwards = [*vjp(cotangent), linearized(weight)]
    jax.clear_caches()
    alone = [*vjp(cotangent), linearized(weight)]
    for found, later, expected in zip(beside, afterwards, alone, strict=True):
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(later, expected)


# AQT puts its own `dot_general` in the place of `lax.dot_general`.


@pytest.fixture
def int8_dot_general():
    config = pytest.importorskip("aqt.jax.v2.config", reason="AQT is not installed")
    return config.fully_quantized(use_stochastic_rounding=False)


def test_aqt_quantizes_linear_and_its_gradients_inside_the_switch(int8_dot_general):
    arguments = random_problem((4,), 16, 8, "float32")[:3]

    def output_and_gradients(function):
        y, vjp = jax.vjp(function, *arguments)
        return y, *vjp(y)

    with mock.patch.object(lax, "dot_general", int8_dot_general):
        expected = output_and_gradients(naive)
        with plain_autodiff():
            actual = output_and_gradients(linear)
    plain = output_and_gradients(naive)
    for mine, theirs, without in zip(actual, expected, plain, strict=True):
        np.testing.assert_allclose(mine, theirs, **close)
        assert differ(theirs, without)


def test_aqt_intercepts_our_linen_layer_as_dense_inside_the_switch(int8_dot_general):
    from aqt.jax.v2.flax.intercept import aqt_intercept_methods as intercept

    x, weight, bias, _ = random_problem((4,), 16, 8, "float32")

    class Generator(intercept.AqtDotGeneralGenerator):
        def generate_by_module(self, module):  # AQT's own asks for a `linen.Dense`.
            if isinstance(module, jaxlinear.linen.Linear):
                module = linen.Dense(module.features)
            return super().generate_by_module(module)

    def quantized(layer, **parameters):
        generator = Generator(int8_dot_general)
        with intercept.intercept_methods_replace_dot_general(generator):
            return layer.apply({"params": parameters}, x, rngs=jax.random.key(0))

    expected = quantized(linen.Dense(8), kernel=weight.T, bias=bias)
    with plain_autodiff():
        actual = quantized(jaxlinear.linen.Linear(8), weight=weight, bias=bias)
    np.testing.assert_allclose(actual, expected, **close)
    assert differ(expected, naive(x, weight, bias))


# K-FAC tags the layers that it knows in a jaxpr. Its dense one has a weight (in, out):
# in ours, as in the naive formula, it finds the bias, and the rest by another pattern.


def layer_tags(kfac_jax, layer, patterns=()):
    x, *parameters, _ = random_problem((4,), 16, 8, "float32")

    def loss(parameters, x):
        y = layer(jnp.tanh(layer(x, *parameters[:2])), parameters[2])
        kfac_jax.register_squared_error_loss(y, jnp.zeros_like(y))

    arguments = (*parameters, random_array(1, (3, 8), "float32")), x
    patterns += kfac_jax.tag_graph_matcher.DEFAULT_GRAPH_PATTERNS
    with jax.numpy_rank_promotion("allow"):  # Its own pattern is `y + b`.
        tagged = kfac_jax.auto_register_tags(loss, arguments, graph_patterns=patterns)
    eqns = jax.make_jaxpr(tagged)(*arguments).eqns
    return [e.params["meta"].name for e in eqns if e.primitive.name == "layer_tag"]


def out_in_pattern(kfac_jax, name, *parameters):
    meta = {"outputs_index": (0,), "inputs_index": (1,)}
    meta["params_index"] = (2, 3)[: len(parameters)]
    return kfac_jax.tag_graph_matcher.GraphPattern(
        name,
        kfac_jax.layers_and_loss_tags.layer_tag,
        lambda x, parameters: naive(x, *parameters),
        lambda _: {"meta": kfac_jax.LayerMetaData(variant="dense", **meta)},
        [np.zeros((2, 2)), list(parameters)],
    )


def test_kfac_finds_our_layers_as_the_naive_formula_inside_the_switch():
    try:
        kfac_jax = pytest.importorskip("kfac_jax", reason="KFAC-JAX is not installed")
    except AttributeError as error:
        pytest.skip(f"KFAC-JAX cannot be imported with JAX {jax.__version__}: {error}")
    biased = out_in_pattern(kfac_jax, "biased", np.zeros((2, 2)), np.zeros(2))
    patterns = biased, out_in_pattern(kfac_jax, "plain", np.zeros((2, 2)))
    with plain_autodiff():
        by_default = layer_tags(kfac_jax, linear)
        by_pattern = layer_tags(kfac_jax, linear, patterns)
    assert by_default == layer_tags(kfac_jax, naive)
    assert "shift_only" in by_default[2]
    assert [tag.split("match_type=")[1] for tag in by_pattern] == ["biased]", "plain]"]
    assert all("generic" in tag for tag in layer_tags(kfac_jax, linear, patterns))
