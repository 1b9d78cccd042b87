"""The forms of products for XLA's CPU backend, on CPUs of two kinds.

A CPU with bfloat16 instructions multiplies bfloat16 operands fast. On any other CPU it
is mostly faster, and always safe, to cast them to float32. ``python -m benchmarks
--device cpu`` measures what each choice gains, and tests/deep/test_random_programs.py
looks for programs in which one fails. In float32 no form was found that is faster than
the plain one at every shape; at one row there is one that is more accurate.

The form is chosen when a program is lowered for a CPU. An exported program keeps the
form of the machine on which it was exported. It runs everywhere, with the same values.
"""

import functools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxlinear._plain import dot_general
from jaxlinear._product import accumulator_dtype, is_algorithm

# Algorithms of low precision that JAX lowers for CPU, and the dtype of their operands.
_ALGORITHMS = {
    lax.DotAlgorithmPreset.BF16_BF16_F32: "bfloat16",
    lax.DotAlgorithmPreset.F16_F16_F16: "float16",
}

# The rows up to which a cast of the weight costs more than a slower product, from
# ``python -m benchmarks --device cpu``.
_FEW = 64

NATIVE, SHARED, READ, WIDENED = "native", "shared", "read", "widened"

REASONS = {
    NATIVE: (
        "bfloat16 operands are multiplied as they are, because this CPU has bfloat16"
        " instructions; in float32 where JAX maps or differentiates a product."
    ),
    SHARED: (
        "bfloat16 operands are multiplied as they are, because there are several CPU"
        " devices: an operand that is cast is gathered for each product again. This CPU"
        " has no bfloat16 instructions."
    ),
    READ: (
        "bfloat16 operands are multiplied as they are or in float32, whichever is"
        " faster at their shape or takes less memory, because this CPU has no bfloat16"
        " instructions."
    ),
    WIDENED: (
        "bfloat16 operands are multiplied in float32, because this CPU has no bfloat16"
        f" instructions; as they are where up to {_FEW} rows meet a weight, whose"
        " float32 copy would cost more than the product."
    ),
}


def bfloat16_form():
    """How bfloat16 operands are multiplied on CPUs here: a key of ``REASONS``."""
    if _has_bfloat16_instructions():
        return NATIVE
    if not has_one_device():
        return SHARED
    return READ if _reads_bfloat16() else WIDENED


def has_one_device():
    """Whether there is one CPU device, so that no program is split over several."""
    return not _has_backend() or jax.device_count("cpu") == 1


def _has_backend():
    """Whether this process has a CPU backend; it may only export for CPUs."""
    try:
        return bool(jax.local_devices(backend="cpu"))
    except RuntimeError:  # `JAX_PLATFORMS` names others.
        return False


@functools.cache
def _has_bfloat16_instructions():
    """Whether XLA compiles for a CPU with AVX-512 BF16 or AMX: False if it can't say.

    XLA stores the features of its target machine, which ``XLA_FLAGS`` may restrict,
    with every compiled program.
    """
    if not _has_backend():
        return False
    try:
        program, *_ = serialize_executable.serialize(_compiled(lambda x: x, (), 1))
    except (RuntimeError, ValueError):
        return False
    return re.search(rb"\+(avx512bf16|amx-bf16)\b", program) is not None


@functools.cache
def _reads_bfloat16():
    """Whether XLA multiplies bfloat16 operands without a copy of them in float32.

    If the result is also bfloat16, the XLA of JAX 0.12 does, and that of 0.10 does not.
    """

    def product(a, b):
        axes = ((1,), (1,)), ((), ())
        return dot_general(a, b, axes, preferred_element_type=a.dtype)

    if not _has_backend():
        return False
    memory = _compiled(product, (64, 64), 2).memory_analysis()
    return memory is not None and memory.temp_size_in_bytes == 0


def _compiled(function, shape, count):
    """``function`` of ``count`` bfloat16 arrays, compiled for one CPU."""
    cpu = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    array = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=cpu)
    lowered = jax.jit(function).lower
    # In another thread no mesh is set: the caller's may have other devices.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(lambda: lowered(*[array] * count).compile()).result()


def has_own_form(a, b, contracted_axes, precision, sharding):
    """Whether CPUs multiply the operands in another form than ``lax.dot_general``.

    This asks no backend: programs are traced where there is none.
    """
    if 0 in a.shape or 0 in b.shape:
        return False
    dtype, precision = _multiplied(a.dtype, precision)
    if is_algorithm(precision):
        return False
    is_low = dtype != accumulator_dtype(dtype)
    is_long = _is_long_sum_of_one_row(a, b, contracted_axes)
    return is_low or (sharding is None and is_long)


class Call(NamedTuple):
    """What a product asks for besides its operands."""

    contracted_axes: tuple[tuple[int, ...], tuple[int, ...]]
    precision: Any
    sharding: Any
    result_dtype: Any
    is_alone: bool  # not mapped or differentiated by JAX


def multiply_on_cpu(a, b, call):
    """The product of operands that have a form of their own."""
    dtype, precision = _multiplied(a.dtype, call.precision)
    call = call._replace(precision=precision)
    if dtype != accumulator_dtype(dtype):
        Y = _multiply_low(a.astype(dtype), b.astype(dtype), call)
    elif call.is_alone:
        Y = _sum_in_blocks(a, b, precision)
    else:
        Y = _dot(a, b, call)
    return Y.astype(call.result_dtype)


def _multiplied(dtype, precision):
    """The dtype in which operands are multiplied, and the precision that is left."""
    if precision in _ALGORITHMS:
        return jnp.dtype(_ALGORITHMS[precision]), None
    return dtype, precision


def _multiply_low(a, b, call):
    """The product of operands that are both in float16 or both in bfloat16."""
    # No CPU is known on which XLA multiplies float16.
    is_mapped = not (call.is_alone or _reads_bfloat16())
    if a.dtype != "bfloat16" or is_mapped:
        return _widened(a, b, call)
    multiply = _weight_gradient if _is_transposed(a, call) else _rows_times_weight
    return multiply(a, b, call)


def _rows_times_weight(X, W, call):
    """X Wᵀ, or G W."""
    if call.is_alone and _is_one_row(X):
        return _doubled(X, W, call)
    if _is_faster_widened(X, call, _FEW):
        return _widened(X, W, call)
    return _fenced(X, W, call)


def _weight_gradient(G, X, call):
    """Gᵀ X."""
    # At one row memory is the limit.
    if _is_one_row(G) or _is_faster_widened(G, call):
        return _widened(G, X, call)
    if bfloat16_form() == SHARED:
        return _fenced(G, X, call)
    if call.sharding is None and _is_cheaper_swapped(G, X):
        return _fenced(X, G, call, _transposed_dot).T
    return _fenced(G, X, call, _transposed_dot)


def _is_faster_widened(rows, call, few=0):
    """Whether a product of ``rows`` is faster in float32, by 10 to 25 %.

    At a ``few`` rows it is not. An XLA that reads bfloat16 operands without a copy
    makes float32 copies for the naive formula, except with several leading or mapped
    axes.
    """
    form = bfloat16_form()
    if form not in (READ, WIDENED) or _has_few_rows(rows, few):
        return False
    return form == WIDENED or (call.is_alone and rows.ndim == 2)


def _widened(a, b, call):
    """A product of operands that are cast to float32: no program is known to fail."""
    is_free = _is_transposed(a, call) and call.sharding is None
    if is_free and call.is_alone and _is_better_flat(a, b):
        a, b, call = _rows(a), _rows(b), call._replace(contracted_axes=((0,), (0,)))
    wide = [operand.astype(accumulator_dtype(operand.dtype)) for operand in (a, b)]
    if a.dtype == "bfloat16" and call.contracted_axes[1] == (1,):  # X Wᵀ
        wide = map(_kept_rounded, wide)
    return _dot(*wide, call)


def _kept_rounded(operand):
    """A float32 operand that was cast from bfloat16, with no more bits than that.

    XLA may drop a cast to bfloat16 before a cast to float32. It does so if the product
    has no gradient, and training and evaluation would differ. XLA fuses this rounding
    with the cast. In a kernel of YNNPACK with several casts and ReLUs (JAX 0.12.0.1) a
    constant is not initialized; the rounding splits that kernel.
    """
    return lax.reduce_precision(operand, exponent_bits=8, mantissa_bits=7)


def _fenced(a, b, call, dot=None):
    """A product of bfloat16 operands that are not cast.

    With bfloat16 instructions and a float32 result it is two to four times as fast as
    one of float32 operands. But it fails at run time ("Unsupported element type for
    DotThunk") if XLA has folded a transpose into the result or the first operand. The
    barriers keep transposes out, except one from `jax.vmap` over one operand.

    The second operand has no barrier, and neither has the first if it is about to be
    gathered, which also keeps transposes out: behind a barrier, the gathered copy would
    not be shared with the other products of the layer.
    """
    is_gathered = not _is_transposed(a, call) and _has_gathered_rows(a, call.sharding)
    a = a if is_gathered else lax.optimization_barrier(a)
    return lax.optimization_barrier((dot or _dot)(a, b, call))


def _doubled(a, b, call):
    """The product of one row, multiplied twice: for a single row XLA copies W."""
    if call.sharding is not None:
        return _widened(a, b, call)
    a_axes, b_axes = call.contracted_axes
    axes = tuple(axis + 1 for axis in a_axes), b_axes
    return _fenced(jnp.stack([a, a]), b, call._replace(contracted_axes=axes))[0]


def _dot(a, b, call):
    # An XLA that reads bfloat16 operands without a copy needs no float32 result to
    # round. With several devices each would round its part of a sum.
    is_rounded = a.dtype == call.result_dtype == "bfloat16" and _reads_bfloat16()
    is_rounded = is_rounded and has_one_device()
    return dot_general(
        a,
        b,
        (call.contracted_axes, ((), ())),
        precision=call.precision,
        preferred_element_type=a.dtype if is_rounded else accumulator_dtype(a.dtype),
        out_sharding=call.sharding,
    )


def _transposed_dot(G, X, call):
    """Gᵀ X, with a copy of G in which the contracted axes are the last ones.

    XLA makes the copy if G has another axis, here of length one. Without the copy it
    leaves its fast path. X is not copied, so that the forward product shares its
    gathered copy.
    """
    sharding = call.sharding
    if sharding is not None:
        spec = sharding.spec
        spec = P(None, *spec.partitions, unreduced=spec.unreduced, reduced=spec.reduced)
        sharding = NamedSharding(sharding.mesh, spec)
    return _dot(jnp.expand_dims(G, -2), X, call._replace(sharding=sharding))[0]


def _has_gathered_rows(a, sharding):
    """Whether the rows of the result are not split as those of ``a`` are."""
    if sharding is None:
        return False
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    split, rows = jax.typeof(a).sharding.spec.partitions, a.ndim - 1
    return split[:rows] != spec.partitions[:rows]


def _is_cheaper_swapped(G, X):
    """Whether it costs less to transpose X and the result than to transpose G."""
    if _is_symbolic(G, X):
        return False
    return G.size > X.size + G.shape[-1] * X.shape[-1]


def _is_better_flat(G, X):
    """Whether one leading axis is faster than several, on one device.

    With several axes XLA copies G for Gᵀ X, and makes another float32 copy for G W.
    """
    if _is_symbolic(G, X):
        return False
    return G.ndim > 2 and G.size > X.size and has_one_device()


def _is_symbolic(*arrays):
    """Whether a size is not known yet, as in a program that is exported for any."""
    return any(export.is_symbolic_dim(n) for array in arrays for n in array.shape)


def _rows(a):
    return a.reshape(-1, a.shape[-1])


def _is_one_row(a):
    return all(length == 1 for length in a.shape[:-1])


def _has_few_rows(a, limit):
    return not _is_symbolic(a) and math.prod(a.shape[:-1]) <= limit


def _is_transposed(a, call):
    return a.ndim - 1 not in call.contracted_axes[0]  # Gᵀ X


_BLOCKS = 32


def _is_long_sum_of_one_row(a, b, contracted_axes):
    """Whether the product is G W at one row, with as many rows of W in each block."""
    is_input_gradient = contracted_axes == ((a.ndim - 1,), (0,))
    return is_input_gradient and _is_one_row(a) and b.shape[0] % _BLOCKS == 0


def _sum_in_blocks(G, W, precision):
    """G W at one row: as fast as the plain product, and several times as accurate.

    The plain product sums over the rows of W one after the other.
    """
    sums = dot_general(
        G.reshape(_BLOCKS, -1),
        W.reshape(_BLOCKS, -1, W.shape[1]),
        (((1,), (1,)), ((0,), (0,))),
        precision=precision,
    )
    return jnp.sum(sums, 0).reshape(*G.shape[:-1], W.shape[1])
