"""What `explain` says is what was compiled."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import naive

import jaxlinear.linen
import jaxlinear.nnx
from jaxlinear import Product, Products, explain, linear, linear_cross_entropy
from jaxlinear._op import cpu
from jaxlinear.inspect._explain import _notes
from jaxlinear.inspect._hlo import bits, collectives, instructions

ROWS, IN, OUT = 256, 512, 128
X, W, B = (
    jax.ShapeDtypeStruct(shape, "float32") for shape in ((ROWS, IN), (OUT, IN), (OUT,))
)
NAMES = ["forward product", "input gradient", "weight gradient"]
THREE = Products(*(Product(precision=p) for p in ("highest", "high", "default")))


def facts(explanation):
    return {p.name: (p.count, p.product, p.result) for p in explanation.products}


def test_the_three_products_with_their_dtypes_and_precisions(use_form):
    use_form(cpu.NATIVE)
    explanation = explain(linear, X, W, B, dtype="bfloat16", products=THREE)
    operands = "bfloat16", "bfloat16"
    assert facts(explanation) == {
        "forward product": (1, Product(operands, "highest", "float32"), "bfloat16"),
        "input gradient": (1, Product(operands, "high", "float32"), "float32"),
        "weight gradient": (1, Product(operands, "default", "float32"), "float32"),
    }


def test_the_dtypes_are_those_of_the_device_and_not_those_of_the_source():
    # CPUs have no product of float16: its operands become float32.
    explanation = explain(linear, X, W, B, dtype="float16")
    product = Product(("float32", "float32"), "default", "float32")
    assert facts(explanation)["forward product"] == (1, product, "float16")


def test_only_the_products_that_run_are_there():
    def frozen(x):
        return linear(x, np.ones((OUT, IN), np.float32))

    assert [p.name for p in explain(frozen, X).products] == NAMES[:2]


def test_one_row_is_multiplied_element_by_element_where_xla_does_so():
    (*_, weight_gradient) = explain(linear, jnp.ones((1, IN)), W, B).products
    assert weight_gradient.name == "weight gradient"
    assert weight_gradient.runs_as == "elementwise"


def test_products_of_other_layers_are_told_apart_by_the_pass():
    found = explain(naive, X, W, B).products
    assert [(p.name, p.count) for p in found] == [
        ("other, forward pass", 1),
        ("other, backward pass", 2),
    ]


def test_saved_bytes_are_those_of_the_residuals():
    layer = functools.partial(linear, dtype="bfloat16")
    explanation = explain(layer, X, W, B)
    arguments = (jnp.zeros(a.shape, a.dtype) for a in (X, W, B))
    _, vjp = jax.vjp(layer, *arguments)
    assert explanation.saved_bytes == sum(a.nbytes for a in jax.tree.leaves(vjp))
    assert {(a.shape, a.dtype, a.is_argument) for a in explanation.saved} == {
        (X.shape, "bfloat16", False),
        (W.shape, "bfloat16", False),
    }


def test_arguments_that_are_saved_are_said_to_be():
    assert all(array.is_argument for array in explain(linear, X, W).saved)


def test_an_array_that_two_layers_save_counts_once():
    def twice(x, weight):
        return linear(x, weight) + linear(x, weight)

    assert explain(twice, X, W).saved_bytes == explain(linear, X, W).saved_bytes


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_collectives_with_their_bytes_on_each_device(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    def sharded(array, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    layer = functools.partial(linear, dtype="bfloat16")
    with jax.set_mesh(mesh):
        explanation = explain(layer, sharded(X, "data"), sharded(W), sharded(B))
    assert explanation.device.startswith("8 × ")
    assert [p.name for p in explanation.products] == NAMES
    # The sums of the gradients of the weight and of the bias.
    (found,) = explanation.collectives
    assert (found.kind, found.dtype, found.count) == ("all-reduce", "float32", 2)
    assert found.bytes == 4 * (OUT * IN + OUT)


def test_modules_of_each_kind_with_their_parameters_differentiated():
    ours = nnx.Sequential(
        jaxlinear.nnx.Linear(IN, 64, rngs=nnx.Rngs(0)),
        nnx.Dropout(0.1, rngs=nnx.Rngs(0)),
        jaxlinear.nnx.Linear(64, OUT, rngs=nnx.Rngs(0)),
    )
    assert [(p.name, p.count) for p in explain(ours, X).products] == [
        (name, 2) for name in NAMES
    ]
    for module in (jaxlinear.linen.Linear(OUT), linen.Dense(OUT)):
        assert sum(p.count for p in explain(module, X).products) == 3
    (first, *_) = explain(nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)), X).products
    assert first.name == "other, forward pass"


class InTraining(linen.Module):
    """A model whose call has a flag that decides in Python, and a scale."""

    @linen.compact
    def __call__(self, x, train=False, *, scale=1.0):
        x = jaxlinear.linen.Linear(OUT)(x) * scale
        if train:
            x = jaxlinear.linen.Linear(OUT)(x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.BatchNorm(use_running_average=not train)(x)


def test_flags_of_a_model_and_keyword_arguments_are_passed_on():
    options = {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
    for flag, count in (False, 1), (True, 2):
        by_name = explain(InTraining(), X, train=flag, scale=jnp.ones(()), **options)
        by_position = explain(InTraining(), X, flag, **options)
        for explanation in (by_name, by_position):
            assert [p.count for p in explanation.products] == [count] * 3
    assert (
        explain(linear, weight=W, x=X).saved_bytes == explain(linear, X, W).saved_bytes
    )


def test_a_loss_with_integer_labels():
    def loss(weight, x, labels):
        logits = linear(x, weight)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels, 1))

    labels = jax.ShapeDtypeStruct((ROWS, 1), "int32")
    assert [p.name for p in explain(loss, W, X, labels).products] == NAMES


@pytest.mark.parametrize(("reduction", "forward"), [("mean", 1), ("none", 2)])
def test_the_products_of_a_block_of_a_loss_without_logits(reduction, forward, use_form):
    use_form(cpu.NATIVE)
    h = jax.ShapeDtypeStruct((1024, 16), "bfloat16")
    weight = jax.ShapeDtypeStruct((2048, 16), "float32")
    labels = jax.ShapeDtypeStruct((1024,), "int32")
    loss = functools.partial(linear_cross_entropy, reduction=reduction)
    explanation = explain(loss, h, weight, labels, dtype="bfloat16")
    product = Product(("bfloat16", "bfloat16"), "default", "float32")
    assert facts(explanation) == {
        name: (count, product, "float32")
        for name, count in zip(NAMES, (forward, 1, 1), strict=True)
    }


@pytest.mark.parametrize("form", cpu.REASONS)
def test_the_form_of_bfloat16_products_and_why_it_is_that_one(form, use_form):
    use_form(form)
    layer = functools.partial(linear, dtype="bfloat16")
    assert explain(layer, X, W, B).notes == (cpu.REASONS[form],)
    assert cpu.REASONS[form] in repr(explain(layer, X, W, B))
    assert explain(linear, X, W, B).notes == ()


def test_it_prints_as_tables_that_a_notebook_renders():
    explanation = explain(linear, X, W, B)
    text = repr(explanation)
    assert text == str(explanation) == explanation._repr_markdown_()
    assert "| forward product |     1 | float32 × float32 |   default |" in text
    assert f"Saved for the backward pass: {4 * (ROWS + OUT) * IN:,} bytes." in text
    assert text.endswith("No collectives.")
    for line in text.splitlines():
        assert line.startswith("|") == line.endswith("|")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ((3, X), TypeError, "`function` must be callable, got int"),
        ((linear,), ValueError, "`args` must have a floating array to different"),
        ((lambda x: 1, X), ValueError, "`function` must return a floating array"),
    ],
)
def test_what_cannot_be_explained_is_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        explain(*call)


# Lines of programs for accelerators, as XLA prints them.
TPU = """
  %all-gather.7 = bf16[128,256]{0,1:T(8,128)(2,1)} all-gather(%param_0.16), channel_id=1
  %all-gather.9 = bf16[128,256]{0,1:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=1
  %fusion.3 = bf16[512,128]{1,0:T(8,128)} fusion(%param.1), kind=kLoop
  %fusion.7 = bf16[128,256]{1,0:T(8,128)} fusion(%param.2), kind=kLoop
  ROOT %convolution.5 = f32[128,128]{1,0:T(8,128)} convolution(%fusion.3, %fusion.7), \
dim_labels=bf_oi->bf, operand_precision={highest,highest}, \
metadata={op_name="jit(f)/jvp(forward_product)/dot_general" stack_frame_id=7}
  %all-reduce.2 = (f32[128,256]{1,0:T(8,128)}, f32[128]{0:T(128)}) \
all-reduce(%fusion.3, %fusion.7), channel_id=3, to_apply=%add
"""
GPU = """
  %p.1 = f16[64,32]{1,0} parameter(0)
  %p.2 = f16[48,32]{1,0} parameter(1)
  %gemm.1 = (f32[64,48]{1,0}, s8[4194304]{0}) custom-call(%p.1, %p.2), \
custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/dot_general"}, \
backend_config={"gemm_backend_config":{"precision_config":{"operand_precision":\
["DEFAULT","HIGH"],"algorithm":"ALG_UNSET"}}}
  %dot.2 = f32[64,48]{1,0} dot(%p.1, %p.2), algorithm=dot_tf32_tf32_f32_x3
  %start.1 = (pred[4], f8e4m3fn[16,4]{1,0}) collective-permute-start(%p.1), channel_id=5
  %start = (bf16[16,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%p.1), channel_id=2
  %done = bf16[64,4]{1,0} all-gather-done(%start)
  %flat = f16[64,32]{1,0} all-reduce-start(%p.1), channel_id=6
  %nested = ((f16[64,32]{1,0}), f16[64,32]{1,0}) all-reduce-start(%p.1), channel_id=7
  %scatter = ((f16[64,32]{1,0}, f16[48,32]{1,0}), (f16[8,32]{1,0}, f16[6,32]{1,0})) \
reduce-scatter-start(%p.1, %p.2), channel_id=8
"""


def test_programs_for_tpus_are_read():
    program = instructions(TPU)
    (product,) = [i for i in program if i.is_product]
    assert product.operand_dtypes == ("bfloat16", "bfloat16")
    assert product.results == (("float32", (128, 128)),)
    assert (product.precision, product.runs_as) == ("highest", "convolution")
    assert [(c.collective, c.received) for c in collectives(program)] == [
        ("all-gather", (("bfloat16", (128, 256)),)),
        ("all-reduce", (("float32", (128, 256)), ("float32", (128,)))),
    ]


def test_programs_for_gpus_are_read():
    program = instructions(GPU)
    library, dot = [i for i in program if i.is_product]
    assert library.operand_dtypes == ("float16", "float16")
    assert library.results[0] == ("float32", (64, 48))
    assert (library.precision, library.runs_as) == ("default/high", "__cublas$gemm")
    assert dot.precision == "dot_tf32_tf32_f32_x3"
    permute, gather, flat, nested, scatter = collectives(program)
    assert flat.received == nested.received == (("float16", (64, 32)),)
    assert scatter.received == (("float16", (8, 32)), ("float16", (6, 32)))
    assert permute.received == (("float8_e4m3fn", (16, 4)),)
    assert gather.received == (("bfloat16", (64, 4)),)
    assert [bits(array[0]) for array in permute.results] == [8, 8]
    assert bits(gather.received[0][0]) == 16


def test_8_bits_on_cpu_are_said_to_be_no_faster():
    x, weight = jnp.ones((8, 16)), jnp.ones((4, 16))
    for recipe in (jaxlinear.FLOAT8, jaxlinear.INT8):
        found = jaxlinear.explain(linear, x, weight, products=recipe)
        assert any("no faster than bfloat16" in note for note in found.notes)
        assert {str(recipe.forward.dtype)} <= {array.dtype for array in found.saved}
    assert not any("8-bit" in n for n in jaxlinear.explain(linear, x, weight).notes)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", "float32", None),
        ("gpu", "float32", "operands of float32 products to TensorFloat32"),
        ("tpu", "float32", "operands of float32 products to bfloat16"),
        ("tpu", "float16", "operands of float16 products to bfloat16"),
        ("tpu", "bfloat16", None),
    ],
)
def test_the_default_precision_is_said_where_it_drops_bits(device, dtype, expected):
    a = jax.ShapeDtypeStruct((8, 16), dtype)
    device = SimpleNamespace(platform=device, compute_capability="9.0")

    def notes(precision):
        lowered = jax.jit(lambda a, b: lax.dot(a, b.T, precision=precision)).lower(a, a)
        asked = instructions(lowered.as_text("hlo", debug_info=True))
        return [n for n in _notes(asked, device) if "precision" in n]

    assert len(notes(None)) == (expected is not None)
    assert expected is None or expected in notes(None)[0]
    assert not notes("highest")
