"""Ways to break the package that no exception would show, and the test of each.

The other ways are in `deep/loud_mutants.py`. A mutant replaces a symbol of the package, wherever the package has bound it. A symbol
that is not there any more is an error: the mutant then needs another one. With
``MUTANT=module:name`` in the environment `conftest.py` breaks the package before a test.
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
    _cpu,
    _formulas,
    _linear,
    _linear_map,
    _product,
    _product_checks,
)
from jaxlinear._flax import layout

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Mutant:
    breaks: Callable[[], None]
    killer: str  # the node id of the test, relative to `tests`


MUTANTS = {}


def mutant(name, killer, mutants=MUTANTS):
    def add(breaks):
        mutants[name] = Mutant(breaks, killer)

    return add


def killed(name, mutant):
    """Run the test that must notice: whether it failed, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p"]
    command += ["no:cacheprovider", f"tests/{mutant.killer}"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"MUTANT": f"{mutant.breaks.__module__}:{name}"},
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
    replace(_linear, "_linear_forward", make)


GRADIENTS = "test_values.py::test_gradients_are_those_of_the_naive_formula"
FLOAT32 = "test_mixed_precision.py::test_parameter_gradients_keep_float32_accuracy_under_bfloat16_compute"
HINT = "test_products.py::test_alternative_float16_is_a_hint_whatever_else_is_asked"
FSDP = "test_collectives.py::test_collectives_are_those_of_the_naive_formula[AxisType.Auto-fsdp over the input features-mixed]"
FAN = "test_swap.py::test_initializers_see_the_kernel_and_so_the_right_fan"


def completed_otherwise(change):
    """Replace what a layer makes of the products that it is asked for."""
    replace(
        _product_checks,
        "with_defaults",
        lambda right: lambda *a: Products(*change(*right(*a))),
    )


def swap_of_gradients(field):
    """Give each gradient's product the field of the other's."""

    def swapped(forward, first, second):
        first_ = first._replace(**{field: getattr(second, field)})
        return forward, first_, second._replace(**{field: getattr(first, field)})

    completed_otherwise(swapped)


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


@mutant("bias gradient without its sum", GRADIENTS)
def _():
    def first_row(right):
        return lambda G, B_type: G.reshape(-1, G.shape[-1])[0].astype(B_type.dtype)

    replace(_formulas, "bias_gradient", first_row)


@mutant("bias gradient summed in its own dtype", FLOAT32)
def _():
    def rounded(right):
        return lambda G, B_type: right(G, B_type).astype(G.dtype).astype(B_type.dtype)

    replace(_formulas, "bias_gradient", rounded)


@mutant("products accumulated in the compute dtype", FLOAT32)
def _():
    replace(_product, "accumulator", lambda right: jnp.dtype)


@mutant(
    "output rounded before the bias is added",
    "test_products.py::test_every_product_is_rounded_once_from_operands_of_its_own_dtype[(64,)-float32 arguments]",
)
def _():
    def rounded(forward, *gradients):
        preferred = forward.preferred_element_type or forward.operand_dtype
        return forward._replace(preferred_element_type=preferred), *gradients

    completed_otherwise(rounded)


@mutant(
    "products that ignore the dtype in which they are to leave",
    "test_products.py::test_a_gradient_that_is_reduced_in_bfloat16_is_rounded_and_no_other",
)
def _():
    def ignored(right):
        def completed(products, *a):
            asked = products or Products()
            return right(
                Products(*(p._replace(preferred_element_type=None) for p in asked)), *a
            )

        return completed

    replace(_product_checks, "with_defaults", ignored)


@mutant(
    "gradients with the precisions of each other",
    "test_products.py::test_each_product_has_its_own_precision",
)
def _():
    swap_of_gradients("precision")


@mutant("no hint where the precision is an algorithm", HINT)
def _():
    def unhinted(right):
        def multiply(a, b, axes, product, *rest, **options):
            if _product.is_algorithm(product.precision):
                product = product._replace(dtype=product.operand_dtype)
            return right(a, b, axes, product, *rest, **options)

        return multiply

    replace(_formulas, "multiply", unhinted)


@mutant(
    "both operands always kept",
    "test_residuals.py::test_a_frozen_layer_in_a_scan_keeps_its_weight_once",
)
def _():
    with_perturbed(lambda of_x, of_weight: (True, True))


@mutant(
    "reverse mode that transposes the formula",
    "test_every_mode.py::test_every_reverse_mode_runs_the_documented_rule",
)
def _():
    def without_rule(right):
        return lambda kind, residuals, operands: kind.apply(
            kind.statics, residuals, operands
        )

    replace(_linear_map, "linear_map", without_rule)


@mutant("widened operands, which are gathered one by one", FSDP)
def _():
    replace(_cpu, "bfloat16_form", lambda right: lambda: _cpu.WIDENED)


@mutant("a kernel that is kept without being transposed", FAN)
def _():
    def reshaped(right):
        return lambda kernel, axes: kernel.reshape(kernel.shape[::-1])

    replace(layout, "kernel_to_weight", reshaped)
