"""Ways to break the package, each with the test that must fail.

A mutant replaces a symbol of the package, wherever the package has bound it. A symbol
that is not there any more is an error: the mutant then needs another one. With
``MUTANT=name`` in the environment `conftest.py` breaks the package before any test.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jaxlinear
from jaxlinear import (
    Products,
    _arguments,
    _cpu,
    _formulas,
    _linear,
    _parameters,
    _plain,
    _product,
    _sharding,
    linen,
    nnx,
)
from jaxlinear.inspect import _accuracy, _hlo

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Mutant:
    breaks: Callable[[], None]
    killer: str  # the node id of the test, relative to `tests`
    is_silent: bool  # whether no exception or shape would show it, but for the test


MUTANTS = {}


def mutant(name, killer, *, silent=False):
    def add(breaks):
        MUTANTS[name] = Mutant(breaks, killer, silent)
        return breaks

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


def replace_in_library(module, library, **functions):
    """Put functions in the place of those of a library, for one module of ours."""
    right = getattr(module, library)
    wrong = types.SimpleNamespace(**{n: getattr(right, n) for n in dir(right)})
    vars(wrong).update(
        {name: make(getattr(right, name)) for name, make in functions.items()}
    )
    setattr(module, library, wrong)


def replace_forward_rule(make):
    """Differentiate by ``make(rule)`` for the forward pass."""
    rule, backward = _linear._linear_forward, _linear._linear_backward
    _linear._linear.defvjp(make(rule), backward, symbolic_zeros=True)


# The formulas.

GRADIENTS = "test_values.py::test_gradients_are_those_of_the_naive_formula"
FLOAT32 = "test_mixed_precision.py::test_parameter_gradients_keep_float32_accuracy_under_bfloat16_compute"


@mutant("bias gradient without its sum", GRADIENTS, silent=True)
def _():
    def first_row(right):
        return lambda G, B_type: G.reshape(-1, G.shape[-1])[0].astype(B_type.dtype)

    replace(_formulas, "bias_gradient", first_row)


@mutant("bias gradient summed over the first axis alone", GRADIENTS)
def _():
    def summed(right):
        return lambda G, B_type: right(G[:, 0] if G.ndim > 2 else G, B_type)

    replace(_formulas, "bias_gradient", summed)


@mutant("bias gradient summed in its own dtype", FLOAT32, silent=True)
def _():
    def rounded(right):
        return lambda G, B_type: right(G, B_type).astype(G.dtype).astype(B_type.dtype)

    replace(_formulas, "bias_gradient", rounded)


@mutant("weight gradient transposed", GRADIENTS)
def _():
    def transposed(right):
        return lambda *a: right(*a).T.reshape(a[0].shape[-1], a[1].shape[-1])

    replace(_formulas, "weight_gradient", transposed)


@mutant("input gradient of the transposed weight", GRADIENTS)
def _():
    def transposed(right):
        return lambda G, W, *a: right(G, W.T.reshape(W.shape), *a)

    replace(_formulas, "input_gradient", transposed)


@mutant("conjugated weight gradient", GRADIENTS)
def _():
    replace(
        _formulas,
        "weight_gradient",
        lambda right: lambda G, X, *a: right(G, X.conj(), *a),
    )


@mutant("products accumulated in the compute dtype", FLOAT32, silent=True)
def _():
    replace(_product, "accumulator", lambda right: jnp.dtype)


@mutant(
    "weight gradient left in the accumulator's dtype",
    "test_transformations.py::test_gradient_through_a_scan_that_carries_a_bfloat16_weight",
)
def _():
    replace(_formulas, "round_to", lambda right: lambda dtype, cotangent: cotangent)


@mutant(
    "complex gradient of a real argument",
    "test_values.py::test_each_gradient_has_the_dtype_of_its_argument_and_is_rounded_to_it_once",
)
def _():
    def unprojected(right):
        return lambda dtype, a: a if jnp.iscomplexobj(a) else right(dtype, a)

    replace(_formulas, "round_to", unprojected)


# What was asked of a product.


def completed_otherwise(change):
    """Replace what a layer makes of the products that it is asked for."""
    replace(
        _arguments, "completed", lambda right: lambda *a: Products(*change(*right(*a)))
    )


@mutant(
    "output rounded before the bias is added",
    "test_values.py::test_float16_output_survives_a_product_that_alone_would_overflow",
    silent=True,
)
def _():
    def rounded(forward, *gradients):
        preferred = forward.preferred_element_type or forward.operand_dtype
        return forward._replace(preferred_element_type=preferred), *gradients

    completed_otherwise(rounded)


@mutant(
    "products that ignore the dtype in which they are to leave",
    "test_products.py::test_a_gradient_that_is_reduced_in_bfloat16_is_rounded_and_no_other",
    silent=True,
)
def _():
    def ignored(right):
        def completed(products, *a):
            asked = products or Products()
            return right(
                Products(*(p._replace(preferred_element_type=None) for p in asked)), *a
            )

        return completed

    replace(_arguments, "completed", ignored)


@mutant(
    "gradients with the precisions of each other",
    "test_products.py::test_each_product_has_its_own_precision",
    silent=True,
)
def _():
    def swapped(forward, first, second):
        first_ = first._replace(precision=second.precision)
        return forward, first_, second._replace(precision=first.precision)

    completed_otherwise(swapped)


@mutant(
    "gradients with the operands of each other",
    "test_products.py::test_every_product_is_rounded_once_from_operands_of_its_own_dtype",
)
def _():
    def swapped(forward, first, second):
        first_ = first._replace(dtype=second.dtype)
        return forward, first_, second._replace(dtype=first.dtype)

    completed_otherwise(swapped)


@mutant(
    "the default precision of the backward pass",
    "test_products.py::test_default_precision_is_that_under_which_the_call_is_made",
)
def _():
    replace(_arguments, "_default_precision", lambda right: lambda: None)


@mutant(
    "backward products of the operands of the forward product",
    "test_products.py::test_gradients_that_float16_flushes_to_zero_survive_in_bfloat16",
)
def _():
    def of_rounded(rule):
        def forward(x, weight, bias, products, *types_):
            def rounded(primal):
                value = primal.value.astype(products.forward.operand_dtype)
                return types.SimpleNamespace(value=value, perturbed=primal.perturbed)

            return rule(rounded(x), rounded(weight), bias, products, *types_)

        return forward

    replace_forward_rule(of_rounded)


HINT = "test_products.py::test_alternative_float16_is_a_hint_whatever_else_is_asked"


@mutant("no hint where the precision is an algorithm", HINT, silent=True)
def _():
    def unhinted(right):
        def multiply(a, b, axes, product, *rest, **options):
            if _product.is_algorithm(product.precision):
                product = product._replace(dtype=product.operand_dtype)
            return right(a, b, axes, product, *rest, **options)

        return multiply

    replace(_formulas, "multiply", unhinted)


@mutant("the hint of the other gradient", HINT)
def _():
    names = {"grad_x": "grad_y", "grad_y": "grad_x", "": ""}

    def swapped(right):
        return lambda *a, hint="": right(*a, hint=names[hint])

    replace(_formulas, "multiply", swapped)


@mutant(
    "a bias added in float32 on GPUs",
    "test_products.py::test_accelerators_multiply_in_bfloat16_and_round_where_it_is_free",
)
def _():
    def without_gpus(right):
        return lambda *a, cuda=None, rocm=None, **platforms: right(*a, **platforms)

    replace_in_library(_formulas, "lax", platform_dependent=without_gpus)


# What is kept for the backward pass.

KEPT = "test_residuals.py::test_each_operand_is_kept_in_the_compute_dtype_if_the_other_is_differentiated"


def with_perturbed(change):
    """The forward rule, told another story of what is differentiated."""

    def told(rule):
        def forward(x, weight, *rest):
            def primal(value, perturbed):
                return types.SimpleNamespace(value=value, perturbed=perturbed)

            of_x, of_weight = change(x.perturbed, weight.perturbed)
            x, weight = primal(x.value, of_x), primal(weight.value, of_weight)
            return rule(x, weight, *rest)

        return forward

    replace_forward_rule(told)


@mutant("operands swapped in the residuals", KEPT)
def _():
    with_perturbed(lambda of_x, of_weight: (of_weight, of_x))


@mutant(
    "both operands always kept",
    "test_residuals.py::test_a_frozen_layer_in_a_scan_keeps_its_weight_once",
    silent=True,
)
def _():
    with_perturbed(lambda of_x, of_weight: (True, True))


@mutant("the input kept as it came", KEPT)
def _():
    def unrounded(rule):
        def forward(x, weight, *rest):
            Y, (_, kept_W) = rule(x, weight, *rest)
            return Y, (x.value if weight.perturbed else _linear._not_kept(), kept_W)

        return forward

    replace_forward_rule(unrounded)


FSDP = "test_collectives.py::test_collectives_are_those_of_the_naive_formula[AxisType.Auto-fsdp over the input features-mixed]"


@mutant("operands cast again for the backward pass", FSDP)
def _():
    def cast_again(rule):
        def forward(x, weight, bias, products, *rest):
            Y, _ = rule(x, weight, bias, products, *rest)
            X = x.value.astype(products.weight_grad.operand_dtype)
            return Y, (X, weight.value.astype(products.input_grad.operand_dtype))

        return forward

    replace_forward_rule(cast_again)


@mutant("residuals of different structures", "test_caching.py")
def _():
    replace(_linear, "_not_kept", lambda right: lambda: None)
    replace(_linear, "_is_kept", lambda right: lambda residual: residual is not None)


# Forms on CPU.

TRANSPOSED = "test_cpu_forms.py::test_transposed_gradients_in_mixed_precision"


@mutant("bfloat16 operands of a product that JAX maps", TRANSPOSED)
def _():
    def without_barriers(form):
        def general(a, b):
            library = _cpu.lax
            replace_in_library(
                _cpu, "lax", optimization_barrier=lambda right: lambda a: a
            )
            try:
                return form(a, b)
            finally:
                _cpu.lax = library

        return general

    def bare(right):
        return lambda form, general: right(form, without_barriers(form))

    replace(_cpu, "_where_alone", bare)


def without_barriers_of(dtype):
    def barrier(right):
        return lambda a: a if a.dtype == dtype else right(a)

    replace_in_library(_cpu, "lax", optimization_barrier=barrier)


@mutant("no barrier behind a float32 product", TRANSPOSED)
def _():
    without_barriers_of("float32")


@mutant(
    "no barrier before a float32 product",
    "test_cpu_forms.py::test_a_transposed_operand_that_is_cast_in_another_function",
)
def _():
    without_barriers_of("bfloat16")


@mutant(
    "a barrier before an operand that is gathered",
    "test_collectives.py::test_collectives_are_those_of_the_naive_formula[AxisType.Explicit-sequence-mixed]",
)
def _():
    replace(_cpu, "_has_gathered_rows", lambda right: lambda *a: False)


@mutant("widened operands, which are gathered one by one", FSDP, silent=True)
def _():
    replace(_cpu, "bfloat16_form", lambda right: lambda: _cpu.WIDENED)


WIDE_WEIGHT = "test_cpu_forms.py::test_weight_gradient_of_many_more_outputs_than_inputs"


@mutant("the product of swapped operands not transposed back", WIDE_WEIGHT)
def _():
    def untransposed(right):
        def form(a, b, dtype, axes, *rest):
            found, shape = right(a, b, dtype, axes, *rest), (a.shape[-1], b.shape[-1])
            is_weight_gradient = a.ndim - 1 not in axes[0]
            if is_weight_gradient and shape[0] < shape[1]:  # Of swapped operands.
                return lambda a, b: found(a, b).T.reshape(shape)
            return found

        return form

    replace(_cpu, "_low_form", untransposed)


@mutant("rows of one operand flattened in another order", WIDE_WEIGHT)
def _():
    calls = itertools.count()
    replace(
        _cpu, "_rows", lambda right: lambda a: right(a[::-1] if next(calls) % 2 else a)
    )


@mutant(
    "one long sum at one row",
    "test_accuracy.py::test_input_gradient_of_one_row_is_not_one_long_sum",
)
def _():
    replace(_cpu, "_is_long_sum_of_one_row", lambda right: lambda *a: False)


@mutant(
    "a form that does not look for empty axes",
    "test_cpu_forms.py::test_no_form_fails_where_an_axis_is_empty",
)
def _():
    def unchecked(right):
        def cpu_form(a, b, axes, product, sharding):
            if _cpu._is_long_sum_of_one_row(a, b, axes):
                return lambda a, b: _cpu._sum_in_blocks(a, b, product.precision)
            return right(a, b, axes, product, sharding)

        return cpu_form

    replace(_cpu, "cpu_form", unchecked)


@mutant(
    "products without a precision on CPU",
    "test_products.py::test_second_derivatives_have_the_precision_of_the_product_they_come_from",
)
def _():
    def without(right):
        return lambda *a, precision=None, **options: right(*a, **options)

    replace_in_library(_cpu, "lax", dot_general=without)


@mutant("an algorithm of low precision as JAX lowers it", TRANSPOSED)
def _():
    replace(_cpu, "_ALGORITHMS", lambda right: {})


# Several devices.


@mutant(
    "operands that vary over different manual axes",
    "test_table.py::test_the_layer_passes[shard_map_data_parallel]",
)
def _():
    replace(_sharding, "vary_together", lambda right: lambda *operands: operands)


@mutant(
    "cotangents without a sharding",
    "test_table.py::test_the_layer_passes[explicit_sharding_data_parallel]",
)
def _():
    def unsharded(right):
        return lambda a: None if a is None else right(a)._replace(sharding=None)

    replace(_sharding, "cotangent_type", unsharded)


@mutant(
    "arrays made before the mesh forgotten",
    "test_sharding.py::test_explicit_mesh_accepts_parameters_made_before_the_mesh_was_set",
)
def _():
    def forgotten(right):
        def cotangent_type(primal):
            is_old = primal is not None and jax.typeof(primal).sharding.mesh.empty
            found = right(primal)
            return found._replace(sharding=None) if is_old else found

        return cotangent_type

    replace(_sharding, "cotangent_type", forgotten)


# Arguments.


@mutant("shapes that are not checked", "test_arguments.py")
def _():
    replace(_arguments, "check_shapes", lambda right: lambda *a: None)


@mutant(
    "integers promoted to floats",
    "test_arguments.py::test_where_all_arguments_are_integers_so_is_the_result",
)
def _():
    def promoted(right):
        def compute_dtype(*a):
            found = right(*a)
            return found if jnp.issubdtype(found, jnp.inexact) else jnp.dtype("float32")

        return compute_dtype

    replace(_arguments, "compute_dtype", promoted)


@mutant(
    "arrays of other libraries as they came",
    "test_arguments.py::test_whatever_jax_numpy_takes_for_an_array_is_one",
)
def _():
    replace(_arguments, "checked_arrays", lambda right: lambda *arrays: arrays)


@mutant(
    "parameters of any dtype",
    "test_module_arguments.py::test_bad_arguments_are_refused_by_name",
)
def _():
    replace(
        _arguments,
        "checked_param_dtype",
        lambda right: lambda dtype: _arguments.checked_dtype("param_dtype", dtype),
    )


# Parameters.

FAN = "test_swap.py::test_initializers_see_the_kernel_and_so_the_right_fan"


@mutant("a kernel that is kept without being transposed", FAN, silent=True)
def _():
    replace(nnx, "_weight", lambda right: lambda kernel, s: kernel.reshape(s[::-1]))


@mutant("a kernel drawn with the shape of the weight", FAN)
def _():
    def drawn(right):
        return lambda init, finish, key, shape, *rest: right(
            lambda key, shape, dtype: init(key, shape[::-1], dtype).T,
            finish,
            key,
            shape,
            *rest,
        )

    replace(_parameters, "created", drawn)


@mutant(
    "names of a kernel's axes for those of the weight",
    "test_swap.py::test_each_way_to_name_axes_names_those_of_the_kernel",
)
def _():
    replace(_parameters, "swapped_names", lambda right: lambda spec: spec)


INSIDE = "test_parameters.py::test_every_value_is_inside_the_bound_in_every_dtype"
UNIFORM = "test_parameters.py::test_weight_and_bias_are_uniform"


@mutant("initial values rounded beyond the bound", INSIDE)
def _():
    replace_in_library(_parameters, "jnp", clip=lambda right: lambda values, *a: values)


@mutant("initial values with PyTorch's bound squared", UNIFORM)
def _():
    replace_in_library(_parameters, "math", sqrt=lambda right: lambda k: k)


@mutant("initial values drawn in the parameter's dtype", UNIFORM)
def _():
    def drawn(right):
        return lambda key, shape, dtype, bound: jax.random.uniform(
            key, shape, dtype, -bound, bound
        )

    replace(_parameters, "_draw", drawn)


# The switch, the name, and what reads programs.


@mutant(
    "jitted inside the switch",
    "test_plain_autodiff.py::test_inside_a_float32_layer_is_one_product_and_one_sum",
)
def _():
    replace(_linear, "_apply", lambda right: _linear._apply_jitted)


@mutant("a switch that does nothing", "test_table.py::test_the_layer_passes[jvp]")
def _():
    replace(_plain, "in_plain_autodiff", lambda right: lambda: False)


@mutant(
    "a switch that stays on",
    "test_plain_autodiff.py::test_it_is_off_again_after_the_block_nested_blocks_and_exceptions",
)
def _():
    @contextlib.contextmanager
    def on():
        _plain._in_plain_autodiff(True).__enter__()
        yield

    replace(_plain, "plain_autodiff", lambda right: on)


@mutant(
    "output without its name",
    "test_remat.py::test_our_policy_saves_the_outputs_and_no_forward_product_runs_again",
)
def _():
    replace(_linear, "checkpoint_name", lambda right: lambda Y, name: Y)


@mutant(
    "a collective counted as often as XLA repeats it",
    "test_explain.py::test_programs_for_tpus_are_read",
)
def _():
    replace(_hlo, "collectives", lambda right: lambda p: [i for i in p if i.collective])


@mutant(
    "a check of accuracy that never fails",
    "test_accuracy_check.py::test_not_a_number_is_not_explained",
)
def _():
    is_explained = property(lambda self: not self.error > self.explained)
    _accuracy.Measurement.is_explained = is_explained


assert jaxlinear.linen is linen  # Loaded, so that its symbols are replaced, too.
