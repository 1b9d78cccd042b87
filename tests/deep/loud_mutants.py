"""Ways to break the package that an exception or a shape may show, too."""

import contextlib
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import mutants
from mutants import (
    FAN,
    FSDP,
    GRADIENTS,
    HINT,
    replace,
    replace_forward_rule,
    replace_in_library,
    swap_of_gradients,
    with_perturbed,
)

from jaxlinear import (
    _by_platform,
    _checks,
    _cpu,
    _formulas,
    _levels,
    _linear,
    _open,
    _plain,
    _product_checks,
    _quantized,
    _sharding,
)
from jaxlinear._flax import checks, layout, parameters, trees
from jaxlinear.inspect import _accuracy, _hlo
from jaxlinear.nnx import _convert, _module, _optimizer
from jaxlinear.torch import _files, _matching, _names

MUTANTS = {}
mutant = functools.partial(mutants.mutant, mutants=MUTANTS)


# The formulas.


@mutant("bias gradient summed over the first axis alone", GRADIENTS)
def _():
    def summed(right):
        return lambda G, B_type: right(G[:, 0] if G.ndim > 2 else G, B_type)

    replace(_formulas, "bias_gradient", summed)


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


@mutant(
    "gradients with the operands of each other",
    "test_products.py::test_every_product_is_rounded_once_from_operands_of_its_own_dtype",
)
def _():
    swap_of_gradients("dtype")


@mutant(
    "the default precision of the backward pass",
    "test_products.py::test_default_precision_is_that_under_which_the_call_is_made",
)
def _():
    replace(_product_checks, "_default_precision", lambda right: lambda: None)


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
    def without_gpus(self, platform, is_alone, *operands):
        return self.plain(*operands)

    _formulas._ForwardProduct.on = without_gpus


# What is kept for the backward pass.


KEPT = "test_residuals.py::test_each_operand_is_kept_in_the_compute_dtype_if_the_other_is_differentiated"


@mutant("operands swapped in the residuals", KEPT)
def _():
    with_perturbed(lambda of_x, of_weight: (of_weight, of_x))


@mutant("the input kept as it came", KEPT)
def _():
    def unrounded(rule):
        def forward(x, weight, *rest):
            Y, (_, kept_W) = rule(x, weight, *rest)
            return Y, (x.value if weight.perturbed else None, kept_W)

        return forward

    replace_forward_rule(unrounded)


@mutant("operands cast again for the backward pass", FSDP)
def _():
    def cast_again(rule):
        def forward(x, weight, bias, products, *rest):
            Y, _ = rule(x, weight, bias, products, *rest)
            X = x.value.astype(products.weight_grad.operand_dtype)
            return Y, (X, weight.value.astype(products.input_grad.operand_dtype))

        return forward

    replace_forward_rule(cast_again)


# Every mode, and maps.


@mutant(
    "a layer that JAX cannot transpose",
    "test_table.py::test_the_layer_passes[gmres]",
)
def _():
    replace(_linear, "_linear_in_every_mode", lambda right: _linear._linear)


@mutant(
    "an axis of x that is not one more leading axis",
    "test_every_mode.py::test_a_map_over_x_costs_what_one_more_leading_axis_does",
)
def _():
    def without(right):
        return lambda *a: right(*a)._replace(leading=(False,) * 6)

    replace(_linear, "_map", without)


@mutant(
    "axes of maps contracted in another order",
    "test_every_mode.py::test_gradients_of_maps_inside_each_other",
)
def _():
    def first(right):
        return lambda product, to, place: right(product, to and 0, min(place, -2))

    replace(_levels, "_contracted", first)


SUMMED = "test_every_mode.py::test_a_mapped_bias_costs_the_other_gradients_no_accuracy"


@mutant("cotangents added up in their own dtype", SUMMED)
def _():
    replace(_levels, "accumulator", lambda right: jnp.dtype)


@mutant("sums of cotangents rounded to the operands' dtype", SUMMED)
def _():
    def rounded(right):
        return lambda statics, residuals, G: right(
            statics, residuals, G.astype(statics[1].dtype)
        )

    replace(_linear, "_transposed", rounded)


@mutant(
    "a tangent of two products that are rounded first",
    "test_every_mode.py::test_a_tangent_of_two_products_is_rounded_once",
)
def _():
    def rounded(right):
        def of_each(statics, residuals, tangents):
            one_by_one = [
                right(
                    statics,
                    residuals,
                    [t if k == j else None for k, t in enumerate(tangents)],
                )
                for j in range(3)
                if tangents[j] is not None
            ]
            return sum(one_by_one[1:], one_by_one[0])

        return of_each

    replace(_linear, "_differential", rounded)


# Forms on CPU.


TRANSPOSED = "test_cpu_forms.py::test_transposed_gradients_in_mixed_precision"


@mutant("bfloat16 operands of a product that JAX maps", TRANSPOSED)
def _():
    def bare(right):
        def multiplied(a, b, call):
            if call.is_alone:
                return right(a, b, call)
            library = _cpu.lax
            replace_in_library(
                _cpu, "lax", optimization_barrier=lambda right: lambda a: a
            )
            try:
                return right(a, b, call._replace(is_alone=True))
            finally:
                _cpu.lax = library

        return multiplied

    replace(_cpu, "_multiply_low", bare)


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


WIDE_WEIGHT = "test_cpu_forms.py::test_weight_gradient_of_many_more_outputs_than_inputs"


@mutant("the product of swapped operands not transposed back", WIDE_WEIGHT)
def _():
    def untransposed(right):
        def product(a, b, call):
            is_swapped = a.shape[-1] < b.shape[-1]
            shape, Y = (a.shape[-1], b.shape[-1]), right(a, b, call)
            return Y.T.reshape(shape) if is_swapped else Y

        return product

    replace(_cpu, "_transposed_dot", untransposed)


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
        def has_own_form(a, b, axes, *rest):
            is_long = _cpu._is_long_sum_of_one_row(a, b, axes)
            return is_long or right(a, b, axes, *rest)

        return has_own_form

    replace(_cpu, "has_own_form", unchecked)


@mutant(
    "products without a precision on CPU",
    "test_products.py::test_second_derivatives_have_the_precision_of_the_product_they_come_from",
)
def _():
    def without(right):
        return lambda *a, precision=None, **options: right(*a, **options)

    replace(_plain, "dot_general", without)


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
    replace(_checks, "check_shapes", lambda right: lambda *a: None)


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

    replace(_checks, "compute_dtype", promoted)


@mutant(
    "arrays of other libraries as they came",
    "test_arguments.py::test_whatever_jax_numpy_takes_for_an_array_is_one",
)
def _():
    replace(_checks, "checked_arrays", lambda right: lambda *arrays: arrays)


@mutant(
    "parameters of any dtype",
    "test_module_arguments.py::test_bad_arguments_are_refused_by_name",
)
def _():
    replace(
        checks,
        "_checked_param_dtype",
        lambda right: lambda dtype: _checks.checked_dtype("param_dtype", dtype),
    )


# Parameters.


@mutant("a kernel drawn with the shape of the weight", FAN)
def _():
    def drawn(right):
        def transposed(key, drawing):
            def init(key, shape, dtype):
                return drawing.kernel_init(key, shape[::-1], dtype).T

            return right(key, drawing._replace(kernel_init=init))

        return transposed

    replace(parameters, "_weight", drawn)


@mutant(
    "names of a kernel's axes for those of the weight",
    "test_swap.py::test_each_way_to_name_axes_names_those_of_the_kernel",
)
def _():
    replace(layout, "_swapped_names", lambda right: lambda spec, *order: spec)


INSIDE = "test_parameters.py::test_every_value_is_inside_the_bound_in_every_dtype"


UNIFORM = "test_parameters.py::test_weight_and_bias_are_uniform"


@mutant("initial values rounded beyond the bound", INSIDE)
def _():
    replace_in_library(parameters, "jnp", clip=lambda right: lambda values, *a: values)


@mutant("initial values with PyTorch's bound squared", UNIFORM)
def _():
    replace_in_library(parameters, "math", sqrt=lambda right: lambda k: k)


@mutant("initial values drawn in the parameter's dtype", UNIFORM)
def _():
    def drawn(right):
        return lambda key, shape, dtype, bound: jax.random.uniform(
            key, shape, dtype, -bound, bound
        )

    replace(parameters, "_draw", drawn)


# The switch, the name, and what reads programs.


@mutant(
    "jitted inside the switch",
    "test_plain_autodiff.py::test_inside_a_float32_layer_is_one_product_and_one_sum",
)
def _():
    replace(_linear, "_apply", lambda right: _linear._apply_jitted)


@mutant(
    "a switch that does nothing",
    "test_plain_autodiff.py::test_inside_a_float32_layer_is_one_product_and_one_sum",
)
def _():
    replace(_plain, "is_plain", lambda right: lambda: False)


@mutant(
    "a choice of platform in the program that an equation shows",
    "test_interpreters.py::test_roofline_counts_the_operations_of_a_layer",
)
def _():
    replace(_by_platform, "is_open", lambda right: lambda: False)


@mutant(
    "what checkify has made is differentiated without the rule",
    "test_interpreters.py::test_what_checkify_has_made_is_differentiated_by_the_rule",
)
def _():
    def of_the_program(self, values, checked, **params):
        return checked.call_wrapped(*values)

    _open.OpenPrimitive._bind_checked = of_the_program


@mutant(
    "the checks of a layer are differentiated",
    "test_interpreters.py::test_the_checks_of_a_layer_are_not_differentiated",
)
def _():
    replace_in_library(_open, "lax", stop_gradient=lambda right: lambda values: values)


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
    "deep/test_accuracy_check.py::test_not_a_number_is_not_explained",
)
def _():
    is_explained = property(lambda self: not self.error > self.explained)
    _accuracy.Measurement.is_explained = is_explained


# Eight bits.


EIGHT = "test_eight_bits.py::"
MAXIMA = f"{EIGHT}test_collectives_are_those_of_bfloat16_and_the_maxima"


@mutant(
    "a second derivative that is taken for zero",
    f"{EIGHT}test_second_derivatives_need_gradient_products_of_more_bits[int8]",
)
def _():
    def silent(right):
        return lambda quantized: quantized._replace(array=None)

    replace(_quantized, "_without_array", silent)


@mutant(
    "an operand that is quantized for each product",
    f"{MAXIMA}[float8-AxisType.Auto-data]",
)
def _():
    def again(right):
        return lambda array, made, *rest: right(array, None, *rest)

    replace(_quantized, "kept_operand", again)


@mutant(
    "a cotangent that is quantized for each product",
    f"{MAXIMA}[float8-AxisType.Auto-data]",
)
def _():
    replace(_quantized, "as_shared_operand", lambda right: lambda G, *products: G)


@mutant(
    "8 bits that are cast before they are gathered",
    f"{MAXIMA}[float8-AxisType.Auto-fsdp over the output features]",
)
def _():
    replace(_quantized, "has_one_device", lambda right: lambda: True)


@mutant(
    "one scale for every element of a map",
    f"{EIGHT}test_each_element_of_a_map_is_quantized_by_itself[float8]",
)
def _():
    def merged(right):
        def of_rows(apply, statics, derivative=None):
            products, *rest = statics
            per_row = (p._replace(scaling="per_row") for p in products)
            leading = right(apply, (type(products)(*per_row), *rest)).leading
            return right(apply, statics, derivative)._replace(leading=leading)

        return of_rows

    replace(_linear, "_map", merged)


@mutant(
    "a scale that is lost where what jax.vmap maps is contracted",
    f"{EIGHT}test_gradients_of_a_map_are_as_accurate_as_those_without[float8-weight-0]",
)
def _():
    def lost(right):
        return lambda b, a, axes: (a.array, right(b, a, axes)[1])

    replace(_quantized, "_with_scale_of", lost)


@mutant(
    "a scale without the infinities of int8",
    f"{EIGHT}test_infinities_and_nan_end_up_where_they_would_unquantized[int8-inf]",
)
def _():
    def finite(right):
        return lambda a, *rest: right(jnp.nan_to_num(a), *rest)

    replace(_quantized, "_quantized", finite)


# Models and checkpoints of others.

CONVERTED = "test_convert.py::test_a_converted_model_trains_as_the_model_of_flax"
STACKED = "test_convert.py::test_stacked_layers_are_converted_as_a_stack"
LOADED = "test_torch.py::test_what_does_not_fit_is_listed_and_nothing_is_changed"


@mutant("a kernel whose input and output axes are read the other way round", CONVERTED)
def _():
    replace(
        layout, "kernel_to_weight", lambda right: lambda k, axes: right(k, axes[::-1])
    )


@mutant("a stack that is moved with the axes of its layers", STACKED)
def _():
    replace(layout, "_order", lambda right: lambda ndim, *n: tuple(range(ndim))[::-1])


@mutant(
    "a layer that is found by the end of its path alone",
    "test_convert.py::test_a_tree_is_converted_where_the_layer_is_and_nowhere_else",
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
    "a stack of layers that answers",
    "test_several_axes.py::test_a_stack_is_called_under_vmap_and_scan_and_refused_without",
)
def _():
    replace(_module, "_check_unstacked", lambda right: lambda *_: None)


OPTIMIZER = "test_convert.py::test_an_optimizer_that_does_not_fit_is_refused_and_nothing_is_changed"


@mutant("an optimizer of another model that is converted", OPTIMIZER)
def _():
    replace(_optimizer, "_check_state_belongs", lambda right: lambda *_: None)


@mutant("a filter of names that finds nothing afterwards", OPTIMIZER)
def _():
    replace(_optimizer, "_check_state_goes_on", lambda right: lambda *_: None)


@mutant(
    "a layer inside of WeightNorm that is converted",
    "test_convert.py::test_what_has_its_own_way_to_a_product_is_left_alone_and_reported",
)
def _():
    replace(_convert, "_WRAPPERS", lambda right: ())


@mutant("a tensor of another dtype that is taken", LOADED)
def _():
    def cast(right):
        return lambda source: {
            name: tensor._replace(dtype=jnp.dtype("float32"))
            for name, tensor in right(source).items()
        }

    replace(_files, "tensors_of", cast)


@mutant(
    "square weights that nobody suspects",
    "test_torch.py::test_square_weights_among_transposed_ones_are_suspected_and_not_loaded",
)
def _():
    replace(_matching, "_perhaps_transposed", lambda right: lambda weights: {})


@mutant(
    "a kernel of Flax's that is given PyTorch's name alone",
    "test_torch.py::test_layers_of_flax_have_the_names_and_the_layout_of_pytorch",
)
def _():
    def in_order(right):
        return lambda shape, counts, order, endings: _names.Form(shape, endings)

    replace(_names, "_form", in_order)


@mutant(
    "a file that is written in its place",
    "test_torch.py::test_a_save_that_fails_leaves_the_old_file_and_nothing_else",
)
def _():
    replace(_files, "_replace", lambda right: lambda path, write: write(path))


@mutant(
    "a maximum that drops NaN",
    f"{EIGHT}test_no_value_is_lost_in_the_maximum_of_many[nan-float32-True]",
)
def _():
    _quantized._Largest.on = lambda self, platform, is_alone, array: self.plain(array)


@mutant(
    "a size that is not known yet taken for a small one",
    f"{EIGHT}test_sums_of_a_size_that_is_not_known_yet_do_not_overflow[150000]",
)
def _():
    replace(_quantized, "_may_overflow", lambda right: lambda *a: False)


@mutant(
    "a maximum of a constant",
    f"{EIGHT}test_the_maximum_of_a_constant_weight_is_left_to_the_program[float8]",
)
def _():
    barrier = {"optimization_barrier": lambda right: lambda a: a}
    replace_in_library(_quantized, "lax", **barrier)
