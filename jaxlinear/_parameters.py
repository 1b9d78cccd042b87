"""The parameters of a module: what they start from, and where they are created."""

import dataclasses
import functools
import io
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear._arguments import (
    check_bound,
    check_names_are_known,
    check_placeable,
    checked_drawn,
)
from jaxlinear._kernels import axes_of, weight_of


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


# Where a parameter is created.


def pickled_placement(device):
    """A device or a sharding, or None, in bytes that ``pickle`` can read."""
    stream = io.BytesIO()
    _Pickler(stream).dump(device)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj):
        if isinstance(obj, jax.Device):
            return _device, (obj.platform, obj.id)
        return NotImplemented


def _device(platform, number):
    for device in jax.devices(platform):
        if device.id == number:
            return device
    raise ValueError(f"`device` must be there, got {platform} {number} of a pickle")


# A parameter is created by the initializer of a module, None for PyTorch's, from the
# sizes of the axes of the input and of the output.


def created_weight(init, key, in_shape, out_shape, dtype, sharding):
    """The weight (*out, *in) of a kernel that ``init`` draws as a matrix (in, out)."""
    return _created(_weight, init, key, in_shape, out_shape, dtype, sharding)


def created_bias(init, key, in_shape, out_shape, dtype, sharding):
    """The bias (*out,), which ``init`` draws as a vector.

    It is sharded as the first axes of the weight, which it shares.
    """
    if isinstance(sharding, NamedSharding):
        spec = PartitionSpec(*sharding.spec[: len(out_shape)])
        sharding = sharding.update(spec=spec)
    return _created(_bias, init, key, in_shape, out_shape, dtype, sharding)


def _created(draw, init, key, in_shape, out_shape, dtype, sharding):
    init = uniform(math.prod(in_shape)) if init is None else init
    if sharding is None:
        return draw(key, init, in_shape, out_shape, dtype)
    # Every device computes its own shard: none ever holds more.
    place = jax.jit(_placed, static_argnums=range(1, 6), out_shardings=sharding)
    return place(key, draw, init, in_shape, out_shape, dtype)


def _placed(key, draw, *arguments):
    parameter = draw(key, *arguments)
    check_placeable(parameter)
    return parameter


def _weight(key, init, in_shape, out_shape, dtype):
    matrix = math.prod(in_shape), math.prod(out_shape)
    drawn = init(key, matrix, dtype)
    check_names_are_known(drawn)
    kernel = _reshaped("kernel_init", drawn, matrix, (*in_shape, *out_shape))
    return weight_of(kernel, axes_of(in_shape, out_shape))


def _bias(key, init, in_shape, out_shape, dtype):
    vector = (math.prod(out_shape),)
    return _reshaped("bias_init", init(key, vector, dtype), vector, out_shape)


def _reshaped(name, drawn, expected, shape):
    """What an initializer has drawn, which may be in a box with names of its axes."""
    if isinstance(drawn, nnx.VariableMetadata):
        value = _reshaped(name, drawn.raw_value, expected, shape)
        return dataclasses.replace(drawn, raw_value=value)
    if isinstance(drawn, nn.Partitioned):
        # Not by its `unbox`, which would shard the matrix by the names of all axes.
        return drawn.replace(value=_reshaped(name, drawn.value, expected, shape))
    if isinstance(drawn, nn.meta.AxisMetadata):
        return drawn.replace_boxed(_reshaped(name, nn.unbox(drawn), expected, shape))
    return checked_drawn(name, drawn, expected).reshape(shape)
