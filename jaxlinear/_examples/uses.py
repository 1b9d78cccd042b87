"""The uses of parameters whose gradients have factors: layers, and lookups in tables.

A use knows what its forward pass keeps, and what that and the cotangent G of its result
say: the factors of one example's gradient, and the gradient of a batch.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear._examples.factors import Factors
from jaxlinear._linear import Spec
from jaxlinear._op.formulas import bias_gradient, weight_gradient
from jaxlinear._op.operands import operand
from jaxlinear._op.sharding import ArrayType
from jaxlinear._product import Product, accumulator_dtype

SHAPES = {"reshape", "transpose", "squeeze", "expand_dims"}
STEPS = {*SHAPES, "convert_element_type", "copy"}


class Parameter(NamedTuple):
    """A parameter where a program uses it.

    Attributes:
      leaf: its number.
      steps: what was done to it before: equations that give its numbers another dtype
        or another shape, and None where a loop took a slice.
      loops: for each loop around the use, whether that took a slice, or else used the
        whole in each step.
    """

    leaf: int
    steps: tuple[Any, ...] = ()
    loops: tuple[bool, ...] = ()

    def after(self, equation):
        return self._replace(steps=(*self.steps, equation))

    def in_loop(self, is_sliced):
        steps = (*self.steps, None) if is_sliced else self.steps
        return self._replace(steps=steps, loops=(*self.loops, is_sliced))

    def out_of_loop(self):
        """The stack that a loop makes of these slices if it is as before, or None."""
        if not self.loops[-1] or self.steps[-1] is not None:
            return None
        return self._replace(steps=self.steps[:-1], loops=self.loops[:-1])

    def untransposed(self):
        """The matrix whose transpose this is, or itself, and whether it is that."""
        last = self.steps[-1] if self.steps else None
        if last is None or last.primitive.name != "transpose" or _rank(last) != 2:
            return self, False
        return self._replace(steps=self.steps[:-1]), True

    @property
    def is_used_once(self):
        return all(self.loops)

    @property
    def shapes(self):
        """The steps that change its shape: two uses with the same are of one matrix."""
        return tuple(
            s and (s.outvars[0].aval.shape, s.params.get("permutation"))
            for s in self.steps
            if s is None or s.primitive.name in SHAPES
        )

    def pulled_back(self, gradient):
        """The gradient of the parameter, from that of its slices (*slices, ...)."""
        slices = sum(self.loops)
        for step in reversed(self.steps):
            if step is None:
                slices -= 1
            else:
                gradient = _transposed(step, slices)(gradient)
        return gradient


def is_real(aval):
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _rank(equation):
    return equation.outvars[0].aval.ndim


def _transposed(equation, mapped_axes):
    before = equation.invars[0].aval.update(weak_type=False)

    def pull(cotangent):
        def step(value):
            return equation.primitive.bind(value, **equation.params)

        return jax.linear_transpose(step, before)(cotangent)[0]

    for _ in range(mapped_axes):
        pull = jax.vmap(pull)
    return pull


class Linear(NamedTuple):
    """A layer, whose weight may be the transpose of the parameter."""

    parameters: dict[str, Parameter]
    types: dict[str, Any]
    is_transposed: bool
    product: Product
    result: jax.ShapeDtypeStruct
    lengths: tuple[int, ...]

    @staticmethod
    def of(equation, parameters, lengths):
        """The use in an equation of `in_every_mode`, or None."""
        static = [value for _, value in equation.params["static"]]
        if equation.params["levels"] or [*map(type, static)] != [Spec]:
            return None
        (spec,) = static
        places = equation.params["tree"].unflatten(range(len(parameters)))
        named = dict(zip(("x", "weight", "bias"), places, strict=True))
        if parameters[named.pop("x")]:
            return None
        named = {n: k for n, k in named.items() if k is not None and parameters[k]}
        found, is_transposed = {n: parameters[k] for n, k in named.items()}, False
        if "weight" in found:
            found["weight"], is_transposed = found["weight"].untransposed()
        return Linear(
            found,
            {name: equation.invars[k].aval for name, k in named.items()},
            is_transposed,
            spec.products.weight_grad,
            equation.outvars[0].aval,
            lengths,
        )

    def form(self, name):
        return "rows and columns" if name == "weight" else "vector"

    def kept(self, x, *_):
        if "weight" not in self.parameters:
            return None
        # In 8 bits the gradient of the batch has another scale than an example's.
        if self.product.is_scaled:
            return x
        return operand(x, self.product, 1, range(x.ndim - 1))

    def cotangent(self, G):
        return G

    def factors(self, name, kept, G):
        """Of the gradient of one example, whose G and X are (T, out) and (T, in)."""
        if name == "bias":
            return Factors(G, None, G.shape[-1])
        operands: Any = (
            operand(G, self.product, 0, (0,)),
            operand(kept, self.product, 1, (0,)),
        )
        if self.product.is_scaled:
            operands = [one.astype(jnp.float32) for one in operands]
        rows, columns = operands[::-1] if self.is_transposed else operands
        return Factors(rows, columns, self._rows, self.product.precision)

    @property
    def _rows(self):
        return self.types["weight"].shape[1 if self.is_transposed else 0]

    def gradient(self, name, kept, G):
        """The gradient of a batch, whose G and X are (T, out) and (T, in)."""
        kind = ArrayType(self.types[name].dtype, None)
        if name == "bias":
            return bias_gradient(G, kind)
        grad = weight_gradient(G, kept, self.product, kind)
        return grad.T if self.is_transposed else grad


class Matrix(NamedTuple):
    """A `dot_general` of a parameter and something else, such as ``x @ kernel``.

    The contracted axes of the parameter are its in, and the others its out.
    """

    parameters: dict[str, Parameter]
    types: dict[str, Any]
    place: int
    contracted: tuple[int, ...]
    contracted_of_x: tuple[int, ...]
    precision: Any
    result: jax.ShapeDtypeStruct
    lengths: tuple[int, ...]

    @staticmethod
    def of(equation, parameters, lengths):
        """The use in a `dot_general`, or None."""
        contracted, batch = equation.params["dimension_numbers"]
        place = 0 if parameters[0] else 1
        if all(parameters) or batch[0] or not contracted[0]:
            return None
        # JAX also multiplies integers by numbers, and their sums have other dtypes.
        if not is_real(equation.invars[1 - place].aval):
            return None
        aval, own = equation.invars[place].aval, contracted[place]
        parameter, is_transposed = parameters[place].untransposed()
        if is_transposed:
            aval, own = aval.update(shape=aval.shape[::-1]), tuple(1 - k for k in own)
        return Matrix(
            {"matrix": parameter},
            {"matrix": aval},
            place,
            own,
            contracted[1 - place],
            equation.params["precision"],
            equation.outvars[0].aval,
            lengths,
        )

    @property
    def _is_kernel(self):
        """Whether it is (in, out), where other uses may have it as (out, in)."""
        return self.contracted == (0,) and self.types["matrix"].ndim == 2

    @property
    def _free(self):
        axes = range(self.types["matrix"].ndim)
        return tuple(k for k in axes if k not in self.contracted)

    def form(self, _):
        """What two uses of one parameter must share: which axes are rows, columns."""
        is_matrix = len(self._free) == len(self.contracted) == 1
        return "rows and columns" if is_matrix else self.contracted

    def kept(self, *arguments):
        x, axes = arguments[1 - self.place], self.contracted_of_x
        return _merged(jnp.moveaxis(x, axes, range(-len(axes), 0)), len(axes))

    def cotangent(self, G):
        """G as (*, out): in the result the axes of the first operand come first."""
        count = len(self._free)
        if self.place == 0:
            G = jnp.moveaxis(G, range(count), range(-count, 0))
        return _merged(G, count)

    def factors(self, name, kept, G):
        rows, columns = (kept, G) if self._is_kernel else (G, kept)
        return Factors(rows, columns, rows.shape[-1], self.precision)

    def gradient(self, name, kept, G):
        matrix = self.types[name]
        axes = (0,), (0,)
        grad = lax.dot_general(
            *(G, kept, (axes, ((), ()))),
            precision=self.precision,
            preferred_element_type=accumulator_dtype(G.dtype),
        )
        order = *self._free, *self.contracted
        grad = grad.reshape([matrix.shape[k] for k in order])
        return jnp.moveaxis(grad, range(matrix.ndim), order).astype(matrix.dtype)


class Lookup(NamedTuple):
    """Rows of a table (rows, columns), by their numbers."""

    parameters: dict[str, Parameter]
    types: dict[str, Any]
    mode: lax.GatherScatterMode
    result: jax.ShapeDtypeStruct
    lengths: tuple[int, ...]

    @staticmethod
    def of(equation, parameters, lengths):
        """The use in a ``gather``, or None."""
        table, numbers = (v.aval for v in equation.invars)
        params = equation.params
        axes = params["dimension_numbers"]
        is_of_rows = (
            table.ndim == 2
            and parameters[1] is None
            and axes.start_index_map == axes.collapsed_slice_dims == (0,)
            and axes.offset_dims == (numbers.ndim - 1,)
            and not axes.operand_batching_dims
            and params["slice_sizes"] == (1, table.shape[1])
        )
        if not is_of_rows:
            return None
        found, types = {"table": parameters[0]}, {"table": table}
        result = equation.outvars[0].aval
        return Lookup(found, types, params["mode"], result, lengths)

    def form(self, _):
        return "rows and columns"

    def kept(self, table, numbers):
        if numbers.dtype.itemsize < 4:  # The number of rows may be beyond 8 bits.
            numbers = numbers.astype("int32")
        if self.mode == lax.GatherScatterMode.CLIP:
            numbers = jnp.clip(numbers, 0, table.shape[0] - 1)
        return numbers

    def cotangent(self, G):
        return G

    def factors(self, name, kept, G):
        return Factors(kept[:, 0], G, self.types[name].shape[0])

    def gradient(self, name, kept, G):
        matrix = self.factors(name, kept, G).matrix()
        return matrix.astype(self.types[name].dtype)


Use = Linear | Matrix | Lookup


def arranged(loops, array, axes_before=0):
    """(slices, tokens, features) of an array (*before, *loops, *, features).

    A loop that took slices has one for each of its steps. All else are tokens.
    """
    axes = [k + axes_before for k, is_sliced in enumerate(loops) if is_sliced]
    array = jnp.moveaxis(array, axes, range(len(axes)))
    slices, tokens = array.shape[: len(axes)], array.shape[len(axes) : -1]
    return array.reshape(math.prod(slices), math.prod(tokens), array.shape[-1])


def _merged(array, count):
    """The array, whose last ``count`` axes are one."""
    # Not -1, which an array without elements does not determine.
    before = array.ndim - count
    return array.reshape(*array.shape[:before], math.prod(array.shape[before:]))
