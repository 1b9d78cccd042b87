"""The losses of both modules, and of a head that is tied to an embedding."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from loss_oracle import exact, exact_loss, exact_loss_gradients, unfused
from oracle import random_array, relative_error, wide

pytest.importorskip("flax")

from flax import linen as nn
from flax import nnx

import jaxlinear
from jaxlinear import FLOAT8, Product, Products
from jaxlinear import linear_cross_entropy as cross_entropy
from jaxlinear import linear_log_likelihood as log_likelihood

IN, CLASSES = 8, 13
EPS = float(jnp.finfo("float32").eps)

h = random_array(0, (2, 5, IN), "float32")
weight = random_array(1, (CLASSES, IN), "float32")
bias = random_array(2, (CLASSES,), "float32")
labels = jnp.array([[0, 12, 3, -100, 3], [13, 5, 7, 0, 1]])
weights = jnp.array([[1, 0, 2.5, 1, 1], [1, 0.5, 1, 1, 0]])


def nnx_head(weight, bias, **options):
    use_bias = bias is not None
    layer = jaxlinear.nnx.Linear(
        *reversed(weight.shape), use_bias=use_bias, rngs=nnx.Rngs(0), **options
    )
    layer.weight.set_value(weight)
    if use_bias:
        layer.bias.set_value(bias)
    return layer


class LinenHead:
    """A layer of Linen with its parameters, and with the methods of one of NNX."""

    def __init__(self, weight, bias, **options):
        use_bias = bias is not None
        self.layer = jaxlinear.linen.Linear(len(weight), use_bias=use_bias, **options)
        params = {"weight": weight, "bias": bias} if use_bias else {"weight": weight}
        self.variables = {"params": params}

    def cross_entropy(self, *arguments, **options):
        method = "cross_entropy"
        return self.layer.apply(self.variables, *arguments, method=method, **options)

    def log_likelihood(self, *arguments, **options):
        method = "log_likelihood"
        return self.layer.apply(self.variables, *arguments, method=method, **options)


each_head = pytest.mark.parametrize("head", [nnx_head, LinenHead], ids=["nnx", "linen"])

# The options of the layer, and those of the loss.
CASES = {
    "default": ({}, {}),
    "no bias": ({}, {}),
    "sum, weighted": ({}, {"reduction": "sum", "weights": weights}),
    "mean, weighted by a mask": ({}, {"weights": weights > 0}),
    "smoothed, with z-loss": ({}, {"label_smoothing": 0.1, "z_loss": 0.01}),
    "of each token, capped": ({}, {"reduction": "none", "soft_cap": 3.0}),
    "another index": ({}, {"ignore_index": 3}),
    "bfloat16": ({"dtype": "bfloat16"}, {"reduction": "sum"}),
    "a product": ({"products": Products(forward=Product("bfloat16"))}, {}),
    "a precision": ({"precision": "BF16_BF16_F32"}, {"soft_cap": 9.0}),
}


@pytest.mark.parametrize("name", CASES)
@each_head
def test_loss_and_gradients_are_those_of_the_function(head, name):
    of_layer, of_loss = CASES[name]
    arrays = (h, weight) if name == "no bias" else (h, weight, bias)

    def of_module(h, weight, bias=None):
        loss = head(weight, bias, **of_layer).cross_entropy(h, labels, **of_loss)
        return jnp.sum(loss), loss

    def of_function(h, weight, bias=None):
        loss = cross_entropy(h, weight, labels, bias, **of_layer, **of_loss)
        return jnp.sum(loss), loss

    places = tuple(range(len(arrays)))
    gradients, loss = jax.grad(of_module, places, has_aux=True)(*arrays)
    expected = jax.grad(of_function, places, has_aux=True)(*arrays)
    jax.tree.map(np.testing.assert_array_equal, (gradients, loss), expected)

    arguments = (h, weight, labels, *arrays[2:])
    tolerance = 8 * (float(jnp.finfo("bfloat16").eps) if of_layer else EPS)
    assert relative_error(loss, exact_loss(*arguments, **of_loss)) <= tolerance
    exactly = exact_loss_gradients(*arguments, **of_loss)
    for gradient, by_float64 in zip(gradients, exactly[: len(arrays)], strict=True):
        assert relative_error(gradient, by_float64) <= tolerance


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_head
def test_gradients_in_mixed_precision_keep_float32_and_are_exacter_than_the_unfused(
    head, reduction
):
    cotangents = random_array(3, labels.shape, "float32")

    def fused(h, weight, bias):
        layer = head(weight, bias, dtype="bfloat16")
        losses = layer.cross_entropy(h, labels, reduction=reduction)
        return jnp.sum(cotangents * losses) if reduction == "none" else losses

    def naive(h, weight, bias):
        low = (a.astype("bfloat16") for a in (h, weight, bias))
        z = jaxlinear.linear(*low).astype("float32")
        losses = -jnp.take_along_axis(
            jax.nn.log_softmax(z), jnp.clip(labels, 0, 12)[..., None], -1
        )[..., 0]
        scales = cotangents if reduction == "none" else 1 / 8
        return jnp.sum(losses * scales, where=(labels >= 0) & (labels < 13))

    # bfloat16 has these values.
    arrays = [a.astype("bfloat16").astype("float32") for a in (h, weight, bias)]
    ours, theirs = (jax.jit(jax.grad(f, (0, 1, 2)))(*arrays) for f in (fused, naive))
    scales = {"weights": cotangents, "reduction": "sum"} if reduction == "none" else {}
    exactly = exact_loss_gradients(*arrays[:2], labels, arrays[2], **scales)
    for mine, naively, expected in zip(ours, theirs, exactly, strict=True):
        assert mine.dtype == jnp.float32
        assert relative_error(mine, expected) < relative_error(naively, expected)


@pytest.mark.parametrize(
    "name", ["default", "no bias", "bfloat16", "a product", "a precision"]
)
@each_head
def test_log_likelihood_is_that_of_the_function(head, name):
    of_layer, _ = CASES[name]
    b = None if name == "no bias" else bias
    found = head(weight, b, **of_layer).log_likelihood(h, labels, soft_cap=3.0)
    expected = log_likelihood(h, weight, labels, b, soft_cap=3.0, **of_layer)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    losses, log_sum_exp, z = exact(h, weight, labels, b, soft_cap=3.0)
    tolerance = 8 * (float(jnp.finfo("bfloat16").eps) if of_layer else EPS)
    assert relative_error(found.negative, losses) <= tolerance
    assert relative_error(found.log_sum_exp, log_sum_exp) <= tolerance
    predicted = np.take_along_axis(z, np.asarray(found.prediction)[..., None], -1)
    assert np.all(predicted >= z.max(-1, keepdims=True) - 3 * tolerance)


@pytest.mark.parametrize("module", [jaxlinear.nnx.Linear, jaxlinear.linen.Linear])
@pytest.mark.parametrize("name", ["cross_entropy", "log_likelihood"])
def test_methods_have_the_options_of_the_functions_with_their_defaults(module, name):
    method = inspect.signature(getattr(module, name)).parameters
    function = inspect.signature(getattr(jaxlinear, f"linear_{name}")).parameters
    own = {"weight", "bias", "dtype", "precision", "products"}
    expected = {k: p.default for k, p in function.items() if k not in own}
    assert {k: p.default for k, p in method.items() if k != "self"} == expected


# NNX.


class Model(nnx.Module):
    """A hidden layer and a head, which computes logits or their loss."""

    def __init__(self, linear, rngs):
        self.hidden = linear(IN, IN, rngs=rngs)
        self.head = linear(IN, CLASSES, rngs=rngs)

    def logits(self, x):
        return self.head(jnp.tanh(self.hidden(x)))

    def loss(self, x):
        return self.head.cross_entropy(jnp.tanh(self.hidden(x)), labels)


@jax.jit
def of_logits(z):
    """The mean loss of the logits, by the oracle's formula."""
    return jnp.sum(unfused(z, jnp.eye(CLASSES), labels)) / 8


def assert_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for mine, theirs in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert relative_error(mine, wide(theirs)) <= tolerance


def test_nnx_differentiates_a_model_whose_head_computes_the_loss():
    model = Model(jaxlinear.nnx.Linear, nnx.Rngs(0))
    gradients = nnx.jit(nnx.value_and_grad(lambda model: model.loss(h)))(model)
    naive = nnx.jit(nnx.value_and_grad(lambda model: of_logits(model.logits(h))))
    assert_close(gradients, naive(model))


def test_a_converted_model_has_the_loss():
    model = Model(nnx.Linear, nnx.Rngs(0))
    loss = of_logits(model.logits(h))
    jaxlinear.nnx.convert(model)
    assert_close(model.loss(h), loss)


def stack(length):
    @nnx.jit
    @nnx.split_rngs(splits=length)
    @nnx.vmap
    def make(rngs):
        return jaxlinear.nnx.Linear(IN, CLASSES, rngs=rngs)

    return make(nnx.Rngs(0))


def test_a_stack_of_heads_has_losses_under_vmap_and_scan_and_is_refused_without():
    heads = stack(3)
    each = zip(heads.weight[...], heads.bias[...], strict=True)
    expected = [cross_entropy(h, weight, labels, bias) for weight, bias in each]

    mapped = nnx.vmap(lambda head: head.cross_entropy(h, labels))(heads)
    np.testing.assert_allclose(mapped, expected, rtol=8 * EPS)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def scanned(total, head):
        loss = head.cross_entropy(h, labels)
        return total + loss, loss

    total, losses = scanned(jnp.float32(0), heads)
    np.testing.assert_allclose(losses, expected, rtol=8 * EPS)
    np.testing.assert_allclose(total, sum(expected), rtol=8 * EPS)
    for method in heads.cross_entropy, heads.log_likelihood:
        with pytest.raises(ValueError, match=r"a stack of layers is called under `nnx"):
            method(h, labels)


def test_gradients_of_a_stack_are_those_of_each_head():
    heads = stack(3)

    def loss(heads):
        return nnx.vmap(lambda head: head.cross_entropy(h, labels))(heads).sum()

    def naive(arrays):
        of_one = lambda a: unfused(h, a["weight"], labels, a["bias"]).sum() / 8  # noqa: E731
        return jax.vmap(of_one)(arrays).sum()

    arrays = {"weight": heads.weight[...], "bias": heads.bias[...]}
    gradients = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(heads))
    assert_close(dict(gradients), jax.jit(jax.grad(naive))(arrays))


# Meshes.


@each_head
def test_classes_that_are_split_over_devices_are_named_in_shard_map(head):
    classes = 16
    weight, bias = (random_array(k, s, "float32") for k, s in [(4, (16, IN)), (5, 16)])
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("model"), P("model")),
        out_specs=P(),
    )
    def losses(weight, bias):
        layer = head(weight, bias)
        found = layer.log_likelihood(h, labels, axis_name="model")
        return layer.cross_entropy(h, labels, axis_name="model"), found

    loss, found = jax.jit(losses)(weight, bias)
    expected, _, z = exact(h, weight, labels, bias)
    counted = np.isin(labels, range(classes)).sum()
    assert relative_error(loss, expected.sum() / counted) <= 8 * EPS
    assert relative_error(found.negative, expected) <= 8 * EPS
    np.testing.assert_array_equal(found.prediction, z.argmax(-1))


def test_a_head_on_an_explicit_mesh_has_the_same_loss_and_gradients():
    weight = random_array(4, (16, IN), "float32")
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    expected = exact_loss_gradients(h, weight, labels)
    with jax.set_mesh(mesh):
        layer = nnx_head(jax.device_put(weight, P("model")), None)
        rows = jax.device_put(h, P("data"))
        its_labels = jax.device_put(labels, P("data"))
        gradients = nnx.jit(nnx.grad(lambda m: m.cross_entropy(rows, its_labels)))(
            layer
        )
    assert jax.typeof(gradients.weight[...]).sharding.spec == P("model", None)
    assert relative_error(gradients.weight[...], expected[1]) <= 8 * EPS


# Linen.


def test_the_first_call_draws_the_parameters_of_the_layer():
    layer, key = jaxlinear.linen.Linear(CLASSES), jax.random.key(0)
    expected = layer.init(key, h)
    for method in "cross_entropy", "log_likelihood":
        variables = layer.init(key, h, labels, method=method)
        jax.tree.map(np.testing.assert_array_equal, variables, expected)


class Nested(nn.Module):
    """A hidden layer and a head, compact."""

    linear: type[nn.Module] = jaxlinear.linen.Linear

    @nn.compact
    def __call__(self, x, loss_first=True):
        x = jnp.tanh(self.linear(IN, name="hidden")(x))
        head = jaxlinear.linen.Linear(CLASSES, name="head")
        if loss_first:
            return head.cross_entropy(x, labels), head(x)
        return head(x), head.cross_entropy(x, labels)


class SetUp(nn.Module):
    """The same, with the layers in `setup`."""

    def setup(self):
        self.hidden = jaxlinear.linen.Linear(IN)
        self.head = jaxlinear.linen.Linear(CLASSES)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))

    def loss(self, x):
        hidden = jnp.tanh(self.hidden(x))
        return self.head.cross_entropy(hidden, labels, reduction="sum") / 8


def test_a_head_shares_its_parameters_with_its_loss_inside_other_modules():
    key = jax.random.key(0)
    variables, again = (Nested().init(key, h, first) for first in (True, False))
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    shapes = jax.tree.map(jnp.shape, variables["params"]["head"])
    assert shapes == {"weight": (CLASSES, IN), "bias": (CLASSES,)}
    loss, z = jax.jit(Nested().apply)(variables, h)
    np.testing.assert_allclose(loss, of_logits(z), rtol=8 * EPS)


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_a_loss_method_of_a_model_has_the_gradients_of_the_unfused_formula(remat):
    model = (nn.remat(SetUp, methods=("loss",)) if remat else SetUp)()
    variables = model.init(jax.random.key(0), h, method="loss")
    naive = jax.jit(jax.value_and_grad(lambda v: of_logits(SetUp().apply(v, h))))
    loss = functools.partial(model.apply, x=h, method="loss")
    assert_close(jax.jit(jax.value_and_grad(loss))(variables), naive(variables))


def test_a_lifted_head_has_the_loss():
    lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    heads = nn.vmap(
        jaxlinear.linen.Linear,
        in_axes=None,
        axis_size=3,
        methods=["cross_entropy"],
        **lifted,
    )(CLASSES)
    variables = heads.init(jax.random.key(0), h, labels, method="cross_entropy")
    losses = heads.apply(variables, h, labels, method="cross_entropy")
    parameters = variables["params"]
    each = zip(parameters["weight"], parameters["bias"], strict=True)
    expected = [cross_entropy(h, weight, labels, bias) for weight, bias in each]
    np.testing.assert_allclose(losses, expected, rtol=8 * EPS)
    remat = nn.remat(jaxlinear.linen.Linear, methods=["cross_entropy"])(CLASSES)
    first = jax.tree.map(lambda leaf: leaf[0], variables)
    loss = functools.partial(remat.apply, h=h, labels=labels, method="cross_entropy")
    gradient = jax.grad(loss)(first)["params"]["weight"]
    arguments = h, parameters["weight"][0], labels, parameters["bias"][0]
    assert relative_error(gradient, exact_loss_gradients(*arguments)[1]) <= 8 * EPS


def test_a_subclass_with_a_call_of_its_own_keeps_the_loss():
    class Scaled(jaxlinear.linen.Linear):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, ())
            return scale * super().__call__(x), self.cross_entropy(x, labels)

    variables = Scaled(CLASSES).init(jax.random.key(0), h)
    assert {*variables["params"]} == {"bias", "scale", "weight"}
    z, loss = Scaled(CLASSES).apply(variables, h)
    np.testing.assert_allclose(loss, of_logits(z), rtol=8 * EPS)


def test_interceptors_see_one_call_of_the_layer():
    seen = []

    def noted(call, args, kwargs, context):
        seen.append(context.method_name)
        return call(*args, **kwargs)

    with nn.intercept_methods(noted):
        LinenHead(weight, bias).cross_entropy(h, labels)
    assert seen == ["cross_entropy"]


def test_partitioned_parameters_are_unboxed():
    init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    layer = jaxlinear.linen.Linear(CLASSES, kernel_init=init)
    variables = layer.init(jax.random.key(0), h, labels, method="cross_entropy")
    assert variables["params"]["weight"].names == ("model", None)
    loss = layer.apply(variables, h, labels, method="cross_entropy")
    plain = nn.unbox(variables)["params"]
    expected = cross_entropy(h, plain["weight"], labels, plain["bias"])
    np.testing.assert_array_equal(loss, expected)


def test_missing_and_other_parameters_are_refused_as_by_the_layer():
    layer = jaxlinear.linen.Linear(CLASSES)
    arguments = {"h": h, "labels": labels, "method": "cross_entropy"}
    with pytest.raises(Exception, match=r'parameter named "bias"'):
        layer.apply({"params": {"weight": weight}}, **arguments)
    with pytest.raises(Exception, match=r'parameter "weight".*\(12, 8\)'):
        layer.apply({"params": {"weight": weight[1:], "bias": bias[1:]}}, **arguments)


# A head that is tied to an embedding.


tokens = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 12]])


@jax.jit
@jax.value_and_grad
def tied_naively(table):
    """The mean loss of the next token, whose table is used twice, with logits."""
    hidden, after = jnp.tanh(table[tokens[:, :-1]]), tokens[:, 1:]
    return unfused(hidden, table, after).mean()


@pytest.mark.parametrize("passed", ["variable", "value"])
def test_both_uses_of_an_embedding_of_nnx_have_gradients(passed):
    embed = nnx.Embed(CLASSES, IN, rngs=nnx.Rngs(0))

    def loss(embed):
        hidden = jnp.tanh(embed(tokens[:, :-1]))
        table = embed.embedding if passed == "variable" else embed.embedding[...]
        return cross_entropy(hidden, table, tokens[:, 1:])

    found, gradients = nnx.value_and_grad(loss)(embed)
    expected = tied_naively(embed.embedding[...])
    assert_close((found, gradients.embedding[...]), expected)


class Tied(nn.Module):
    dtype: str | None = None

    def setup(self):
        self.embed = nn.Embed(CLASSES, IN, dtype=self.dtype)

    def __call__(self, tokens):
        hidden, after = jnp.tanh(self.embed(tokens[:, :-1])), tokens[:, 1:]
        return cross_entropy(hidden, self.embed.embedding, after, dtype=self.dtype)


def test_both_uses_of_an_embedding_of_linen_have_gradients():
    variables = Tied().init(jax.random.key(0), tokens)
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {"embed": {"embedding": (CLASSES, IN)}}
    }
    found, gradients = jax.value_and_grad(Tied().apply)(variables, tokens)
    table = variables["params"]["embed"]["embedding"]
    expected = tied_naively(table)
    assert_close((found, gradients["params"]["embed"]["embedding"]), expected)


def test_a_tied_table_in_float32_has_its_gradient_under_bfloat16_compute():
    variables = Tied().init(jax.random.key(0), tokens)
    low = Tied(dtype="bfloat16")
    found, gradients = jax.value_and_grad(low.apply)(variables, tokens)
    table = variables["params"]["embed"]["embedding"]
    expected = tied_naively(table)
    gradient = gradients["params"]["embed"]["embedding"]
    assert gradient.dtype == found.dtype == jnp.float32
    eps = float(jnp.finfo("bfloat16").eps)
    assert_close((found, gradient), expected, tolerance=4 * eps)


# Errors.

wide_h = jnp.ones((2, 5, IN + 1))
float_labels = jnp.zeros(labels.shape)
REFUSED = {
    "a scalar": ({}, (jnp.float32(1), 0), {}, "`h` must have at least one axis"),
    "no array": ({}, (None, labels), {}, "`h` must be an array, got NoneType"),
    "other features": ({}, (wide_h, labels), {}, "`h` must have 8 elements along"),
    "float labels": ({}, (h, float_labels), {}, "`labels` must be integers, got flo"),
    "too few labels": ({}, (h, labels[0]), {}, "`labels` must have shape (2, 5)"),
    "negative weights": ({}, (h, labels), {"weights": -weights}, "`weights` must be 0"),
    "one weight": ({}, (h, labels), {"weights": 1.0}, "`weights` must have shape (2, "),
    "a reduction": ({}, (h, labels), {"reduction": "avg"}, "`reduction` must be one"),
    "smoothing": ({}, (h, labels), {"label_smoothing": 2}, "`label_smoothing` must be"),
    "z-loss": ({}, (h, labels), {"z_loss": -1.0}, "`z_loss` must be a number of 0"),
    "a cap of 0": ({}, (h, labels), {"soft_cap": 0}, "`soft_cap` must be greater"),
    "an index": (
        {},
        (h, labels),
        {"ignore_index": 0.5},
        "`ignore_index` must be an in",
    ),
    "no such axis": (
        {},
        (h, labels),
        {"axis_name": "x"},
        "`axis_name` must be an axis",
    ),
    "8 bits": (
        {"products": FLOAT8},
        (h, labels),
        {},
        "`products.forward.dtype` must have 16 bits or more in a loss",
    ),
    "a rounded product": (
        {"products": Products(weight_grad=Product("bfloat16", None, "bfloat16"))},
        (h, labels),
        {},
        "`products.weight_grad.preferred_element_type` must be None in a loss",
    ),
    "complex": ({"dtype": "complex64"}, (h, labels), {}, "`dtype` must be floating"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
@each_head
def test_bad_input_is_refused_by_name_before_anything_is_computed(head, case):
    of_layer, arguments, options, message = case
    layer = head(weight, bias, **of_layer)

    def called():
        return layer.cross_entropy(*arguments, **options)

    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        jax.eval_shape(called)


SEVERAL_AXES = {
    "outputs": (IN, (4, 2), -1, "`out_features` must be one number in a loss, got (4"),
    "inputs": ((2, 4), 5, (-2, -1), "`in_features` must be one number in a loss, got"),
    "another axis": (IN, 5, 0, "`axis` must be -1 in a loss, got 0"),
}


@pytest.mark.parametrize("name", ["cross_entropy", "log_likelihood"])
@pytest.mark.parametrize("case", SEVERAL_AXES.values(), ids=SEVERAL_AXES)
def test_a_layer_with_several_axes_is_refused_by_name(case, name):
    ins, outs, axis, message = case
    layer = jaxlinear.nnx.Linear(ins, outs, axis=axis, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        getattr(layer, name)(h, labels)
    if "`in_features`" in message:
        message = "`axis` must be -1 in a loss, got (-2, -1)"
    message = message.replace("out_features", "features")
    linen = jaxlinear.linen.Linear(outs, axis=axis)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        linen.init(jax.random.key(0), h, labels, method=name)


@pytest.mark.parametrize("name", ["cross_entropy", "log_likelihood"])
def test_a_layer_with_tuples_of_one_has_a_loss(name):
    layer = jaxlinear.nnx.Linear((IN,), (CLASSES,), axis=(-1,), rngs=nnx.Rngs(0))
    arguments = h, layer.weight[...], labels, layer.bias[...]
    expected = getattr(jaxlinear, f"linear_{name}")(*arguments)
    found = getattr(layer, name)(h, labels)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    linen = jaxlinear.linen.Linear((CLASSES,), axis=(-1,))
    variables = {"params": {"weight": arguments[1], "bias": arguments[3]}}
    found = linen.apply(variables, h, labels, method=name)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
