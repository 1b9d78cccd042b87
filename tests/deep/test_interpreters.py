"""Other people's interpreters of programs: the recipes of docs/interpreters.md.

The blocks of that page run as its test. Here each recipe meets the other cases; the
oracle is the naive formula, in the same library where it takes one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import pallas, sparse
from jax.experimental.sparse import transform
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractDevice, AbstractMesh
from oracle import naive, random_array, random_problem, relative_error, wide

from jaxlinear import PRIMITIVES, linear, plain_autodiff

X, WEIGHT, BIAS, _ = random_problem((5,), 4, 3, "float32")
EPS = float(jnp.finfo("float32").eps)

# The libraries use what JAX has deprecated, and its usual promotion.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _ordinary_settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# ONNX. The oracle is another runtime.


@pytest.fixture
def to_onnx():
    return pytest.importorskip("jax2onnx", reason="jax2onnx is not installed").to_onnx


def mlp(x, **options):
    return linear(jnp.tanh(linear(x, WEIGHT, BIAS, **options)), WEIGHT.T, **options)


def nnx_model(**options):
    nnx = pytest.importorskip("flax.nnx")
    import jaxlinear.nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = jaxlinear.nnx.Linear(4, 8, rngs=rngs, **options)
            self.head = jaxlinear.nnx.Linear(8, 3, rngs=rngs, use_bias=False, **options)

        def __call__(self, x):
            return self.head(nnx.gelu(self.hidden(x)))

    return Model(nnx.Rngs(0))


EXPORTED = {
    "a layer": lambda: lambda x: linear(x, WEIGHT, BIAS),
    "without bias": lambda: lambda x: linear(x, WEIGHT),
    "a function": lambda: mlp,
    "vmap": lambda: jax.vmap(mlp),
    "an NNX model": nnx_model,
}


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("leading", [(5,), ("batch",), (2, 5)], ids=str)
def test_onnx_has_the_values_of_the_layer(name, leading, to_onnx):
    onnxruntime = pytest.importorskip("onnxruntime")
    function = EXPORTED[name]()
    x = random_array(0, (*[5 if n == "batch" else n for n in leading], 4), "float32")
    with plain_autodiff():
        exported = to_onnx(function, [(*leading, 4)])
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    assert relative_error(found, wide(function(x))) < 20 * EPS


@pytest.mark.parametrize("name", ["a function", "an NNX model"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_onnx_of_low_precision_has_the_values_of_the_layer(dtype, name, to_onnx):
    # onnxruntime cannot add in bfloat16 on a CPU; ONNX's own evaluator can.
    reference = pytest.importorskip("onnx.reference")
    options = {"dtype": dtype}
    model = nnx_model(**options) if "NNX" in name else functools.partial(mlp, **options)

    def function(x):
        return model(x).astype("float32")

    with plain_autodiff():
        exported = to_onnx(function, [(5, 4)])
    evaluator = reference.ReferenceEvaluator(exported)
    (found,) = evaluator.run(None, {exported.graph.input[0].name: np.asarray(X)})
    eps = float(jnp.finfo(dtype).eps)
    assert relative_error(found, wide(function(X))) < 4 * eps


# sparsify


@pytest.fixture
def sparsify(monkeypatch):
    def rule(environment, *arrays, call_jaxpr, **_):
        return transform.sparsify_raw(jaxpr_as_fun(call_jaxpr))(environment, *arrays)[0]

    for primitive in PRIMITIVES:
        monkeypatch.setitem(transform.sparse_rules_bcoo, primitive, rule)
    return sparse.sparsify


SPARSE = sparse.BCOO.fromdense(X)
SPARSIFIED = {
    "x": lambda layer: layer(SPARSE, WEIGHT, BIAS),
    "x without bias": lambda layer: layer(SPARSE, WEIGHT),
    "weight": lambda layer: layer(X, sparse.BCOO.fromdense(WEIGHT), BIAS),
    "jit": lambda layer: jax.jit(layer)(SPARSE, WEIGHT, BIAS),
}


@pytest.mark.parametrize("name", SPARSIFIED)
def test_sparsify_multiplies_sparse_arrays(name, sparsify):
    Y = SPARSIFIED[name](sparsify(linear))
    bias = None if "without" in name else BIAS
    np.testing.assert_allclose(Y, naive(X, WEIGHT, bias), rtol=1e-5, atol=1e-6)


def test_sparsify_has_the_gradient_of_a_weight_and_multiplies_inside_one(sparsify):
    def loss(layer, x):
        return lambda weight: jnp.sum(layer(x, weight, BIAS) ** 2)

    expected = jax.grad(loss(naive, X))(WEIGHT)
    outside = jax.grad(loss(sparsify(linear), SPARSE))(WEIGHT)
    inside = sparsify(lambda w, x: jax.grad(loss(linear, x))(w))(WEIGHT, SPARSE)
    for found in outside, inside:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_sparsify_works_inside_the_switch_without_a_rule():
    with plain_autodiff():
        Y = sparse.sparsify(linear)(SPARSE, WEIGHT, BIAS)
    np.testing.assert_allclose(Y, naive(X, WEIGHT, BIAS), rtol=1e-5, atol=1e-6)


# quax: LoRA, whose weight refuses to be made.


@pytest.fixture
def quax():
    quax = pytest.importorskip("quax", reason="quax is not installed")
    pytest.importorskip("quax.examples.lora")
    for primitive in PRIMITIVES:

        @quax.register(primitive)
        def _(*arrays: quax.ArrayValue | jax.Array, call_jaxpr, **_):
            return quax.quaxify(jaxpr_as_fun(call_jaxpr))(*arrays)

    return quax


@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "no bias"])
@pytest.mark.parametrize("wrapped", [lambda layer: layer, jax.jit], ids=["call", "jit"])
def test_quax_adapts_a_weight_that_is_never_made(wrapped, bias, quax):
    import equinox

    adapted = quax.examples.lora.LoraArray(WEIGHT, rank=2, key=jax.random.key(0))
    factors = adapted.a, random_array(1, adapted.b.shape, "float32")

    def loss(factors):
        a, b = factors
        weight = equinox.tree_at(lambda w: (w.a, w.b), adapted, (a, b))
        return jnp.sum(quax.quaxify(wrapped(linear))(X, weight, bias) ** 2)

    def reference(factors):
        a, b = factors
        return jnp.sum(naive(X, WEIGHT + a @ b, bias) ** 2)

    found, expected = (jax.value_and_grad(f)(factors) for f in (loss, reference))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert relative_error(ours, wide(theirs)) < 100 * EPS


# folx: the Laplacian, with the sparsity of the Jacobian.

POSITIONS = random_array(3, (18,), "float32")


@pytest.fixture
def folx():
    folx = pytest.importorskip("folx", reason="folx is not installed")

    def rule(arrays, parameters, sparsity_threshold):
        function = jaxpr_as_fun(parameters["call_jaxpr"])
        inner = folx.forward_laplacian(function, sparsity_threshold, disable_jit=True)
        return inner(*arrays)

    for primitive in PRIMITIVES:
        folx.register_function(primitive, rule)
    yield folx
    for primitive in PRIMITIVES:
        folx.deregister_function(primitive)


def orbitals(layer):
    weight, bias = random_array(4, (4, 3), "float32"), random_array(5, (4,), "float32")
    return lambda x: jnp.tanh(layer(x.reshape(6, 3), weight, bias))


@pytest.mark.parametrize("threshold", [0, 6, 0.6])
@pytest.mark.parametrize("wrapped", [lambda layer: layer, jax.jit], ids=["call", "jit"])
def test_folx_has_the_laplacian_and_keeps_its_sparsity(wrapped, threshold, folx):
    found, expected = (
        folx.forward_laplacian(wrapped(orbitals(layer)), threshold)(POSITIONS)
        for layer in (linear, naive)
    )
    assert found.jacobian.data.shape == expected.jacobian.data.shape
    assert relative_error(found.laplacian, wide(expected.laplacian)) < 100 * EPS
    hessian = jax.hessian(orbitals(naive))(POSITIONS)
    exact = np.trace(wide(hessian), axis1=-2, axis2=-1)
    assert relative_error(found.laplacian, exact) < 100 * EPS


def test_folx_keeps_the_sparsity_of_a_product_of_low_precision(folx):
    layer = orbitals(functools.partial(linear, dtype="bfloat16"))
    found = folx.forward_laplacian(layer, sparsity_threshold=6)(POSITIONS)
    assert found.jacobian.data.shape == (3, 6, 4)


# Pallas. A TPU need not be there to lower a kernel for it.

TPU = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("TPU v5p", 1, "tpu"))


def lowered_for_tpu(layer):
    def kernel(x, weight, bias, result):
        result[...] = layer(x[...], weight[...], bias[...])

    def apply(*arrays):
        shape = jax.ShapeDtypeStruct((128, 128), "float32")
        with jax.sharding.use_abstract_mesh(TPU):
            return pallas.pallas_call(kernel, shape)(*arrays)

    arrays = jnp.ones((128, 128)), jnp.ones((128, 128)), jnp.ones(128)
    return export.export(jax.jit(apply), platforms=["tpu"])(*arrays).mlir_module()


def gradient(layer):
    return lambda x, w, b: jax.grad(lambda w: jnp.sum(layer(x, w, b)))(w)


@pytest.mark.parametrize("wrapped", [lambda layer: layer, gradient])
def test_a_kernel_for_tpus_has_our_layer_inside_the_switch(wrapped):
    with plain_autodiff():
        program = lowered_for_tpu(wrapped(linear))
    assert "tpu_custom_call" in program
