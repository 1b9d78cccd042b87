"""From what a user passed to what the op needs. Every refusal of this package is here.

Each names the argument, what is required and what came. What JAX refuses clearly by
itself, such as an algorithm that a device does not have, is left to JAX.
"""

import difflib
import functools
import inspect
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding

from jaxlinear._product import (
    EIGHT_BIT_PAIRS,
    Product,
    Products,
    Scaling,
    accumulator_dtype,
    is_algorithm,
)

# Arrays.


@runtime_checkable
class SupportsArray(Protocol):
    """What is an array for JAX: a variable of NNX."""

    def __jax_array__(self) -> jax.Array: ...


ArrayLike = jax.typing.ArrayLike | SupportsArray


def checked_arrays(x, weight, bias):
    """The arguments as JAX arrays: whatever ``jnp.asarray`` takes, but containers."""
    # Outside of `jax.jit`, which takes fewer kinds. A call of `linear` waits for this.
    if not isinstance(x, jax.Array):
        x = checked_array("x", x)
    if not isinstance(weight, jax.Array):
        weight = checked_array("weight", weight)
    if bias is not None and not isinstance(bias, jax.Array):
        bias = checked_array("bias", bias)
    return x, weight, bias


def checked_array(name, value):
    if value is None or isinstance(value, (str, list, tuple, dict, set)):
        raise TypeError(f"`{name}` must be an array, got {type(value).__name__}")
    try:
        return jnp.asarray(value)
    except Exception as error:
        got = f"{type(value).__name__}{_advice_for(value)}"
        raise TypeError(f"`{name}` must be an array, got {got}") from error


def _advice_for(value):
    """What to do with an array that JAX does not take for one."""
    from jax.experimental.sparse import JAXSparse

    if isinstance(value, JAXSparse):
        return ", which is sparse: pass its `todense()`"
    flax = sys.modules.get("flax.core.meta")
    if flax and isinstance(value, flax.AxisMetadata):
        return ", which is a box: pass what `flax.linen.unbox` takes out of it"
    return ""


def check_shapes(x, weight, bias):
    for name, array in {"x": x, "weight": weight, "bias": bias}.items():
        if array is not None and jnp.issubdtype(array.dtype, jax.dtypes.extended):
            raise TypeError(f"`{name}` must hold numbers, got dtype {array.dtype}")
    check_input(x)
    if weight.ndim != 2:
        raise ValueError(
            f"`weight` must be a matrix (out, in), got shape {weight.shape}"
        )
    if x.shape[-1] != weight.shape[1]:
        bias_fits = bias is None or bias.shape == weight.shape[1:]
        if x.shape[-1] == weight.shape[0] and bias_fits:
            raise ValueError(
                f"`weight` must be (out, in), with the {x.shape[-1]} elements of `x`"
                f" along its last axis, got shape {weight.shape}. Did you mean"
                " `weight.T`?"
            )
        raise ValueError(
            f"`x` must have {weight.shape[1]} elements along its last axis, as `weight`"
            f" of shape {weight.shape} does, got shape {x.shape}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"`bias` must have shape {weight.shape[:1]}, one element for each row of"
            f" `weight`, got shape {bias.shape}"
        )


def check_input(x):
    if x.ndim == 0:
        raise ValueError("`x` must have at least one axis, (*, in), got a scalar")


# Dtypes.


def checked_dtype(name, dtype, bits=16, also=""):
    """``dtype`` as a floating or complex NumPy dtype of at least ``bits``.

    The caller has looked for the one that is ``also`` taken.
    """
    # NumPy takes None for float64, and an array for its dtype.
    if not isinstance(dtype, (str, np.dtype, type)):
        known = str(dtype).rpartition(".")[2]  # As of torch.bfloat16.
        advice = f". Did you mean {known!r}?" if known in _DTYPES else ""
        raise TypeError(
            f"`{name}` must be a floating or complex dtype{also}, got {dtype!r}{advice}"
        )
    return _checked_dtype(name, dtype, bits, also)


@functools.cache  # It takes a tenth of the time of a call of `linear`.
def _checked_dtype(name, dtype, bits, also):
    required = f"`{name}` must be a floating or complex dtype{also}"
    try:
        checked = jnp.dtype(dtype)
    except TypeError:
        got = f"{dtype!r}{_similar_dtype(dtype, bits)}"
        raise TypeError(f"{required}, got {got}") from None
    if not jnp.issubdtype(checked, jnp.inexact):
        is_meant = bits > 8 and checked == "int8"
        advice = _similar_dtype(checked, bits) if is_meant else ""
        raise TypeError(f"{required}, got {checked}{advice}")
    found = jnp.finfo(checked).bits
    if found > 64:  # NumPy's "f16" has 16 bytes.
        got = f"{dtype!r}{_similar_dtype(dtype, bits)}"
        raise TypeError(f"{required} of JAX's, got {got}")
    if found < bits:  # Unscaled, large values would become NaN.
        got = f"{checked}{_similar_dtype(checked, bits)}"
        raise TypeError(f"{required} of at least {bits} bits, got {got}")
    return checked


_DTYPES = ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
_EIGHT_BITS = {"float8_e4m3fn": "FLOAT8", "float8_e5m2": "FLOAT8", "int8": "INT8"}
_SHORT_DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "f8": "float8_e4m3fn"}
_SHORT_DTYPES |= {f"{f}{n}": f"float{n}" for f in ("f", "fp") for n in (16, 32, 64)}


def _meant_dtype(dtype):
    """The name of the dtype that a user may have meant, or None."""
    name = str(dtype).lower()
    known = [*_DTYPES, *_EIGHT_BITS]
    close = difflib.get_close_matches(_SHORT_DTYPES.get(name, name), known)
    return close[0] if close else None


def _similar_dtype(dtype, bits):
    """The question whether another dtype is meant, or a recipe of 8 bits."""
    meant = _meant_dtype(dtype)
    if meant is None:
        return ""
    if meant in _EIGHT_BITS and bits > 8:  # The dtype of a layer.
        return f". Did you mean `products=jaxlinear.{_EIGHT_BITS[meant]}`?"
    return f". Did you mean {meant!r}?"


def checked_optional_dtype(name, dtype):
    return None if dtype is None else checked_dtype(name, dtype)


def checked_param_dtype(param_dtype):
    """A dtype in which parameters can be drawn: with a sign and, at least, 8 bits."""
    checked = checked_dtype("param_dtype", param_dtype, bits=0)
    limits = jnp.finfo(checked)
    if limits.bits < 8 or not limits.min < 0:
        raise TypeError(
            "`param_dtype` must have a sign and at least 8 bits, else most parameters"
            f" would be drawn as zeros, got {checked}"
        )
    return checked


def compute_dtype(dtype, *arrays):
    """``dtype``, or by default that to which JAX promotes the arrays."""
    arrays = [array for array in arrays if array is not None]
    if dtype is None:
        return jnp.result_type(*arrays)
    if jnp.issubdtype(dtype, jnp.floating) and any(map(jnp.iscomplexobj, arrays)):
        raise TypeError(f"`dtype` must be complex for complex arguments, got {dtype}")
    return dtype


# Products.


def checked_products(products, precision, dtype=None):
    """``products``, whose precision is by default ``precision``, without names.

    What depends on the layer's ``dtype`` is checked where that is known already.
    """
    products = Products() if products is None else products
    if not isinstance(products, Products):
        got = _got_for_products(products)
        raise TypeError(f"`products` must be a jaxlinear.Products, got {got}")
    precision = checked_precision("precision", precision)

    def checked(field, product):
        return _checked_product(f"products.{field}", product, precision, dtype)

    return Products(*map(checked, Products._fields, products))


def _checked_product(name, product, precision, dtype):
    if not isinstance(product, Product):
        got = _got_for_product(name.removeprefix("products."), product)
        raise TypeError(f"`{name}` must be a jaxlinear.Product, got {got}")
    if product.precision is not None:
        precision = checked_precision(f"{name}.precision", product.precision)
    own = _checked_operands(name, product)
    preferred = product.preferred_element_type
    if preferred is not None:
        also = "int32" if own == (jnp.dtype("int8"),) * 2 else ""
        preferred = _checked_element(f"{name}.preferred_element_type", preferred, also)
    product = Product(own, precision, preferred, _checked_scaling(name, product, own))
    if dtype is not None or own is not None:
        _check_kinds(name, product, dtype)
    return product


_RECIPES = "FLOAT8", "FLOAT8_E4M3", "INT8", "ALTERNATIVE_FLOAT16"


def _got_for_products(value):
    """What came in the place of a `Products`, and what may be meant by it."""
    kind = type(value).__name__
    if isinstance(value, Product):
        return f"{kind}: say for which, as in `Products(weight_grad=...)`"
    if isinstance(value, Mapping):
        return f"{kind}. Did you mean `Products(**...)`?"
    if isinstance(value, tuple | list):
        return f"{kind}. Did you mean `Products(*...)`?"
    name = value if isinstance(value, str) else _name_of_dtype(value)
    meant = _meant_dtype(name)
    if name.upper() in _RECIPES:
        return f"{name!r}. Did you mean `jaxlinear.{name.upper()}`?"
    if name in _PRECISIONS and name not in _DTYPES:
        return f"{name!r}. Did you mean `precision={name!r}`?"
    if meant in _EIGHT_BITS:
        return f"{name!r}. Did you mean `jaxlinear.{_EIGHT_BITS[meant]}`?"
    if meant:
        return f"{name!r}. Did you mean `dtype={meant!r}`?"
    return repr(value) if isinstance(value, str) else kind


def _name_of_dtype(value):
    name = getattr(value, "__name__", str(value))
    return name if name in (*_DTYPES, *_EIGHT_BITS) else ""


def _got_for_product(field, value):
    """What came in the place of a `Product`, and what may be meant by it."""
    if isinstance(value, Products):
        return f"Products. Did you mean its `{field}`?"
    name = value if isinstance(value, str) else _name_of_dtype(value)
    if meant := _meant_dtype(name):
        return f"{name!r}. Did you mean `Product({meant!r})`?"
    return type(value).__name__


def _checked_operands(name, product):
    """The dtype of both operands, or a pair of 8 bits, or a name, or None."""
    if product.dtype is None:
        return None
    if product.is_alternative_float16:
        if name == "products.forward":
            raise ValueError(
                "`products.forward.dtype` must be a dtype, got alternative_float16,"
                " which ROCm has for gradients alone"
            )
        return product.dtype
    name = f"{name}.dtype"
    pair = product.dtype
    if not isinstance(pair, tuple | list):
        pair = pair, pair
    if len(pair) != 2:
        raise ValueError(f"`{name}` must be one dtype or two, got {product.dtype!r}")
    first, second = (_checked_element(name, dtype, also="int8") for dtype in pair)
    if (first, second) in EIGHT_BIT_PAIRS:
        return first, second
    if min(first.itemsize, second.itemsize) == 1:
        known = "({}, {})".format(*EIGHT_BIT_PAIRS[0])
        raise ValueError(
            f"`{name}` of 8 bits must be a pair that some platform multiplies, such as"
            f" {known}, got {first} and {second}"
        )
    if first != second:
        raise ValueError(f"`{name}` must be two equal dtypes, got {first} and {second}")
    return first


def _checked_element(name, dtype, also):
    """``dtype`` as a floating or complex dtype, or that which is ``also`` one."""
    is_dtype = isinstance(dtype, (str, np.dtype, type))
    if is_dtype and also in (dtype, getattr(dtype, "__name__", None)):
        return jnp.dtype(also)
    return checked_dtype(name, dtype, bits=0, also=also and f" or {also}")


def _checked_scaling(name, product, own):
    """That of a product of 8 bits, and None for any other."""
    scaling, name = product.scaling, f"{name}.scaling"
    if isinstance(own, tuple):
        scaling = "per_tensor" if scaling is None else scaling
        if scaling not in get_args(Scaling):
            known = " or ".join(map(repr, get_args(Scaling)))
            raise ValueError(f"`{name}` must be {known}, got {scaling!r}")
    elif scaling is not None:
        raise ValueError(f"`{name}` must be None without 8 bits, got {scaling!r}")
    return scaling


def _check_kinds(name, product, dtype):
    """Refuse dtypes that do not go together; ``dtype`` is the layer's, or None."""
    if product.is_scaled:
        allowed = (accumulator_dtype(product.dtype[0]),)
        if dtype is not None and _kind(dtype) != "floating":
            raise TypeError(
                f"`{name}.dtype` of 8 bits must be in a layer of a floating dtype, got"
                f" {dtype}"
            )
    else:
        own = dtype if product.dtype is None else product.operand_dtype
        allowed = accumulator_dtype(own), own
        if dtype is not None and _kind(own) != _kind(dtype):
            raise TypeError(
                f"`{name}.dtype` must be {_kind(dtype)} as {dtype} is, got {own}"
            )
    preferred = product.preferred_element_type
    if preferred is not None and preferred not in allowed:
        allowed = " or ".join(dict.fromkeys(map(str, allowed)))
        raise TypeError(
            f"`{name}.preferred_element_type` must be {allowed}, got {preferred}"
        )


def _kind(dtype):
    kinds = {"complex": jnp.complexfloating, "floating": jnp.floating}
    found = [name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)]
    return found[0] if found else "integer"


def completed(products, dtype, x, weight, bias):
    """``products`` with nothing left open: those of a layer of ``dtype``.

    But for the dtype in which the forward product leaves where a bias is added to it
    and rounded once more: None, since GPUs and other platforms differ there.
    """
    results = dtype, x.dtype, weight.dtype
    # The backward pass may be traced under another default.
    precision = _default_precision()

    def complete(name, product, result):
        _check_kinds(f"products.{name}", product, dtype)
        if product.dtype is None:
            product = product._replace(dtype=dtype)
        if product.precision is None:
            product = product._replace(precision=precision)
        if product.preferred_element_type is not None:
            if not product.is_scaled:
                return product
            # An int32 sum leaves scaled, so in float32, too.
            return product._replace(preferred_element_type=jnp.dtype("float32"))
        # Of 8 bits as if the operands had those of the layer.
        own = dtype if product.is_scaled else product.operand_dtype
        if own != result:  # The product must not round to another dtype first.
            own = accumulator_dtype(own)
        elif name == "forward" and bias is not None and own != accumulator_dtype(own):
            own = None
        return product._replace(preferred_element_type=own)

    return Products(*map(complete, Products._fields, products or Products(), results))


def _default_precision():
    default = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return checked_precision("jax_default_matmul_precision", default)


def checked_precision(name: str, precision: Any) -> Any:
    """``precision`` without names: what ``lax.dot_general`` takes, and hashable."""
    if isinstance(precision, tuple | list) and len(precision) == 2:
        return tuple(checked_precision(name, operand) for operand in precision)
    if isinstance(precision, str):
        precision = _PRECISIONS.get(precision, precision)
    if precision is lax.DotAlgorithmPreset.DEFAULT:
        precision = lax.Precision.DEFAULT
    is_known = precision is None or isinstance(precision, lax.Precision)
    if is_known or is_algorithm(precision):
        return precision
    raise ValueError(
        f"`{name}` must be a jax.lax.Precision, a jax.lax.DotAlgorithmPreset, the name"
        " of either, or one of these for each operand, got"
        f" {precision!r:.60}{_similar_precision(precision)}"
    )


# The names that JAX knows: of each `jax.lax.Precision` several.
_NAMES = "default fastest bfloat16 high bfloat16_3x tensorfloat32 highest float32"
_PRECISIONS = {name: lax.Precision(name) for name in _NAMES.split()}
_PRECISIONS |= lax.DotAlgorithmPreset.__members__


_SHORT = {"tf32": "tensorfloat32", "bf16": "bfloat16", "fp32": "float32"}


def _similar_precision(name):
    names = {known.lower(): known for known in reversed(_PRECISIONS)}
    name = str(name).lower()
    similar = difflib.get_close_matches(_SHORT.get(name, name), names)
    return f". Did you mean {names[similar[0]]!r}?" if similar else ""


# Modules.

Placement = jax.Device | Sharding
"""Where parameters are created: on one device, or split over several."""

Integers = SupportsIndex | Sequence[SupportsIndex]
"""A number, or one for each axis; those of NumPy, too."""


def checked_features(name: str, features: Any) -> Any:
    """A number of features that is not negative, or a tuple of one for each axis."""
    if not isinstance(features, (tuple, list)):
        return _checked_count(name, features)
    if not features:
        raise ValueError(f"`{name}` must have a number for one axis at least, got ()")
    return tuple(_checked_count(name, count) for count in features)


def _checked_count(name, count):
    checked = _checked_integer(name, count)
    if checked < 0:
        raise ValueError(f"`{name}` must not be negative, got {checked}")
    return checked


def _checked_integer(name, value):
    required = f"`{name}` must be an integer"
    if isinstance(value, jax.Array):  # Which may be traced, and has no hash.
        raise TypeError(f"{required}, got a JAX array")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{required}, got {value!r}") from None


def checked_axis(axis: Any) -> Any:
    """The axis of the input that is contracted, or a tuple of several."""
    if not isinstance(axis, (tuple, list)):
        return _checked_integer("axis", axis)
    return tuple(_checked_integer("axis", one) for one in axis)


def check_axis_matches(axis, in_features):
    """Refuse more or fewer axes than numbers of input features."""
    axes, sizes = (as_tuple(value) for value in (axis, in_features))
    if len(axes) != len(sizes):
        raise ValueError(
            f"`axis` must have as many axes as `in_features`, got {axis!r} and"
            f" {in_features!r}"
        )


def as_tuple(value):
    """An integer as a tuple of one, a tuple as it is."""
    return value if isinstance(value, tuple) else (value,)


def check_unstacked(weight, bias, inputs, outputs):
    """Refuse a weight with other axes than the layer has, such as a stack of weights.

    Else they would be taken for more axes of the input or the output.
    """
    shape = np.shape(weight)
    if len(shape) != inputs + outputs:
        raise ValueError(
            f"`weight` must have {inputs + outputs} axes, (*out_features,"
            f" *in_features), got shape {shape}: a stack of layers is called under"
            " `nnx.vmap` or `nnx.scan`"
        )
    if bias is not None and np.shape(bias) != shape[:outputs]:
        raise ValueError(
            f"`bias` must have shape {shape[:outputs]}, as the output axes of `weight`"
            f" of shape {shape}, got shape {np.shape(bias)}"
        )


ARRAYS = jax.Array, np.ndarray, jax.ShapeDtypeStruct
"""The kinds of an array in a tree, with values or without."""


def checked_axes(x, axis, sizes=None):
    """``axis`` of x as indices in ascending order, of axes that have these sizes."""
    if x.ndim < len(axis) or not all(-x.ndim <= one < x.ndim for one in axis):
        raise ValueError(f"`x` must have the axes {axis}, got shape {x.shape}")
    axes = sorted(one % x.ndim for one in axis)
    if len(set(axes)) < len(axes):
        raise ValueError(f"`axis` must not name an axis twice, got {axis}")
    found = tuple(x.shape[one] for one in axes)
    if sizes is not None and found != tuple(sizes):
        raise ValueError(
            f"`x` must have in_features {tuple(sizes)} along its axes {axis}, got shape"
            f" {x.shape}"
        )
    return axes


def checked_sharding(name, device):
    """The sharding that places an array on ``device``, or None for None."""
    if device is None or isinstance(device, Sharding):
        return device
    if isinstance(device, jax.Device):
        return SingleDeviceSharding(device)
    raise TypeError(
        f"`{name}` must be a jax.Device or a jax.sharding.Sharding, got {device!r}"
    )


def check_use_bias(use_bias):
    """Refuse what Flax's DenseGeneral has in the place of it: axes."""
    if not isinstance(use_bias, (bool, np.bool_)):
        raise TypeError(
            f"`use_bias` must be True or False, got {use_bias!r}: name `axis=`"
        )


def check_initializer(name, init):
    """Refuse what cannot be called as ``init(key, shape, dtype)``."""
    if init is None:
        return
    required = f"`{name}` must be a function init(key, shape, dtype)"
    if not callable(init):
        raise TypeError(f"{required}, got {init!r}")
    try:
        inspect.signature(init).bind("key", "shape", "dtype")
    except TypeError as error:
        raise TypeError(
            f"{required}, got {init!r}: {error}. If it makes initializers, call it"
        ) from None
    except ValueError:  # No signature: a built-in function.
        return


def checked_drawn(name, drawn, shape):
    """What an initializer has returned, which must be an array of ``shape``."""
    found = getattr(drawn, "shape", None)
    if found is None:
        raise TypeError(
            f"`{name}` must return an array of shape {shape}, got"
            f" {type(drawn).__name__}. If it makes initializers, call it"
        )
    if found != shape:
        raise ValueError(
            f"`{name}` must return an array of shape {shape}, got shape {found}"
        )
    return drawn


def check_placeable(parameter):
    """Refuse a box that cannot be split over devices with what is inside."""
    for leaf in jax.tree.leaves(parameter):
        if not isinstance(leaf, jax.Array):
            raise TypeError(
                "an initializer must return an array where `device` is given, got"
                f" {type(leaf).__name__}: name the axes in `kernel_metadata` and"
                " `bias_metadata`"
            )


def check_names_are_known(kernel):
    """Refuse a box of Linen's whose names of the axes could not be moved with them."""
    from flax.core import meta

    if isinstance(kernel, meta.AxisMetadata) and not isinstance(
        kernel, meta.Partitioned
    ):
        raise TypeError(
            "`kernel_init` must return an array or a flax.linen.Partitioned, got"
            f" {type(kernel).__name__}"
        )


def check_bound(bound, limit):
    """Refuse a dtype whose largest value inside ``bound`` is ``limit``, a zero."""
    if bound and not limit:
        raise ValueError(
            f"`param_dtype` must have values inside ±{bound:.2g} other than zero, got"
            f" {limit.dtype}"
        )


def refuse_kernel(layer, name):
    """Refuse the name that the weight has in Flax, where it is not an attribute."""
    if name == "kernel" and getattr(type(layer), name, None) is None:
        raise AttributeError(
            f"{type(layer).__name__!r} object has no attribute 'kernel': it has a"
            " `weight` (out, in), which is Flax's kernel (in, out) transposed"
        )


_IN_THE_PLACE_OF = {
    "dot_general": "`products` says how each product is computed; a library that"
    " replaces `jax.lax.dot_general` finds it inside `jaxlinear.plain_autodiff()`",
    "dot_general_cls": "as for `dot_general`",
    "promote_dtype": "`dtype` and `products` say to what the operands are cast",
    "batch_axis": "map the layer with `nnx.vmap` or `jax.vmap`",
    "batch_dims": "map the layer with `nn.vmap` or `jax.vmap`",
    "preferred_element_type": "say it of a product, as in"
    " `products=Products(forward=Product(preferred_element_type=...))`",
}


def refuse_others(arguments):
    """Refuse arguments that a module does not have, with what is in their place.

    None, which is Flax's default for most of them, asks for nothing.
    """
    for name, value in arguments.items():
        if name not in _IN_THE_PLACE_OF:
            raise TypeError(f"unexpected argument `{name}`")
        if value is not None and not _is_empty(value):
            message = f"unexpected argument `{name}`: {_IN_THE_PLACE_OF[name]}"
            raise TypeError(message)


def _is_empty(value):
    return isinstance(value, (tuple, list, Mapping)) and not value


# Models and trees of parameters.


def check_module(model):
    from flax import nnx

    if not isinstance(model, nnx.Module):
        got = type(model).__name__
        raise TypeError(f"`model` must be a flax.nnx.Module, got {got}")


def check_model(model, layers):
    """Refuse what is no NNX module, and a layer that nothing holds."""
    check_module(model)
    if isinstance(model, layers):
        raise TypeError(
            "`model` must be what holds the layers, got one that nothing holds, a"
            f" {type(model).__name__}: put it into an nnx.Sequential"
        )


def check_optimizer(optimizer, model):
    from flax import nnx

    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "`optimizer` must be a flax.nnx.Optimizer, got"
            f" {type(optimizer).__name__}: convert a plain state of Optax's by"
            " `convert_tree(state, report.converted)`"
        )
    # An nnx.ModelAndOptimizer holds its model.
    if vars(optimizer).get("model", model) is not model:
        raise ValueError(
            "`optimizer` must be that of `model`, got one of another model"
        )


# An optimizer's state as a dict of paths to shapes, each with the part that it is in.


def check_state_belongs(state, initial):
    """Refuse an optimizer whose state has other shapes than the model asks for."""
    for path in differing(state, initial):
        raise ValueError(
            "`optimizer` must be that of `model`: its state has"
            f" {_kept(path, state)} at {path!r}{_part(path, state)}, where the model's"
            f" has {_kept(path, initial)}. Convert both in one call"
        )


def check_state_goes_on(state, initial):
    """Refuse a converted state with other shapes than the new model asks for."""
    for path in differing(state, initial):
        raise ValueError(
            "`optimizer` must have a state that can be converted: it would have"
            f" {_kept(path, state)} at {path!r}{_part(path, state)}, where a new state"
            f" has {_kept(path, initial)}. {_BY_NAME}"
        )


def check_not_flat(state, parameters):
    """Refuse one vector of all parameters, as ``optax.flatten`` makes of them."""
    flat = (sum(map(math.prod, parameters)),)
    for path in state:
        if state[path][0] == flat and flat not in parameters:
            raise ValueError(
                "`optimizer` must keep the parameters apart: its state has one vector"
                f" of all at {path!r}{_part(path, state)}. Start it anew"
            )


_BY_NAME = (
    "A mask, a label or a filter must be a function that finds `kernel` and `weight`"
    " alike; what is kept by other axes than the parameter's is to be started anew"
)


def refuse_unstarted(error):
    raise ValueError(
        f"`optimizer` must have a `tx` that starts for the converted model. {_BY_NAME}"
    ) from error


_NONE = None, ""


def differing(state, initial):
    """The paths at which two states have other shapes, or only one has something."""
    paths = sorted(state.keys() | initial.keys())
    return [p for p in paths if state.get(p, _NONE)[0] != initial.get(p, _NONE)[0]]


def _kept(path, state):
    return f"shape {state[path][0]}" if path in state else "nothing"


def _part(path, state):
    return state[path][1] if path in state else ""


def checked_layers(layers: Any, axes_type: Any) -> Any:
    """Layers as a dict from paths to axes."""
    if isinstance(layers, str):
        raise TypeError(
            f"`layers` must be paths of layers, got one string: pass [{layers!r}]"
        )
    if not isinstance(layers, Mapping):
        layers = dict.fromkeys(layers, axes_type())
    checked = {}
    for path, axes in layers.items():
        if not isinstance(path, str):
            raise TypeError(
                f"`layers` must have dotted paths, such as 'mlp.up', got {path!r}"
            )
        try:
            inputs, outputs = axes
            checked[path] = axes_type(operator.index(inputs), operator.index(outputs))
        except (TypeError, ValueError):
            raise TypeError(
                f"`layers` must say how many input and output axes {path!r} has, such"
                f" as (1, 1), got {axes!r}"
            ) from None
    return checked


def check_layers_found(entry, missing):
    """Refuse to leave out a layer that was named."""
    if missing:
        names = ", ".join(map(repr, sorted(missing)))
        required = f"`layers` must have an entry {entry!r} in `tree`"
        raise ValueError(f"{required}, where there is none for {names}")


def check_unfactored(argument, where, leaf, axes):
    """Refuse what is kept of a parameter by other axes, which do not say which."""
    shape = np.shape(leaf)
    # GaLore's may look like a matrix of the layer.
    is_projector = where.endswith(".projector")
    if math.prod(shape) > 1 and (len(shape) < axes or is_projector):
        kind = "none of a projection" if is_projector else f"{axes} axes or more"
        raise ValueError(
            f"`{argument}` must have {kind} at {where}, got shape {shape}: start this"
            " state anew (a factored optimizer's does not say which axes it belongs to)"
        )
