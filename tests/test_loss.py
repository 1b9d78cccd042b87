"""The loss of a linear layer against float64, PyTorch, and the loss from its logits."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracle import (
    exact,
    exact_loss,
    exact_loss_gradients,
    loss_and_gradients,
    problem,
    relative,
    unfused,
)

import jaxlinear
from jaxlinear import Product, Products, linear_cross_entropy, linear_log_likelihood

VOCABULARIES = [1, 2, 7, 1000, 2049, 5003]
OPTIONS = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "soft cap": {"soft_cap": 3.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "soft_cap": 5.0},
}
REDUCTIONS = ["mean", "sum", "none"]


@pytest.mark.parametrize("classes", VOCABULARIES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradients_are_those_of_float64(classes, reduction):
    h, weight, labels, bias, weights = problem(classes)

    def loss(h, weight, bias):
        options = {"reduction": reduction, "weights": weights}
        return linear_cross_entropy(h, weight, labels, bias, **options)

    found, gradients = loss_and_gradients(loss, h, weight, bias)
    arguments, options = (h, weight, labels, bias), {"reduction": reduction}
    expected = exact_loss(*arguments, weights=weights, **options)
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-6, atol=1e-6)
    expected = exact_loss_gradients(*arguments, weights=weights, **options)
    # Of few classes G is p - 1 for half of the tokens, and its sum is small.
    of_all = 1.0 if reduction == "mean" else weights.sum()
    for gradient, of_float64 in zip(gradients, expected, strict=True):
        error = np.linalg.norm(gradient - of_float64)
        assert error <= 1e-6 * max(np.linalg.norm(of_float64), of_all)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options_have_the_gradients_of_float64(name, reduction):
    h, weight, labels, _, weights = problem(1500)
    options = OPTIONS[name] | {"reduction": reduction, "ignore_index": 7}
    labels = labels.at[0, 0].set(7)

    def loss(h, weight):
        return linear_cross_entropy(h, weight, labels, weights=weights, **options)

    found, gradients = loss_and_gradients(loss, h, weight)
    expected = exact_loss(h, weight, labels, weights=weights, **options)
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-6)
    expected = exact_loss_gradients(h, weight, labels, weights=weights, **options)
    for gradient, of_float64 in zip(gradients, expected, strict=False):
        assert relative(gradient, of_float64) <= 1e-6


@pytest.mark.parametrize("leading", [(), (1,), (300,), (2, 1, 5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_number_of_leading_axes_and_rows_that_no_block_divides(leading, reduction):
    h, weight, labels, bias, _ = problem(300, leading, seed=1)
    labels = jnp.maximum(labels, 0)
    loss = partial(linear_cross_entropy, labels=labels, reduction=reduction)
    found, gradients = loss_and_gradients(
        lambda h, weight, bias: loss(h, weight, bias=bias), h, weight, bias
    )
    arguments = h, weight, labels, bias
    expected = exact_loss(*arguments, reduction=reduction)
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-6)
    expected = exact_loss_gradients(*arguments, reduction=reduction)
    for gradient, of_float64 in zip(gradients, expected, strict=True):
        assert gradient.shape == of_float64.shape
        assert relative(gradient, of_float64) <= 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("rows", "features"), [(0, 8), (3, 0), (0, 0)])
def test_neither_rows_nor_features_are_needed(rows, features, reduction, dtype):
    h, weight = jnp.ones((rows, 2, features)), jnp.ones((5, features))
    labels = jnp.zeros((rows, 2), int)

    def loss(h, weight, bias):
        options = {"reduction": reduction, "dtype": dtype, "label_smoothing": 0.1}
        return linear_cross_entropy(h, weight, labels, bias, **options)

    found, gradients = loss_and_gradients(loss, h, weight, jnp.zeros(5))
    tokens = min(2 * rows, 1) if reduction == "mean" else 2 * rows
    np.testing.assert_allclose(found, tokens * np.log(5), rtol=1e-6)
    expected = tokens * np.array([0.2 - 0.92, *[0.2 - 0.02] * 4])
    np.testing.assert_allclose(gradients[2], expected, atol=1e-6)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        h, weight, labels, bias, _ = problem(1200, dtype="float64")
        loss = partial(linear_cross_entropy, labels=labels)
        found, gradients = loss_and_gradients(
            lambda h, weight, bias: loss(h, weight, bias=bias), h, weight, bias
        )
        assert found.dtype == "float64"
        assert relative(found, exact_loss(h, weight, labels, bias)) <= 1e-14
        expected = exact_loss_gradients(h, weight, labels, bias)
        for gradient, of_float64 in zip(gradients, expected, strict=True):
            assert relative(gradient, of_float64) <= 1e-13


# Low precision.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_in_few_bits_are_more_exact_than_those_with_logits(dtype, reduction):
    h, weight, labels, bias, _ = problem(3000, (200,), features=64)
    h, weight = (a.astype(dtype).astype("float32") for a in (h, weight / 4))
    product = Product(dtype)
    products = Products(
        Product(dtype, preferred_element_type="float32"), product, product
    )

    def ours(h, weight, bias):
        options = {"reduction": reduction, "dtype": dtype}
        return linear_cross_entropy(h, weight, labels, bias, **options)

    def with_logits(h, weight, bias):
        losses = unfused(h, weight, labels, bias, products=products)
        is_counted = (labels >= 0).astype("float32")
        return losses.sum() / (is_counted.sum() if reduction == "mean" else 1)

    expected = exact_loss_gradients(h, weight, labels, bias, reduction=reduction)
    found, gradients = loss_and_gradients(ours, h, weight, bias)
    _, others = loss_and_gradients(with_logits, h, weight, bias)
    exactly = exact_loss(h, weight, labels, bias, reduction=reduction).sum()
    assert relative(found, exactly) <= 1e-6
    for k in range(2):
        limit = relative(others[k], expected[k]) / 3
        assert relative(gradients[k], expected[k]) <= limit
    assert relative(gradients[2], expected[2]) <= 1e-6


def test_gradients_leave_in_the_dtypes_of_their_arguments():
    h, weight, labels, bias, _ = problem(50)
    arguments = h.astype("bfloat16"), weight, bias.astype("float16")

    def loss(h, weight, bias):
        return linear_cross_entropy(h, weight, labels, bias, dtype="bfloat16")

    found, gradients = loss_and_gradients(loss, *arguments)
    assert found.dtype == "float32"
    assert [g.dtype for g in gradients] == ["bfloat16", "float32", "float16"]


def test_a_large_vocabulary_does_not_underflow_in_float16():
    h, weight, labels, _, _ = problem(30_000, (8,))

    def loss(h, weight):
        return 1e-6 * linear_cross_entropy(h, weight, labels, dtype="float16")

    _, gradients = loss_and_gradients(loss, h, weight)
    expected = exact_loss_gradients(h, weight, labels)
    for gradient, of_float64 in zip(gradients, expected, strict=False):
        assert relative(gradient, 1e-6 * of_float64) <= 1e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("order", ["forward over reverse", "reverse", "over forward"])
def test_second_derivatives_stay_in_the_range_of_float16(reduction, order):
    h, weight, labels, bias, _ = problem(40, (1025,))
    arrays = h / 4, weight, bias

    def second(loss):
        def tangent(*arrays):
            return jax.jvp(loss, arrays, arrays)[1]

        def gradient_along(*arrays):
            gradients = jax.grad(loss, (0, 1, 2))(*arrays)
            return sum(map(jnp.vdot, gradients, arrays))

        if order == "forward over reverse":
            return jax.jvp(jax.grad(loss, (0, 1, 2)), arrays, arrays)[1]
        first = tangent if order == "over forward" else gradient_along
        return jax.grad(first, (0, 1, 2))(*arrays)

    def ours(h, weight, bias):
        options = {"reduction": reduction, "dtype": "float16"}
        return 1e-6 * linear_cross_entropy(h, weight, labels, bias, **options).sum()

    def with_logits(h, weight, bias):
        losses = unfused(h, weight, labels, bias)
        whole = (labels >= 0).sum().astype("float32") if reduction == "mean" else 1
        return 1e-6 * losses.sum() / whole

    for found, expected in zip(second(ours), second(with_logits), strict=True):
        assert relative(found, expected) <= 2 * jnp.finfo("float16").eps


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("scale", [1e-35, 1e30])
def test_cotangents_of_any_size_have_finite_gradients_in_float16(reduction, scale):
    h, weight, labels, _, _ = problem(40)
    weights = jnp.full(labels.shape, scale)

    def loss(h, weight):
        options = {"weights": weights, "reduction": reduction, "dtype": "float16"}
        return linear_cross_entropy(h, weight, labels, **options)

    _, gradients = loss_and_gradients(loss, h, weight)
    expected = exact_loss_gradients(h, weight, labels, reduction="sum")
    for gradient, of_float64 in zip(gradients, expected, strict=False):
        assert relative(gradient / scale, of_float64) <= 2e-3


# Labels and weights.


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
def test_labels_of_any_integer_dtype(dtype):
    h, weight, _, _, _ = problem(300)
    labels = jnp.asarray(np.arange(60).reshape(3, 20) % 100).astype(dtype)
    found = linear_cross_entropy(h, weight, labels)
    np.testing.assert_allclose(found, exact_loss(h, weight, labels), rtol=1e-6)


@pytest.mark.parametrize("label", [-100, -1, 40, 2**31 - 1])
def test_labels_out_of_range_have_no_loss_and_no_gradient(label):
    h, weight, labels, bias, _ = problem(40)
    labels = labels.at[1].set(label)

    def loss(h, weight, bias):
        return linear_cross_entropy(h, weight, labels, bias, reduction="none")

    assert not np.any(loss(h, weight, bias)[1])
    _, (grad_h, *_) = loss_and_gradients(loss, h, weight, bias)
    assert not np.any(grad_h[1])
    kept = h[::2], weight, labels[::2], bias
    np.testing.assert_allclose(
        linear_cross_entropy(h, weight, labels, bias), exact_loss(*kept), rtol=1e-6
    )


@pytest.mark.parametrize("weights", [None, "zero"])
def test_the_mean_of_no_token_is_zero_and_has_no_gradient(weights):
    h, weight, labels, bias, _ = problem(40)
    if weights is None:
        labels = jnp.full_like(labels, -100)
    else:
        weights = jnp.zeros(labels.shape)

    def loss(h, weight, bias):
        return linear_cross_entropy(h, weight, labels, bias, weights=weights)

    found, gradients = loss_and_gradients(loss, h, weight, bias)
    assert found == 0
    assert not any(np.any(g) for g in gradients)


@pytest.mark.parametrize("dtype", ["bool", "int32", "bfloat16"])
def test_weights_may_be_a_mask(dtype):
    h, weight, labels, bias, weights = problem(40)
    mask = (weights > 0.5).astype(dtype)
    found = linear_cross_entropy(h, weight, labels, bias, weights=mask)
    expected = exact_loss(h, weight, labels, bias, weights=np.asarray(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_are_differentiated(reduction):
    h, weight, labels, bias, weights = problem(700)

    def loss(weights):
        options = {"weights": weights, "reduction": reduction}
        return linear_cross_entropy(h, weight, labels, bias, **options).sum()

    def by_definition(weights):
        losses = unfused(h, weight, labels, bias)
        whole = jnp.sum(jnp.where(labels < 0, 0, weights))
        return (weights * losses).sum() / (whole if reduction == "mean" else 1)

    found, expected = jax.grad(loss)(weights), jax.grad(by_definition)(weights)
    assert relative(found, expected) <= 1e-5


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_equal_and_huge_logits(reduction, scale):
    h, weight, labels, _, _ = problem(1100, (30,))
    h = jnp.sign(h) * scale

    def loss(h, weight):
        return linear_cross_entropy(h, weight, labels, reduction=reduction)

    found, gradients = loss_and_gradients(loss, h, weight)
    expected = exact_loss(h, weight, labels, reduction=reduction).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    expected = exact_loss_gradients(h, weight, labels, reduction=reduction)
    for gradient, of_float64 in zip(gradients, expected, strict=False):
        assert relative(gradient, of_float64) <= 1e-3


# What a model says of each token.


@pytest.mark.parametrize("classes", [1, 7, 2049, 5003])
def test_log_likelihood_and_prediction(classes):
    h, weight, labels, bias, _ = problem(classes)
    found = linear_log_likelihood(h, weight, labels, bias)
    losses, log_sum_exp, z = exact(h, weight, labels, bias)
    np.testing.assert_allclose(found.negative, losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.log_sum_exp, log_sum_exp, rtol=1e-5, atol=1e-5)
    assert found.prediction.dtype == "int32"
    np.testing.assert_array_equal(found.prediction, z.argmax(-1))


def test_the_first_of_several_largest_logits_and_nan_are_predicted_as_argmax_does():
    h = jnp.ones((3, 1))
    bias = jnp.zeros((5000, 1)).at[jnp.array([[100], [3000], [4500]]), 0].set(1)
    with_nan = bias.at[4000].set(jnp.nan)
    for weight in (bias, with_nan):
        found = linear_log_likelihood(h, weight, jnp.zeros(3, int)).prediction
        np.testing.assert_array_equal(found, jnp.argmax(h @ weight.T, -1))


def test_log_likelihood_is_differentiated():
    h, weight, labels, bias, weights = problem(1300)

    def ours(h, weight, bias):
        found = linear_log_likelihood(h, weight, labels, bias)
        return jnp.sum(weights * found.negative + jnp.sin(found.log_sum_exp))

    def with_logits(h, weight, bias):
        lse = jax.nn.logsumexp(h @ weight.T + jnp.expand_dims(bias, (0, 1)), -1)
        return jnp.sum(weights * unfused(h, weight, labels, bias) + jnp.sin(lse))

    _, found = loss_and_gradients(ours, h, weight, bias)
    _, expected = loss_and_gradients(with_logits, h, weight, bias)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) <= 1e-5


# PyTorch's.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_loss_of_pytorch(reduction, smoothing):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    h, weight, labels, bias, _ = problem(600)
    tensors = [torch.tensor(np.asarray(a)).requires_grad_() for a in (h, weight, bias)]
    z = torch.nn.functional.linear(*tensors).reshape(-1, 600)
    target = torch.tensor(np.asarray(labels)).reshape(-1).long()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    theirs = torch.nn.functional.cross_entropy(z, target, **options).sum()
    theirs.backward()

    def loss(h, weight, bias):
        return linear_cross_entropy(h, weight, labels, bias, **options)

    found, gradients = loss_and_gradients(loss, h, weight, bias)
    np.testing.assert_allclose(found, theirs.detach().numpy(), rtol=1e-6)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert relative(gradient, tensor.grad.numpy()) <= 1e-6


def test_class_weights_are_those_of_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    h, weight, labels, bias, _ = problem(60)
    of_classes = np.random.default_rng(0).random(60).astype("float32")
    z = torch.tensor(np.asarray(h @ weight.T + jnp.expand_dims(bias, (0, 1))))
    target = torch.tensor(np.asarray(labels)).reshape(-1).long()
    function = torch.nn.functional.cross_entropy
    theirs = function(z.reshape(-1, 60), target, weight=torch.tensor(of_classes))
    weights = of_classes[np.maximum(labels, 0)]
    found = linear_cross_entropy(h, weight, labels, bias, weights=weights)
    np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-6)


def test_the_naive_formula_of_plain_autodiff():
    h, weight, labels, bias, _ = problem(300)
    with jaxlinear.plain_autodiff():
        program = jax.make_jaxpr(partial(linear_cross_entropy, labels=labels))(
            h, weight
        )
        names = {equation.primitive.name for equation in program.eqns}
        found = linear_cross_entropy(h, weight, labels, bias)
    assert "dot_general" in names
    assert not names & {p.name for p in jaxlinear.PRIMITIVES}
    np.testing.assert_allclose(found, exact_loss(h, weight, labels, bias), rtol=1e-5)


# What a call costs.


def test_neither_the_logits_nor_a_second_gradient_is_in_memory():
    n, d, v = 4096, 32, 8192
    h = jax.ShapeDtypeStruct((n, d), jnp.float32)
    weight = jax.ShapeDtypeStruct((v, d), jnp.float32)
    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    logits, gradient = 4 * n * v, 4 * v * d

    def temporaries(reduction, differentiate):
        def loss(h, weight, labels):
            return linear_cross_entropy(h, weight, labels, reduction=reduction).sum()

        function = jax.value_and_grad(loss, (0, 1)) if differentiate else loss
        program = jax.jit(function).lower(h, weight, labels).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries("mean", True) <= gradient + 4 * n * d + logits / 4
    assert temporaries("none", True) <= gradient + logits / 4
    assert temporaries("mean", False) <= logits / 4
    assert temporaries("none", False) <= logits / 4


def test_nothing_is_kept_for_the_gradient_of_a_frozen_weight():
    h, weight, labels, bias, _ = problem(1100)
    _, vjp = jax.vjp(lambda h: linear_cross_entropy(h, weight, labels, bias), h)
    assert {a.shape for a in jax.tree.leaves(vjp)} <= {h.shape, ()}


# What is refused.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": np.ones((3, 20))}, TypeError, "`labels` must be integers"),
        (
            {"labels": np.ones(20, int)},
            ValueError,
            r"`labels` must have shape \(3, 20\)",
        ),
        ({"labels": None}, TypeError, "`labels` must be an array"),
        ({"h": np.float32(1)}, ValueError, "`h` must have at least one axis"),
        ({"h": np.ones((3, 20, 4))}, ValueError, "`h` must have 16 elements"),
        (
            {"weight": np.ones((16, 9)), "bias": None},
            ValueError,
            "Did you mean `weight.T`",
        ),
        (
            {"weight": np.ones((0, 16)), "bias": None},
            ValueError,
            "`weight` must have at least one class",
        ),
        ({"weight": np.ones((9, 16)) * 1j}, TypeError, "`weight` must be real"),
        ({"bias": np.ones(3)}, ValueError, "`bias` must have shape"),
        ({"weights": -np.ones((3, 20))}, ValueError, "`weights` must be 0 or more"),
        ({"weights": np.ones(3)}, ValueError, r"`weights` must have shape \(3, 20\)"),
        ({"weights": np.ones((3, 20)) * 1j}, TypeError, "`weights` must be real"),
        ({"reduction": "avg"}, ValueError, "`reduction` must be one of 'mean'"),
        ({"label_smoothing": 1.5}, ValueError, "`label_smoothing` must be a number"),
        ({"label_smoothing": "a"}, TypeError, "`label_smoothing` must be a number"),
        ({"label_smoothing": "0.1"}, TypeError, "`label_smoothing` must be a number"),
        ({"z_loss": -1}, ValueError, "`z_loss` must be a number of 0 or more"),
        ({"soft_cap": 0}, ValueError, "`soft_cap` must be greater than 0"),
        ({"soft_cap": np.ones(2)}, TypeError, "`soft_cap` must be a number"),
        ({"ignore_index": 0.5}, TypeError, "`ignore_index` must be an integer"),
        ({"dtype": "complex64"}, TypeError, "`dtype` must be floating"),
        ({"dtype": "int8"}, TypeError, "`dtype` must be a floating"),
        (
            {"products": jaxlinear.INT8},
            ValueError,
            "`products.forward.dtype` must have",
        ),
        (
            {
                "products": Products(
                    weight_grad=Product(preferred_element_type="float32")
                )
            },
            ValueError,
            "`products.weight_grad.preferred_element_type` must be None",
        ),
        ({"axis_name": 3}, TypeError, "`axis_name` must be the name"),
        ({"axis_name": "model"}, ValueError, "`axis_name` must be an axis of"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    h, weight, labels, bias, _ = problem(9)
    given = {"h": h, "weight": weight, "labels": labels, "bias": bias} | change
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float64 becomes float32.
        with pytest.raises(error, match=message):
            linear_cross_entropy(**given)
