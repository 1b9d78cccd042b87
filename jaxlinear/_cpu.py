"""Products in the form that suits XLA's CPU backend, on CPUs of two kinds.

A CPU with bfloat16 instructions has a fast product of bfloat16 operands. On any other
one the fastest product, and the safest, is that of operands cast to float32.
``python -m benchmarks --device cpu`` measures what each choice gains, and
tests/test_random_programs.py that none of them fails. In float32 no form was found that
is faster than the plain one at every shape; at one row there is one that is more
accurate.

The form is chosen when a program is traced. An exported program keeps that of the
machine on which it was exported: it runs everywhere, with the same values.
"""

import functools
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.custom_batching import custom_vmap
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxlinear._product import accumulator, is_algorithm

# Algorithms of low precision that JAX lowers for CPU, and the dtype of their operands.
_ALGORITHMS = {
    lax.DotAlgorithmPreset.BF16_BF16_F32: "bfloat16",
    lax.DotAlgorithmPreset.F16_F16_F16: "float16",
}

NATIVE, SHARED, WIDENED = "native", "shared", "widened"

REASONS = {
    NATIVE: (
        "bfloat16 operands are multiplied as they are, because this CPU has bfloat16"
        " instructions; in float32 where JAX maps or differentiates a product."
    ),
    SHARED: (
        "bfloat16 operands are multiplied as they are, because there are several CPU"
        " devices: an operand that is cast is gathered for each product again. This CPU"
        " has no bfloat16 instructions: on one device they are multiplied in float32."
    ),
    WIDENED: (
        "bfloat16 operands are multiplied in float32, because this CPU has no bfloat16"
        " instructions."
    ),
}


@functools.cache
def bfloat16_form():
    """How bfloat16 operands are multiplied in this process: a key of ``REASONS``."""
    if _has_bfloat16_instructions():
        return NATIVE
    return WIDENED if has_one_device() else SHARED


def has_one_device():
    """Whether no program is split over CPUs, of this process or of others."""
    return jax.device_count("cpu") == 1


def _has_bfloat16_instructions():
    """Whether XLA compiles for a CPU with AVX-512 BF16 or AMX: False if it can't say.

    XLA stores the features of its target machine, which ``XLA_FLAGS`` may restrict,
    with every compiled program.
    """
    cpu = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    scalar = jax.ShapeDtypeStruct((), "float32", sharding=cpu)
    # In a thread of its own, where no mesh is set: the caller's may have other devices.
    with ThreadPoolExecutor(max_workers=1) as thread:
        compiled = thread.submit(
            lambda: jax.jit(lambda x: x).lower(scalar).compile()
        ).result()
    try:
        program, *_ = serialize_executable.serialize(compiled)
    except (RuntimeError, ValueError):
        return False
    return re.search(rb"\+(avx512bf16|amx-bf16)\b", program) is not None


def cpu_form(a, b, contracted_axes, product, sharding):
    """A function of ``a`` and ``b`` that multiplies them on a CPU, or None.

    It returns what ``lax.dot_general`` does, in the dtype of the accumulator. None is
    ``lax.dot_general`` itself.
    """
    if 0 in a.shape or 0 in b.shape:
        return None
    dtype, precision = a.dtype, product.precision
    if precision in _ALGORITHMS:
        dtype, precision = jnp.dtype(_ALGORITHMS[precision]), None
    elif is_algorithm(precision):
        return None
    if dtype != accumulator(dtype):
        form = _low_form(a, b, dtype, contracted_axes, precision, sharding)
        return lambda a, b: form(a.astype(dtype), b.astype(dtype))
    if sharding is not None or not _is_long_sum_of_one_row(a, b, contracted_axes):
        return None

    def plain(a, b):
        return _dot(a, b, contracted_axes, precision, sharding)

    return _where_alone(partial(_sum_in_blocks, precision=precision), plain)


def _low_form(a, b, dtype, contracted_axes, precision, sharding):
    """The form of a product of operands of ``dtype``, float16 or bfloat16."""
    options = contracted_axes, precision, sharding
    is_transposed = a.ndim - 1 not in contracted_axes[0]  # Gᵀ X

    def widened(a, b):
        wide, axes = accumulator(dtype), contracted_axes
        if is_transposed and sharding is None and _is_better_flat(a, b):
            a, b, axes = _rows(a), _rows(b), ((0,), (0,))
        a, b = a.astype(wide), b.astype(wide)
        if dtype == "bfloat16" and contracted_axes[1] == (1,):  # X Wᵀ
            a, b = _kept_rounded(a), _kept_rounded(b)
        return _dot(a, b, axes, precision, sharding)

    # Only bfloat16 has a native path, and at one row memory is the limit.
    if dtype != "bfloat16" or _is_one_row(a) or bfloat16_form() == WIDENED:
        return widened
    is_copied = is_transposed and bfloat16_form() == NATIVE
    if is_copied and sharding is None and _is_cheaper_swapped(a, b):
        swapped = _low_form(b, a, dtype, *options)
        return lambda a, b: swapped(b, a).T
    is_gathered = not is_transposed and _has_gathered_rows(a, sharding)

    def fenced(a, b):
        """A product of bfloat16 operands with a float32 result.

        With bfloat16 instructions it is two to four times as fast as one with a
        bfloat16 result or float32 operands. But it fails when it runs ("Unsupported
        element type for DotThunk") where XLA has folded a transpose into the result or
        into the first operand; the barriers keep them out. `jax.vmap` over one operand
        puts one inside.

        The second operand stays as it comes, and so does the first where it is about
        to be gathered, which keeps transposes out as well: behind a barrier, the
        gathered copy would not be shared with the other products of the layer.
        """
        a = a if is_gathered else lax.optimization_barrier(a)
        dot = _transposed_dot if is_copied else _dot
        return lax.optimization_barrier(dot(a, b, *options))

    return _where_alone(fenced, widened)


def _kept_rounded(operand):
    """A float32 operand that was cast from bfloat16, in no more bits than that.

    XLA may drop the cast of an activation to bfloat16 before one to float32, and does
    where the product has no gradient: training and evaluation would differ. It is part
    of the cast, at no cost. In one kernel of YNNPACK with several casts and ReLUs
    (JAX 0.12.0.1) a constant is not initialized; this ends the kernel before that.
    """
    return lax.reduce_precision(operand, exponent_bits=8, mantissa_bits=7)


def _dot(a, b, contracted_axes, precision, sharding):
    return lax.dot_general(
        a,
        b,
        (contracted_axes, ((), ())),
        precision=precision,
        preferred_element_type=accumulator(a.dtype),
        out_sharding=sharding,
    )


def _transposed_dot(G, X, leading_axes, precision, sharding):
    """Gᵀ X, with a copy of G in which the contracted axes are the last ones.

    XLA makes the copy, without which it leaves its fast path, where G has another axis,
    here of length one. X stays as it comes, so that the forward product shares its
    gathered copy.
    """
    if sharding is not None:
        spec = sharding.spec
        spec = P(None, *spec.partitions, unreduced=spec.unreduced, reduced=spec.reduced)
        sharding = NamedSharding(sharding.mesh, spec)
    return _dot(jnp.expand_dims(G, -2), X, leading_axes, precision, sharding)[0]


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
    """Whether one leading axis is faster than several, where there is one device.

    With several XLA copies G for Gᵀ X, and has another float32 copy for G W.
    """
    if _is_symbolic(G, X):
        return False
    return G.ndim > 2 and G.size > X.size and has_one_device()


def _is_symbolic(a, b):
    """Whether a size is not known yet, as in a program that is exported for any."""
    return any(map(export.is_symbolic_dim, a.shape + b.shape))


def _rows(a):
    return a.reshape(-1, a.shape[-1])


def _is_one_row(a):
    return all(length == 1 for length in a.shape[:-1])


_BLOCKS = 32


def _is_long_sum_of_one_row(a, b, contracted_axes):
    """Whether the product is G W at one row, with as many rows of W in each block."""
    is_input_gradient = contracted_axes == ((a.ndim - 1,), (0,))
    return is_input_gradient and _is_one_row(a) and b.shape[0] % _BLOCKS == 0


def _sum_in_blocks(G, W, precision):
    """G W at one row: as fast as the plain product, and several times as accurate.

    The plain one adds up the rows of W one after the other.
    """
    sums = lax.dot_general(
        G.reshape(_BLOCKS, -1),
        W.reshape(_BLOCKS, -1, W.shape[1]),
        (((1,), (1,)), ((0,), (0,))),
        precision=precision,
    )
    return jnp.sum(sums, 0).reshape(*G.shape[:-1], W.shape[1])


def _where_alone(form, general):
    """``form``, and ``general`` where JAX maps or differentiates it."""
    alone = custom_vmap(form)

    @alone.def_vmap
    def _(axis_size, is_batched, a, b):
        axes = [0 if batched else None for batched in is_batched]
        return jax.vmap(general, axes)(a, b), True

    differentiable = jax.custom_jvp(alone)

    @differentiable.defjvp
    def _(primals, tangents):
        # The primal is mapped as it is without tangents: JAX expects the same axis.
        return differentiable(*primals), jax.jvp(general, primals, tangents)[1]

    return differentiable
