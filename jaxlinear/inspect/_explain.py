"""What a call and its backward pass run, read from the program that XLA compiled."""

import collections
import dataclasses
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear._op import cpu
from jaxlinear._op.quantized import REASON_ON_CPU
from jaxlinear._product import EIGHT_BIT_PAIRS, Product
from jaxlinear.inspect._hlo import bits, collectives, instructions
from jaxlinear.inspect._rounding import rounding
from jaxlinear.inspect._table import table

# The names that `_op/formulas.py` gives to the operations of each product.
_SCOPE = re.compile(r"\b(forward_product|input_gradient|weight_gradient)\b")
_EIGHT_BITS = {str(dtype) for pair in EIGHT_BIT_PAIRS for dtype in pair}


@dataclasses.dataclass(frozen=True)
class CompiledProduct:
    """A product as it was compiled, and how many there are.

    ``product`` is what the device computes: the dtypes of the operands that it reads,
    the precision in XLA's words, and the dtype of the sums that it returns; inside, an
    accelerator may use a wider one. ``result`` is the dtype to which the program rounds
    the sums. ``runs_as`` is XLA's operation, or the library that it calls.
    """

    name: str
    count: int
    product: Product
    result: str
    runs_as: str


@dataclasses.dataclass(frozen=True)
class Saved:
    """An array that is kept from the forward to the backward pass."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    is_argument: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind and dtype: how many, and what each device gets."""

    kind: str
    dtype: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What :func:`explain` found. It prints as tables."""

    device: str
    products: tuple[CompiledProduct, ...]
    saved: tuple[Saved, ...]
    collectives: tuple[Collective, ...]
    notes: tuple[str, ...] = ()

    @property
    def saved_bytes(self) -> int:
        """The bytes of ``saved``, arguments included."""
        return sum(array.bytes for array in self.saved)

    def __repr__(self) -> str:
        parts = [
            f"On {self.device}:",
            _table(map(_flat, self.products)) or "No products.",
            *self.notes,
            f"Saved for the backward pass: {self.saved_bytes:,} bytes.",
            _table(map(dataclasses.asdict, self.saved)),
            _table(map(dataclasses.asdict, self.collectives)) or "No collectives.",
        ]
        return "\n\n".join(filter(None, parts))

    _repr_markdown_ = __repr__


def _flat(row):
    """The columns of a ``CompiledProduct``."""
    return {
        "name": row.name,
        "count": row.count,
        "operands": row.product.dtype,
        "precision": row.product.precision,
        "preferred_element_type": row.product.preferred_element_type,
        "result": row.result,
        "runs_as": row.runs_as,
    }


def _table(rows):
    rows = list(rows)
    if not rows:
        return ""
    header = [name.replace("_", " ") for name in rows[0]]
    return table(header, [map(_text, row.values()) for row in rows])


def _text(value):
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case tuple():
            return " × ".join(map(str, value)) or "scalar"
    return value


def explain(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Say what a call of ``function`` and its backward pass run on this device.

    The call and the gradient of its floating results in its floating arguments are
    compiled and not run. The report is read from the program that XLA made. XLA may
    have fused, converted or removed what the source asked for. The body of a loop
    counts once.

    Args:
      function: a function of arrays; a Flax NNX or Equinox module, whose parameters
        are also differentiated; or a Flax Linen module, of whose variables only the
        shapes are used.
      *args: pytrees of arrays or of ``jax.ShapeDtypeStruct``, sharded or not. Other
        leaves are passed on unchanged.
      **kwargs: the same, by name: ``train=True``, or those of ``apply`` for a Linen
        module, ``rngs`` and ``mutable`` among them.

    Returns:
      An :class:`Explanation`, which a terminal and a notebook show as tables: the
      products with their dtypes and precision, the arrays saved for the backward pass,
      and the collectives with the bytes that each device gets from them.

    Raises:
      TypeError: if ``function`` cannot be called.
      ValueError: if no argument or no result is a floating array.

    Example:
      >>> import jax.numpy as jnp, jaxlinear
      >>> x, weight = jnp.ones((8, 3)), jnp.ones((2, 3))
      >>> found = jaxlinear.explain(jaxlinear.linear, x, weight, dtype="bfloat16")
      >>> [product.name for product in found.products]
      ['forward product', 'input gradient', 'weight gradient']
      >>> found.saved_bytes  # x and weight, in bfloat16
      60
    """
    if not callable(function):
        raise TypeError(f"`function` must be callable, got {type(function).__name__}")
    applied = _applied(function, args, kwargs)
    forward, floating, others = _as_function_of_arrays(*applied)
    if not floating:
        raise ValueError("`args` must have a floating array to differentiate, got none")

    def step(floating, others, G):
        Y, vjp = jax.vjp(lambda floating: forward(floating, others), floating)
        return Y, vjp(G)

    Y = jax.eval_shape(forward, floating, others)
    if not Y:
        raise ValueError("`function` must return a floating array, got none")
    shardings = jax.jit(forward).lower(floating, others).compile().output_shardings
    G = [
        jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=sharding)
        for y, sharding in zip(Y, shardings, strict=True)
    ]
    lowered = jax.jit(step).lower(floating, others, G)
    asked = instructions(lowered.as_text("hlo", debug_info=True))
    compiled = instructions(lowered.compile().as_text())
    devices = shardings[0].device_set
    device = min(devices, key=lambda d: d.id)
    return Explanation(
        f"{len(devices)} × {device.device_kind}",
        tuple(_products(asked, compiled)),
        tuple(_saved(forward, floating, others)),
        tuple(_collectives(compiled)),
        tuple(_notes(asked, device)),
    )


def _applied(function, args, kwargs):
    """A Linen module as its ``apply``, with variables of the right shape."""
    linen = sys.modules.get("flax.linen")
    if linen is None or not isinstance(function, linen.Module):
        return function, args, kwargs
    call = {n: a for n, a in kwargs.items() if n not in ("rngs", "mutable")}
    arrays, rebuilt = _split((args, call))
    rngs = {"params": jax.random.key(0), **(kwargs.get("rngs") or {})}

    def init(arrays):
        args, call = rebuilt(arrays)
        return function.init(rngs, *args, **call)

    return function.apply, (jax.eval_shape(init, arrays), *args), kwargs


def _split(tree):
    """The arrays of a tree, by position, and what makes the tree of them again."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)}

    def rebuilt(arrays):
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return structure.unflatten(filled)

    return arrays, rebuilt


def _as_function_of_arrays(function, args, kwargs):
    """A function of its floating arrays and its other ones, and both of these."""
    arrays, rebuilt = _split((function, args, kwargs))
    floating, others = {}, {}
    for position, array in arrays.items():
        group = floating if jnp.issubdtype(array.dtype, jnp.inexact) else others
        group[position] = array

    def forward(floating, others):
        function, args, kwargs = rebuilt(floating | others)
        results = jax.tree.leaves(function(*args, **kwargs))
        return [y for y in results if jnp.issubdtype(jnp.result_type(y), jnp.inexact)]

    return forward, floating, others


def _products(asked, compiled):
    """The products in the order of the source, alike ones together."""
    results = {}  # name: the dtypes to which the source rounds the products
    asked_products = collections.defaultdict(list)
    operands = set(_operands_of_products(asked))
    for instruction in asked:
        name, scope = _name(instruction), _scope(instruction)
        if instruction.is_product:
            asked_products[name].append(instruction)
            results.setdefault(name, []).append(instruction.results[0][0])
        elif scope in results and instruction.results and instruction not in operands:
            results[scope][-1] = instruction.results[0][0]
    for name, products in asked_products.items():
        found = [i for i in compiled if i.is_product and _name(i) == name]
        alike = collections.Counter(
            (
                Product(
                    instruction.operand_dtypes[:2],
                    instruction.precision,
                    instruction.results[0][0],
                ),
                # XLA multiplies vectors element by element.
                instruction.runs_as if found else "elementwise",
            )
            for instruction in found or products
        )
        result = ", ".join(dict.fromkeys(results[name]))
        for (product, runs_as), count in alike.items():
            yield CompiledProduct(name, count, product, result, runs_as)


def _operands_of_products(asked):
    """What the products read that has their scope, as casts of the operands have."""
    for product in (i for i in asked if i.is_product):
        read = [*product.read]
        while read:
            operand = read.pop()
            if _scope(operand) == _scope(product) and not operand.is_product:
                yield operand
                read += operand.read


def _notes(asked, device):
    """What was chosen for the device, and why, and what its default precision is."""
    platform = device.platform
    # Operands have their dtypes from before any cast for the product here.
    dtypes = {d for i in asked if _scope(i) for d in i.operand_dtypes}
    if platform == "cpu" and "bfloat16" in dtypes:
        yield cpu.REASONS[cpu.bfloat16_form()]
    if platform == "cpu" and dtypes & _EIGHT_BITS:
        yield REASON_ON_CPU
    if platform in ("gpu", "cuda", "rocm") and dtypes & {"bfloat16", "float16"}:
        yield (
            "A bias is added in the dtype in which the forward product leaves:"
            " by default that of Y on GPUs, which would else write a float32 array."
        )
    at_default = [i for i in asked if i.is_product and i.precision == "default"]
    for dtype in dict.fromkeys(d for i in at_default for d in i.operand_dtypes):
        found = rounding(device, dtype)
        if found.roundoff:
            yield (
                f"The default precision rounds the operands of {dtype} products to"
                f' {found.operands} on this device; "highest" does not.'
            )


def _scope(instruction):
    """The product of our layer that an instruction belongs to, or None."""
    found = _SCOPE.search(instruction.op_name)
    return found and found[1].replace("_", " ")


def _name(instruction):
    is_backward = "transpose(" in instruction.op_name
    other = "other, backward pass" if is_backward else "other, forward pass"
    return _scope(instruction) or other


def _saved(forward, floating, others):
    """What ``jax.vjp`` keeps."""

    def kept(floating, others):
        return jax.tree.leaves(jax.vjp(lambda f: forward(f, others), floating)[1])

    jaxpr = jax.make_jaxpr(kept)(floating, others).jaxpr
    arguments = set(map(id, jaxpr.invars))
    for variable in jaxpr.outvars:
        shape, dtype = variable.aval.shape, variable.aval.dtype
        size = math.prod(shape) * dtype.itemsize
        if size:
            yield Saved(shape, str(dtype), size, id(variable) in arguments)


def _collectives(compiled):
    count, size = collections.Counter(), collections.Counter()
    for instruction in collectives(compiled):
        for dtype, shape in instruction.received:
            key = instruction.collective, dtype
            count[key] += 1
            size[key] += math.prod(shape) * bits(dtype) // 8
    return [
        Collective(kind, dtype, number, size[kind, dtype])
        for (kind, dtype), number in count.items()
    ]
