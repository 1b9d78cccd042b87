"""The tests of the tests: each way to break the package makes a test fail.

A mutant is a copy of the package with one piece of text replaced; the tests that should
notice run against it in a process of their own.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "jaxlinear"

# name: file, text, replacement, and the tests that must fail
MUTANTS = {
    "bias gradient without its sum": (
        "_products.py",
        "jnp.sum(G, range(G.ndim - 1), dtype=accumulator(G.dtype))",
        "G.reshape(-1, G.shape[-1])[0].astype(accumulator(G.dtype))",
        "test_values.py::test_gradients_are_those_of_the_naive_formula",
    ),
    "bias gradient summed over the first axis alone": (
        "_products.py",
        "jnp.sum(G, range(G.ndim - 1),",
        "jnp.sum(G, 0,",
        "test_values.py::test_gradients_are_those_of_the_naive_formula",
    ),
    "bias gradient summed in its own dtype": (
        "_products.py",
        "range(G.ndim - 1), dtype=accumulator(G.dtype))",
        "range(G.ndim - 1), dtype=G.dtype, promote_integers=False).astype(G.dtype)",
        "test_mixed_precision.py::test_parameter_gradients_keep_float32_accuracy_under_bfloat16_compute",
    ),
    "weight gradient transposed": (
        "_products.py",
        "_product(G, X, (leading, leading), W_type,",
        "_product(X, G, (leading, leading), W_type,",
        "test_values.py::test_gradients_are_those_of_the_naive_formula",
    ),
    "input gradient of the transposed weight": (
        "_products.py",
        "_product(G, W, ((G.ndim - 1,), (0,))",
        "_product(G, W.T.reshape(W.shape), ((G.ndim - 1,), (0,))",
        "test_values.py::test_gradients_are_those_of_the_naive_formula",
    ),
    "conjugated weight gradient": (
        "_products.py",
        "grad_W = _product(G, X,",
        "grad_W = _product(G, X.conj(),",
        "test_values.py::test_gradients_are_those_of_the_naive_formula",
    ),
    "products accumulated in the compute dtype": (
        "_types.py",
        'jnp.dtype("float32") if jnp.finfo(dtype).bits < 32 else dtype',
        "dtype",
        "test_mixed_precision.py::test_parameter_gradients_keep_float32_accuracy_under_bfloat16_compute",
    ),
    "output rounded before the bias is added": (
        "_types.py",
        "default = None if is_rounded_later else dtype",
        "default = dtype",
        "test_values.py::test_float16_output_survives_a_product_that_alone_would_overflow",
    ),
    "products that ignore the dtype in which they are reduced": (
        "_linear.py",
        "cotangent_type(a, backward_dtype, gradient_precision, reduce_dtype)",
        "cotangent_type(a, backward_dtype, gradient_precision, None)",
        "test_products.py::test_weight_gradient_is_rounded_to_the_dtype_in_which_it_is_reduced",
    ),
    "bfloat16 operands of a vmapped float32 product on CPU": (
        "_cpu.py",
        "_dot(a.astype(wide), b.astype(wide), axes, precision, sharding)",
        "_dot(a, b, axes, precision, sharding)",
        "test_products.py::test_transposed_gradients_in_mixed_precision",
    ),
    "no barrier behind a float32 product on CPU": (
        "_cpu.py",
        "lax.optimization_barrier(dot(a, b, *options))",
        "dot(a, b, *options)",
        "test_products.py::test_transposed_gradients_in_mixed_precision",
    ),
    "no barrier before a float32 product on CPU": (
        "_cpu.py",
        "a if is_gathered else lax.optimization_barrier(a)",
        "a",
        "test_products.py::test_a_transposed_operand_that_is_cast_in_another_function",
    ),
    "a barrier before an operand that is gathered": (
        "_cpu.py",
        "a if is_gathered else lax.optimization_barrier(a)",
        "lax.optimization_barrier(a)",
        "test_collectives.py::test_collectives_are_those_of_the_naive_formula[AxisType.Explicit-sequence-bfloat16]",
    ),
    "the result of a product of swapped operands not transposed back": (
        "_cpu.py",
        "return cpu_product(b, a, *options).T",
        "return cpu_product(b, a, *options).reshape(a.shape[-1], -1)",
        "test_products.py::test_weight_gradient_of_many_more_outputs_than_inputs",
    ),
    "widened operands, which are gathered one by one": (
        "_cpu.py",
        "lax.optimization_barrier(dot(a, b, *options))",
        "widened(a, b)",
        "test_collectives.py::test_collectives_are_those_of_the_naive_formula[AxisType.Auto-fsdp over the input features-mixed]",
    ),
    "rows that are flattened in another order": (
        "_cpu.py",
        "a, b, axes = _rows(a), _rows(b), ((0,), (0,))",
        "a, b, axes = _rows(a.swapaxes(0, 1)), _rows(b), ((0,), (0,))",
        "test_products.py::test_weight_gradient_of_many_more_outputs_than_inputs",
    ),
    "a bias added in float32 on GPUs": (
        "_products.py",
        "cuda=rounded, rocm=rounded, default=wide",
        "default=wide",
        "test_products.py::test_accelerators_multiply_in_bfloat16_and_round_where_it_is_free",
    ),
    "one long sum at one row": (
        "_cpu.py",
        "return is_input_gradient and _is_one_row(a)",
        "return False and _is_one_row(a)",
        "test_accuracy.py::test_input_gradient_of_one_row_is_not_one_long_sum",
    ),
    "gradients with the precisions of each other": (
        "_linear.py",
        "precision.input_grad, precision.weight_grad, None",
        "precision.weight_grad, precision.input_grad, None",
        "test_precision.py::test_each_product_has_its_own_precision",
    ),
    "the default precision of the backward pass": (
        "_precision.py",
        "    if precision is None:  # The",
        "    if False:  # The",
        "test_precision.py::test_default_precision_is_that_under_which_the_call_is_made",
    ),
    "products without a precision on CPU": (
        "_cpu.py",
        "precision=precision,\n        preferred_element_type=accumulator(a.dtype)",
        "preferred_element_type=accumulator(a.dtype)",
        "test_precision.py::test_second_derivatives_have_the_precision_of_the_product_they_come_from",
    ),
    "an algorithm of low precision as JAX lowers it for CPU": (
        "_cpu.py",
        "        return precision in _ALGORITHMS",
        "        return False",
        "test_products.py::test_transposed_gradients_in_mixed_precision",
    ),
    "algorithms that are not checked": (
        "_linear.py",
        "    if precision is not None:\n",
        "    if False:\n",
        "test_precision.py::test_algorithm_that_the_device_does_not_have_is_refused",
    ),
    "backward products of the operands of the forward product": (
        "_linear.py",
        "X, W = x.value.astype(backward_dtype), weight.value.astype(backward_dtype)",
        "X, W = X.astype(backward_dtype), W.astype(backward_dtype)",
        "test_backward_dtype.py::test_gradients_that_float16_flushes_to_zero_survive",
    ),
    "operands cast again for the backward pass": (
        "_linear.py",
        "if backward_dtype != Y_type.dtype:",
        "if True:",
        "test_collectives.py::test_collectives_are_those_of_the_naive_formula[AxisType.Auto-fsdp over the input features-mixed]",
    ),
    "the hint of the other gradient": (
        "_products.py",
        'X_type, hint="grad_x"',
        'X_type, hint="grad_y"',
        "test_backward_dtype.py::test_alternative_float16_is_a_hint_on_the_two_backward_products",
    ),
    "a collective counted as often as XLA repeats it": (
        "_hlo.py",
        "channel[1] if channel else -position",
        "-position",
        "test_explain.py::test_programs_for_tpus_are_read",
    ),
    "a check of accuracy that never fails": (
        "_accuracy.py",
        "self.error <= self.explained",
        "not self.error > self.explained",
        "test_accuracy_check.py::test_not_a_number_is_not_explained",
    ),
    "output without its name": (
        "_linear.py",
        'checkpoint_name(_linear(*operands, Y_type, types), "linear")',
        "_linear(*operands, Y_type, types)",
        "test_remat.py::test_our_policy_saves_the_outputs_and_no_forward_product_runs_again",
    ),
    "jitted inside the switch": (
        "_linear.py",
        "bare = in_plain_autodiff() or is_traced_with_explicit_axes(weight)",
        "bare = is_traced_with_explicit_axes(weight)",
        "test_plain_autodiff.py::test_inside_a_float32_layer_is_one_product_and_one_sum",
    ),
    "a switch that does nothing": (
        "_linear.py",
        "    if in_plain_autodiff():\n",
        "    if False:\n",
        "test_table.py::test_ours_and_the_naive_formula_pass[jvp-`linear`]",
    ),
    "a switch that stays on": (
        "_plain.py",
        "    with _in_plain_autodiff(True):\n        yield",
        "    _in_plain_autodiff(True).__enter__()\n    yield",
        "test_plain_autodiff.py::test_it_is_off_again_after_the_block_nested_blocks_and_exceptions",
    ),
    "operands swapped in the residuals": (
        "_linear.py",
        "kept_X = X if weight.perturbed else _not_kept()\n    kept_W = W if x.perturbed",
        "kept_X = X if x.perturbed else _not_kept()\n    kept_W = W if weight.perturbed",
        "test_residuals.py::test_each_operand_is_kept_in_the_compute_dtype_if_the_other_is_differentiated",
    ),
    "both operands always kept": (
        "_linear.py",
        "return Y, (kept_X, kept_W)",
        "return Y, (X, W)",
        "test_residuals.py::test_a_frozen_layer_in_a_scan_keeps_its_weight_once",
    ),
    "the input kept as it came": (
        "_linear.py",
        "kept_X = X if",
        "kept_X = x.value if",
        "test_residuals.py::test_each_operand_is_kept_in_the_compute_dtype_if_the_other_is_differentiated",
    ),
    "residuals of different structures": (
        "_linear.py",
        "    return jnp.zeros(0, bool)\n\n\ndef _is_kept(residual):\n    return residual.dtype != bool",
        "    return None\n\n\ndef _is_kept(residual):\n    return residual is not None",
        "test_caching.py",
    ),
    "weight gradient left in the accumulator's dtype": (
        "_products.py",
        "return round_to(W_type.dtype, grad_W)",
        "return grad_W",
        "test_transformations.py::test_gradient_through_a_scan_that_carries_a_bfloat16_weight",
    ),
    "complex gradient of a real argument": (
        "_types.py",
        "cotangent = cotangent.real",
        "pass",
        "test_values.py::test_each_gradient_has_the_dtype_of_its_argument_and_is_rounded_to_it_once",
    ),
    "operands that vary over different manual axes": (
        "_linear.py",
        "vary_together(x, weight, bias)",
        "(x, weight, bias)",
        "test_table.py::test_ours_and_the_naive_formula_pass[shard_map_data_parallel-`linear`]",
    ),
    "cotangents without a sharding": (
        "_types.py",
        "NamedSharding(mesh, spec) if _has_explicit_axes(mesh) else None",
        "None",
        "test_table.py::test_ours_and_the_naive_formula_pass[explicit_sharding_data_parallel-`linear`]",
    ),
    "arrays made before the mesh forgotten": (
        "_types.py",
        "mesh = jax.sharding.get_abstract_mesh()",
        "pass",
        "test_sharding.py::test_explicit_mesh_accepts_parameters_made_before_the_mesh_was_set",
    ),
    "initial values rounded beyond the bound": (
        "_init.py",
        "jnp.clip(values, -float(limit), float(limit))",
        "values",
        "test_init.py::test_every_value_is_inside_the_bound_in_every_dtype",
    ),
    "initial values with PyTorch's bound squared": (
        "_init.py",
        "math.sqrt(1 / in_features)",
        "(1 / in_features)",
        "test_init.py::test_weight_and_bias_are_uniform",
    ),
    "initial values drawn in the parameter's dtype": (
        "_init.py",
        "drawn = jnp.float32",
        "pass",
        "test_init.py::test_weight_and_bias_are_uniform",
    ),
    "bias of one element": (
        "_checks.py",
        "bias is not None and bias.shape != weight.shape[:1]",
        "False",
        "test_refusals.py",
    ),
    "input of another size": (
        "_checks.py",
        "x.shape[-1] != weight.shape[1]",
        "False",
        "test_refusals.py",
    ),
}


def copied_package(folder):
    copy = folder / "jaxlinear"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def run_tests(tests, folder):
    """Run ``tests`` with the package found in ``folder``, before the one beside them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [*command, "-c", str(TESTS.parent / "pyproject.toml"), str(TESTS / tests)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_broken_package_makes_a_test_fail(mutant, tmp_path):
    name, text, replacement, tests = mutant
    file = copied_package(tmp_path) / name
    source = file.read_text()
    assert source.count(text) == 1, f"{text!r} is not in {name} exactly once"
    file.write_text(source.replace(text, replacement))
    result = run_tests(tests, tmp_path)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout


def test_a_copy_that_is_not_broken_passes(tmp_path):
    copied_package(tmp_path)
    result = run_tests("test_refusals.py", tmp_path)
    assert result.returncode == pytest.ExitCode.OK, result.stdout
