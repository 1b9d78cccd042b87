"""The parameters of a module: what they start from, and where they are created.

Flax's initializers and names speak of a kernel (in, out); the weight is (out, in), as
PyTorch's.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear._arguments import check_bound, check_placeable


@functools.cache  # One function object per size: `jax.jit` compiles each once.
def uniform(in_features):
    """An initializer that draws from U(-√k, √k), k = 1/in_features.

    Every value lies inside the bound in every dtype. A complex value has its two parts
    drawn from U(-√(k/2), √(k/2)): it has the modulus inside √k and the variance k/3,
    like a real one. With no input features the bound is zero.
    """
    bound = math.sqrt(1 / in_features) if in_features else 0.0

    def init(key, shape, dtype=jnp.float32):
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            return _draw(key, shape, jnp.dtype(dtype), bound)
        part = jnp.finfo(dtype).dtype
        keys = jax.random.split(key)
        return lax.complex(*(_draw(k, shape, part, bound / math.sqrt(2)) for k in keys))

    return init


def _draw(key, shape, dtype, bound):
    # A draw in float16 or bfloat16 can round to a value beyond the bound, and has few
    # distinct values near zero: draw in float32, and let nothing round beyond the
    # largest value of the dtype that is inside.
    drawn = jax.dtypes.canonicalize_dtype(dtype)
    limit = np.asarray(bound, drawn)
    if float(limit) > bound:
        limit = np.nextafter(limit, np.zeros((), drawn))
    check_bound(bound, limit)
    if jnp.finfo(drawn).bits < 32:
        drawn = jnp.float32
    values = jax.random.uniform(key, shape, drawn, -bound, bound)
    return jnp.clip(values, -float(limit), float(limit)).astype(dtype)


def swapped_names(spec):
    """The names of the axes of a weight (out, in): those of its kernel, (in, out)."""
    if isinstance(spec, NamedSharding):
        return spec.update(spec=swapped_names(spec.spec))
    if isinstance(spec, PartitionSpec):
        in_axis, out_axis = (*spec.partitions, None, None)[:2]
        left = {"unreduced": spec.unreduced, "reduced": spec.reduced}
        return PartitionSpec(out_axis, in_axis, **left)
    in_axis, out_axis = (*spec, None, None)[:2]
    return out_axis, in_axis


def initializer(chosen, in_features):
    """``chosen``, or PyTorch's where a module was given None."""
    return uniform(in_features) if chosen is None else chosen


def created(init, finish, key, shape, dtype, sharding):
    """``finish`` of what ``init`` draws, created with ``sharding`` where one is given.

    Every device computes its own shard: none ever holds more.
    """
    if sharding is None:
        return finish(init(key, shape, dtype), shape)
    draw = jax.jit(_drawn, static_argnums=(0, 1, 3, 4), out_shardings=sharding)
    return draw(init, finish, key, shape, dtype)


def _drawn(init, finish, key, shape, dtype):
    parameter = finish(init(key, shape, dtype), shape)
    check_placeable(parameter)
    return parameter


def bias_sharding(weight_sharding):
    """The sharding of the bias: that of the weight's first axis, which it shares."""
    if not isinstance(weight_sharding, NamedSharding):
        return weight_sharding
    return weight_sharding.update(spec=PartitionSpec(*weight_sharding.spec[:1]))
