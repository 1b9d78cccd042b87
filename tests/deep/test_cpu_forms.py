"""The forms of a product on CPU: right values and no failure, whatever the form."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from oracle import (
    exact,
    naive,
    output_and_gradients,
    random_problem,
    relative_error,
    wide,
)

from jaxlinear import linear
from jaxlinear._op import cpu

each_form = pytest.mark.parametrize("form", cpu.REASONS)


@pytest.mark.skipif(
    not pathlib.Path("/proc/cpuinfo").exists(), reason="needs Linux's list of features"
)
def test_bfloat16_instructions_are_those_that_the_system_lists():
    flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    listed = not flags.isdisjoint({"avx512_bf16", "amx_bf16"})
    assert cpu._has_bfloat16_instructions() is listed
    # And where the layer is first called in a mesh.
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        assert cpu._has_bfloat16_instructions() is listed


@each_form
def test_values_are_right_whatever_the_form(form, use_form):
    use_form(form)
    x, weight, bias, cotangent = random_problem((64,), 48, 40, "bfloat16")
    found = output_and_gradients(jax.jit(linear), x, weight, bias, cotangent)
    eps = float(jnp.finfo("bfloat16").eps)
    for ours, (expected, _) in zip(
        found, exact(x, weight, bias, cotangent), strict=True
    ):
        assert relative_error(ours, expected) < eps


@pytest.mark.parametrize("form", [cpu.SHARED, cpu.WIDENED])
def test_long_sums_are_as_accurate_as_in_float32_without_bfloat16_instructions(
    form, use_form
):
    use_form(form)
    x, _, _, cotangent = random_problem((4096,), 512, 512, "bfloat16")
    weight = jnp.zeros((512, 512))
    _, vjp = jax.vjp(lambda w: linear(x, w, dtype="bfloat16"), weight)
    expected = wide(cotangent).T @ wide(x)
    in_float32 = jax.jit(lambda G, X: G.astype("float32").T @ X.astype("float32"))
    of_float32 = relative_error(in_float32(cotangent, x), expected)
    assert relative_error(vjp(cotangent)[0], expected) <= 1.01 * of_float32


@each_form
@pytest.mark.parametrize("activation", [jax.nn.gelu, jnp.tanh, jax.nn.relu])
def test_a_model_has_the_same_value_in_every_program(activation, form, use_form):
    """XLA drops the rounding of an activation that is cast to float32 at once."""
    use_form(form)
    x, weight, bias, _ = random_problem((32,), 64, 64, "float32")
    layer = functools.partial(linear, dtype="bfloat16")

    @jax.checkpoint
    def block(x, _):
        return layer(activation(layer(x, weight, bias)), weight, bias), None

    def model(x):
        return jax.lax.scan(block, x.astype("bfloat16"), None, length=2)[0]

    expected = x.astype("bfloat16")
    for k in range(4):
        expected = jax.jit(layer)(expected, weight, bias)
        expected = expected if k % 2 else jax.jit(activation)(expected)
    beside_a_gradient = jax.jit(lambda x: [y := jax.vjp(model, x), y[1](y[0])][0][0])
    for value in jax.jit(model)(x), beside_a_gradient(x):
        # Float32 sums may differ, and with them a rounding now and then.
        assert jnp.mean(value != expected) < 0.02


@each_form
@pytest.mark.parametrize("reduction", [jnp.sum, jnp.max], ids=["sum", "max"])
def test_relu_between_three_layers_and_a_reduction(reduction, form, use_form):
    """XLA's YNNPACK would make one kernel of it, with an uninitialized constant."""
    use_form(form)
    x, weight, _, _ = random_problem((64,), 128, 128, "float32")

    def loss(x, weight):
        for _ in range(2):
            x = jax.nn.relu(linear(x, weight, dtype="bfloat16"))
        return reduction(linear(x, weight, dtype="bfloat16").astype("float32"))

    compiled = jax.jit(loss)(x, weight)
    assert abs(compiled - loss(x, weight)) < 0.02 * abs(compiled)


@each_form
# Both mapped, and other axes, are among the random programs.
@pytest.mark.parametrize("precision", [None, "BF16_BF16_F32"])
@pytest.mark.parametrize(
    ("x_axis", "weight_axis"), [(None, None), (2, None), (None, 0)]
)
def test_transposed_gradients_in_mixed_precision(
    x_axis, weight_axis, precision, form, use_form
):
    use_form(form)
    # XLA's CPU backend folds the transpose into the product, and fails when it runs one
    # that takes bfloat16 operands and has a float32 result.
    x, weight, _, _ = random_problem((2, 3), 8, 2, "float32")
    if x_axis is not None:
        x = jnp.stack([x, -x], x_axis)
    if weight_axis is not None:
        weight = jnp.stack([weight, 2 * weight], weight_axis)

    def gradients(layer):
        def loss(x, weight):
            Y = layer(x, weight, dtype="bfloat16")
            return jnp.sum(Y.astype("float32") ** 2)

        def transposed(x, weight):
            return [gradient.T for gradient in jax.grad(loss, (0, 1))(x, weight)]

        axes = x_axis, weight_axis
        return jax.jit(
            transposed if axes == (None, None) else jax.vmap(transposed, axes)
        )

    # The two differ by their roundings, a few of half a bfloat16 eps each.
    tolerance = 4 * float(jnp.finfo("bfloat16").eps)
    layer = functools.partial(linear, precision=precision)
    for ours, expected in zip(
        gradients(layer)(x, weight), gradients(naive)(x, weight), strict=True
    ):
        assert relative_error(ours, wide(expected)) < tolerance


@each_form
@pytest.mark.parametrize("weight_is_transposed", [False, True])
def test_a_transposed_operand_that_is_cast_in_another_function(
    weight_is_transposed, form, use_form
):
    use_form(form)
    # XLA folds the transpose into the product later than where there is one function.
    x, weight, _, _ = random_problem((8,), 16, 4, "float32")
    inner = jax.jit(functools.partial(linear, dtype="bfloat16"))

    @jax.jit
    def layer(x_transposed, weight):
        weight = weight.T if weight_is_transposed else weight
        return inner(x_transposed.T, weight)

    Y = layer(x.T, weight.T if weight_is_transposed else weight)
    expected = wide(x) @ wide(weight).T
    assert relative_error(Y, expected) < 2 * float(jnp.finfo("bfloat16").eps)


@each_form
@pytest.mark.parametrize("leading", [(64,), (4, 16)], ids=str)
def test_weight_gradient_of_many_more_outputs_than_inputs(leading, form, use_form):
    use_form(form)
    # On CPU it is the transposed product of the swapped operands, or that of rows.
    x, weight, _, cotangent = random_problem(leading, 8, 32, "bfloat16")
    (gradient,) = jax.vjp(lambda weight: linear(x, weight), weight)[1](cotangent)
    expected = wide(cotangent).reshape(-1, 32).T @ wide(x).reshape(-1, 8)
    assert relative_error(gradient, expected) < float(jnp.finfo("bfloat16").eps)


# Of READ and WIDENED each XLA has one, which is the one whose memory counts.
MISSING = cpu.WIDENED if cpu._reads_bfloat16() else cpu.READ
each_form_here = pytest.mark.parametrize(
    "form", [form for form in cpu.REASONS if form != MISSING]
)


def temporary_bytes(function, *arrays):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    compiled = jax.jit(function).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@each_form_here
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_a_few_rows_make_no_copy_of_the_weight(rows, form, use_form):
    use_form(form)
    x, weight, bias, cotangent = random_problem((rows,), 1024, 1024, "bfloat16")

    def input_gradient(x, weight, G):
        return jax.vjp(lambda x: linear(x, weight), x)[1](G)

    # The rows in float32, twice.
    least = 8 * rows * 1024 + 2**15
    assert temporary_bytes(linear, x, weight, bias) <= least
    assert temporary_bytes(input_gradient, x, weight, cotangent) <= least


@pytest.mark.parametrize(
    "form", [form for form in cpu.REASONS if form not in (MISSING, cpu.SHARED)]
)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # of the parameters
def test_several_leading_axes_take_the_memory_of_the_naive_formula(
    dtype, mapped, form, use_form, monkeypatch
):
    use_form(form)
    monkeypatch.setattr(cpu, "has_one_device", lambda: True)
    x, weight, _, cotangent = random_problem((4, 128), 512, 256, "bfloat16")
    weight = weight.astype(dtype)
    if mapped:
        x, weight, cotangent = (jnp.stack([a] * 3) for a in (x, weight, cotangent))

    def both(layer):
        def apply(x, weight):
            return layer(x, weight, dtype="bfloat16")

        apply = jax.vmap(apply) if mapped else apply
        return apply, lambda x, weight, G: jax.vjp(apply, x, weight)[1](G)

    for ours, theirs, arrays in zip(
        both(linear), both(naive), [(x, weight), (x, weight, cotangent)], strict=True
    ):
        theirs = temporary_bytes(theirs, *arrays)
        assert temporary_bytes(ours, *arrays) <= 1.1 * theirs + 2**17


# Algorithms of low precision that CPUs have, and the dtype in which they multiply.
ALGORITHMS = {"BF16_BF16_F32": "bfloat16", "F16_F16_F16": "float16"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_algorithms_of_low_precision_run_on_cpu_mapped_over_weights_too(
    dtype, algorithm
):
    # Where XLA folds a transpose into it, a plain product of bfloat16 fails on CPU.
    x, weight, bias, cotangent = random_problem((16, 2), 8, 6, dtype)
    layer = functools.partial(linear, precision=algorithm)
    multiplied = ALGORITHMS[algorithm]
    operands = [a.astype(multiplied).astype(dtype) for a in (x, weight)]
    for mapped in (False, True):
        function = functools.partial(output_and_gradients, layer)
        arguments = x, weight, bias, cotangent
        if mapped:
            function = jax.vmap(function, (None, 2, None, None), -1)
            arguments = x, jnp.stack([weight] * 3, 2), bias, cotangent
        actual = jax.jit(function)(*arguments)
        expected = [
            *exact(*operands, bias, cotangent.astype(multiplied).astype(dtype))
        ][:3]
        # Of the products' operands, their sums and their results each is rounded once.
        tolerance = 4 * max(jnp.finfo(multiplied).eps, jnp.finfo(dtype).eps)
        for value, (want, _) in zip(actual, expected, strict=False):
            value = value[..., 0] if mapped else value
            assert relative_error(value, want) < tolerance


@pytest.mark.parametrize(
    ("dtype", "form"),
    [("float32", cpu.NATIVE), *(("bfloat16", form) for form in cpu.REASONS)],
)
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [(1, 0, 32), (1, 32, 0), (1, 0, 0), (0, 3, 32), (64, 0, 2048)],
)
def test_no_form_fails_where_an_axis_is_empty(
    dtype, rows, in_features, out_features, form, use_form
):
    use_form(form)
    x, weight, bias, cotangent = random_problem(
        (rows,), in_features, out_features, dtype
    )
    found = output_and_gradients(linear, x, weight, bias, cotangent)
    for ours, (expected, _) in zip(
        found, exact(x, weight, bias, cotangent), strict=True
    ):
        assert ours.shape == expected.shape
        assert relative_error(ours, expected) < float(jnp.finfo(dtype).eps)
