"""Products of low precision in the form that XLA's CPU backend computes fastest.

``python -m benchmarks --device cpu`` measures what each choice gains, and
tests/test_random_programs.py that none of them fails. In float32 no form was found
that is faster than the plain one at every shape.
"""

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlinear._types import accumulator

# Algorithms of low precision that JAX lowers for CPU, and the dtype of their operands.
_ALGORITHMS = {
    lax.DotAlgorithmPreset.BF16_BF16_F32: "bfloat16",
    lax.DotAlgorithmPreset.F16_F16_F16: "float16",
}


def has_form_on_cpu(dtype, precision):
    """Whether the product of operands in ``dtype`` has a form of its own here."""
    if isinstance(precision, lax.DotAlgorithmPreset | lax.DotAlgorithm):
        return precision in _ALGORITHMS
    return dtype != accumulator(dtype)


def cpu_product(a, b, contracted_axes, precision, sharding):
    """``lax.dot_general`` of operands of one dtype, in the dtype of its accumulator."""
    if precision in _ALGORITHMS:
        dtype = _ALGORITHMS[precision]
        a, b, precision = a.astype(dtype), b.astype(dtype), None
    options = contracted_axes, precision, sharding
    # Only bfloat16 has a native path, and at one row memory is the limit.
    if a.dtype != "bfloat16" or all(length == 1 for length in a.shape[:-1]):
        return _widened(_dot)(a, b, *options)
    is_transposed = a.ndim - 1 not in contracted_axes[0]  # Gᵀ X
    if is_transposed and sharding is None and _is_cheaper_swapped(a, b):
        return cpu_product(b, a, *options).T

    def product(a, b):
        return (_transposed_dot if is_transposed else _dot)(a, b, *options)

    is_gathered = not is_transposed and _has_gathered_rows(a, sharding)
    return _fenced(product, is_gathered)(a, b)


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
    if any(map(export.is_symbolic_dim, G.shape + X.shape)):
        return False
    return G.size > X.size + G.shape[-1] * X.shape[-1]


def _widened(product):
    """``product`` of operands that are cast to its accumulator."""

    def widened(a, b, *options):
        wide = accumulator(a.dtype)
        return product(a.astype(wide), b.astype(wide), *options)

    return widened


def _fenced(product, is_gathered):
    """``product`` of bfloat16 operands with a float32 result, which cannot fail.

    It is two to four times as fast as one with a bfloat16 result or float32 operands.
    But it fails when it runs ("Unsupported element type for DotThunk") where XLA has
    folded a transpose into the result or into the first operand; the barriers keep them
    out. `jax.vmap` over one operand puts one inside. There, and where JAX
    differentiates the product, the operands are widened: slower, and never fails.

    The second operand stays as it comes, and so does the first where it is about to be
    gathered, which keeps transposes out as well: behind a barrier, the gathered copy
    would not be shared with the other products of the layer.
    """
    widened = _widened(product)

    @custom_vmap
    def fenced(a, b):
        a = a if is_gathered else lax.optimization_barrier(a)
        return lax.optimization_barrier(product(a, b))

    @fenced.def_vmap
    def _(axis_size, is_batched, a, b):
        axes = [0 if batched else None for batched in is_batched]
        return jax.vmap(widened, axes)(a, b), True

    differentiable = jax.custom_jvp(fenced)

    @differentiable.defjvp
    def _(primals, tangents):
        return jax.jvp(widened, primals, tangents)

    return differentiable
