"""Ways to break the package that no exception shows, and the test of each.

A mutant replaces a symbol of the package, wherever the package has bound it. A symbol
that is gone is an error. With ``MUTANT=name`` in the environment `conftest.py` breaks
the package before a test.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable

import jax.numpy as jnp

from jaxlinear import (
    Products,
    _checks,
    _every_mode,
    _linear,
    _op,
    _product,
    _product_checks,
)
from jaxlinear._examples import factors, gradients, uses
from jaxlinear._flax import parameters, trees
from jaxlinear.torch import _matching

EXAMPLES = "test_example_gradients.py::test_gradients_are_those_of_vmap_of_grad"
ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Mutant:
    breaks: Callable[[], None]
    killer: str  # the node id of the test, relative to `tests`


MUTANTS = {}


def mutant(name, killer):
    def add(breaks):
        MUTANTS[name] = Mutant(breaks, killer)

    return add


def killed(name):
    """Run the test that must notice: whether it failed, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p"]
    command += ["no:cacheprovider", f"tests/{MUTANTS[name].killer}"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"MUTANT": name},
        capture_output=True,
        text=True,
    )
    # Not an error while tests are collected, nor a test that is not there.
    return run.returncode == 1, run.stdout + run.stderr


def replace(module, name, make):
    """Put ``make(right)`` in the place of ``module.name``, wherever it is bound."""
    right = getattr(module, name)
    wrong = make(right)
    for bound in [*sys.modules.values()]:
        if getattr(bound, "__name__", "").partition(".")[0] == "jaxlinear":
            for key, value in [*vars(bound).items()]:
                if value is right:
                    setattr(bound, key, wrong)


def replace_forward_rule(make):
    """Register ``make(rule)`` for the forward pass."""
    _linear._linear.fwd = make(_linear._linear.fwd)


def replace_products(change):
    """Compute with ``change(*products)``, of the three with their defaults."""

    def changed(right):
        return lambda *a: Products(*change(*right(*a)))

    replace(_product_checks, "with_defaults", changed)


def with_value_and_perturbed(value, perturbed):
    """An argument of the forward rule."""
    return types.SimpleNamespace(value=value, perturbed=perturbed)


GRADIENTS = "test_values.py::test_gradients_are_those_of_the_naive_formula"
FLOAT32 = "test_mixed_precision.py::test_parameter_gradients_keep_float32_accuracy_under_bfloat16_compute"
SUMMED = "test_every_mode.py::test_a_mapped_bias_costs_the_other_gradients_no_accuracy"
EIGHT = "test_eight_bits.py::"


# The formulas.


@mutant("bias gradient without its sum", GRADIENTS)
def _():
    def first_row(right):
        return lambda G, B_type: G.reshape(-1, G.shape[-1])[0].astype(B_type.dtype)

    replace(_op.formulas, "bias_gradient", first_row)


@mutant("bias gradient summed in its own dtype", FLOAT32)
def _():
    def rounded(right):
        return lambda G, B_type: right(G, B_type).astype(G.dtype).astype(B_type.dtype)

    replace(_op.formulas, "bias_gradient", rounded)


@mutant("conjugated weight gradient", GRADIENTS)
def _():
    def conjugated(right):
        return lambda G, X, *a: right(G, X.conj(), *a)

    replace(_op.formulas, "weight_gradient", conjugated)


@mutant("input gradient of the transposed weight", GRADIENTS)
def _():
    def transposed(right):
        return lambda G, W, *a: right(G, W.T.reshape(W.shape), *a)

    replace(_op.formulas, "input_gradient", transposed)


@mutant(
    "weight gradient left in the accumulator's dtype",
    "deep/test_transformations_of_linear.py::test_gradient_through_a_scan_that_carries_a_bfloat16_weight",
)
def _():
    replace(_op.formulas, "round_to", lambda right: lambda dtype, cotangent: cotangent)


@mutant("products accumulated in the compute dtype", FLOAT32)
def _():
    replace(_product, "accumulator_dtype", lambda right: jnp.dtype)


# What was asked of a product.


@mutant(
    "output rounded before the bias is added",
    "test_products.py::test_every_product_is_rounded_once_from_operands_of_its_own_dtype[(64,)-float32 arguments]",
)
def _():
    def rounded(forward, *gradients):
        preferred = forward.preferred_element_type or forward.operand_dtype
        return forward._replace(preferred_element_type=preferred), *gradients

    replace_products(rounded)


@mutant(
    "gradients that ignore the dtype in which they are reduced",
    "test_products.py::test_a_gradient_that_is_reduced_in_bfloat16_is_rounded_and_no_other",
)
def _():
    def ignored(forward, *gradients):
        wide = {"preferred_element_type": jnp.dtype("float32")}
        return forward, *(product._replace(**wide) for product in gradients)

    replace_products(ignored)


@mutant(
    "gradients with the precisions of each other",
    "test_products.py::test_each_product_has_its_own_precision",
)
def _():
    def swapped(forward, first, second):
        first_ = first._replace(precision=second.precision)
        return forward, first_, second._replace(precision=first.precision)

    replace_products(swapped)


@mutant(
    "the default precision of the backward pass",
    "test_products.py::test_default_precision_is_that_under_which_the_call_is_made",
)
def _():
    replace(_product_checks, "_default_precision", lambda right: lambda: None)


@mutant(
    "the hint of the other gradient",
    "test_products.py::test_alternative_float16_is_a_hint_whatever_else_is_asked",
)
def _():
    names = {"grad_x": "grad_y", "grad_y": "grad_x", "": ""}

    def swapped(right):
        return lambda *a, hint="": right(*a, hint=names[hint])

    replace(_op.formulas, "multiply", swapped)


@mutant(
    "shapes that are not checked",
    "test_arguments.py::test_bad_arguments_are_refused_by_name[bias of one element]",
)
def _():
    replace(_checks, "check_shapes", lambda right: lambda *a: None)


# What is kept for the backward pass.


@mutant(
    "backward products of the operands of the forward product",
    "test_products.py::test_gradients_that_float16_flushes_to_zero_survive_in_bfloat16",
)
def _():
    def of_rounded(rule):
        def forward(x, weight, bias, spec):
            dtype = spec.products.forward.operand_dtype
            x, weight = (
                with_value_and_perturbed(primal.value.astype(dtype), primal.perturbed)
                for primal in (x, weight)
            )
            return rule(x, weight, bias, spec)

        return forward

    replace_forward_rule(of_rounded)


@mutant(
    "both operands always kept",
    "test_residuals.py::test_a_frozen_layer_in_a_scan_keeps_its_weight_once",
)
def _():
    def perturbed(rule):
        return lambda x, weight, *rest: rule(
            with_value_and_perturbed(x.value, True),
            with_value_and_perturbed(weight.value, True),
            *rest,
        )

    replace_forward_rule(perturbed)


@mutant(
    "the input kept as it came",
    "test_residuals.py::test_each_operand_is_kept_in_the_compute_dtype_if_the_other_is_differentiated",
)
def _():
    def unrounded(rule):
        def forward(x, weight, *rest):
            Y, kept = rule(x, weight, *rest)
            return Y, kept._replace(X=x.value if weight.perturbed else None)

        return forward

    replace_forward_rule(unrounded)


@mutant(
    "output without its name",
    "test_remat.py::test_our_policy_saves_the_outputs_and_no_forward_product_runs_again",
)
def _():
    replace(_linear, "checkpoint_name", lambda right: lambda Y, name: Y)


# Every mode, and maps.


@mutant(
    "reverse mode that transposes the formula",
    "test_every_mode.py::test_every_reverse_mode_runs_the_registered_rules",
)
def _():
    def without_rule(right):
        return lambda op, static, residuals, tangents, results: op.differential(
            *static, residuals, tangents
        )

    replace(_every_mode.linear_map, "linear_map", without_rule)


@mutant(
    "a tangent of two products that are rounded first",
    "test_every_mode.py::test_a_tangent_of_two_products_is_rounded_once",
)
def _():
    right = _every_mode.op.Op.tangent

    def rounded(op, static, residuals, tangents, results):
        one_by_one = [
            right(
                op,
                static,
                residuals,
                [t if k == j else None for k in range(3)],
                results,
            )
            for j, t in enumerate(tangents)
            if t is not None
        ]
        return [sum(parts[1:], parts[0]) for parts in zip(*one_by_one, strict=True)]

    _every_mode.op.Op.tangent = rounded


@mutant(
    "an axis of x that is not one more leading axis",
    "test_every_mode.py::test_a_map_over_x_costs_what_one_more_leading_axis_does",
)
def _():
    def never(right):
        return lambda axis, arrays, places, has, levels: right(
            axis, arrays, places, [False] * len(has), levels
        )

    replace(_every_mode.levels, "batched", never)


@mutant("cotangents summed in their own dtype", SUMMED)
def _():
    def narrow(right):
        return lambda array: jnp.sum(array, 0, dtype=array.dtype)

    replace(_every_mode.levels, "_sum", narrow)


@mutant("sums of cotangents rounded to the operands' dtype", SUMMED)
def _():
    right = _linear._linear.bwd

    def rounded(spec, residuals, G):
        return right(spec, residuals, G.astype(spec.Y.dtype))

    _linear._linear.bwd = rounded


@mutant(
    "what checkify has made is differentiated without the rule",
    "test_interpreters.py::test_what_checkify_has_made_is_differentiated_by_the_rule",
)
def _():
    def of_the_program(self, values, checked, **params):
        return checked.call_wrapped(*values)

    _every_mode.open.OpenPrimitive._bind_checked = of_the_program


# Forms on CPU, and several devices.


@mutant(
    "one long sum at one row",
    "test_accuracy.py::test_input_gradient_of_one_row_is_not_one_long_sum",
)
def _():
    replace(_op.cpu, "_is_long_sum_of_one_row", lambda right: lambda *a: False)


@mutant(
    "widened operands, which are gathered one by one",
    "test_collectives.py::test_collectives_are_those_of_the_naive_formula[AxisType.Auto-fsdp over the input features-mixed]",
)
def _():
    replace(_op.cpu, "bfloat16_form", lambda right: lambda: _op.cpu.WIDENED)


@mutant(
    "cotangents without a sharding",
    "deep/test_transformations_of_linear.py::test_the_layer_passes[explicit_sharding_data_parallel]",
)
def _():
    def unsharded(right):
        return lambda a: right(a)._replace(sharding=None)

    replace(_op.sharding, "cotangent_type", unsharded)


# Eight bits.


@mutant(
    "a second derivative that is taken for zero",
    f"{EIGHT}test_second_derivatives_need_gradient_products_of_more_bits[int8]",
)
def _():
    def silent(right):
        return lambda quantized: quantized._replace(array=None)

    replace(_op.operands, "_without_array", silent)


@mutant(
    "a cotangent that is quantized for each product",
    f"{EIGHT}test_collectives_are_those_of_bfloat16_and_the_maxima[float8-AxisType.Auto-data]",
)
def _():
    replace(_op.operands, "shared_operand", lambda right: lambda G, *products: G)


@mutant(
    "one scale for every element of a map",
    f"{EIGHT}test_each_element_of_a_map_is_quantized_by_itself[float8]",
)
def _():
    _linear.Spec.has_given_axes = False


@mutant(
    "a scale that is lost where what jax.vmap maps is contracted",
    f"{EIGHT}test_gradients_of_a_map_are_as_accurate_as_those_without[float8-weight-0]",
)
def _():
    def lost(right):
        return lambda b, a, axes: (a.array, right(b, a, axes)[1])

    replace(_op.quantized, "_with_scale_of", lost)


# Gradients of single examples.


@mutant("norms of two uses of a parameter added", f"{EXAMPLES}[tied GPT]")
def _():
    def added(right):
        return lambda uses: sum(right([use]) for use in uses)

    replace(factors, "squared_norm", added)


@mutant("slices of a stack taken for tokens", f"{EXAMPLES}[stack under scan]")
def _():
    def merged(right):
        return lambda loops, *a, **k: right((False,) * len(loops), *a, **k)

    replace(uses, "arranged", merged)


@mutant(
    "0 times the NaN of an example",
    "test_example_gradients.py::test_an_example_of_nan_or_of_padding_contributes_nothing",
)
def _():
    replace(gradients, "_where", lambda right: lambda is_counted, array: array)


# Models and checkpoints of others.


@mutant(
    "a kernel that is kept without being transposed",
    "deep/test_swap.py::test_initializers_see_the_kernel_and_so_the_right_fan",
)
def _():
    def reshaped(right):
        return lambda kernel, axes: kernel.reshape(kernel.shape[::-1])

    replace(parameters, "kernel_to_weight", reshaped)


@mutant(
    "a layer that is found by the end of its path only",
    "deep/test_convert.py::test_a_tree_is_converted_where_the_layer_is_and_nowhere_else",
)
def _():
    def anywhere(right):
        return lambda paths, layer_of: {
            path: layer
            for path in paths
            for names, layer in layer_of.items()
            if trees._names(path)[-len(names) :] == names
        }

    replace(trees, "_layers_at", anywhere)


@mutant(
    "square weights that nobody suspects",
    "test_torch.py::test_square_weights_among_transposed_ones_are_suspected_and_not_loaded",
)
def _():
    replace(_matching, "_perhaps_transposed", lambda right: lambda weights: {})
