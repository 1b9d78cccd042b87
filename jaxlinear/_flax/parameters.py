"""The parameters of a module: what they start from, and where they are created."""

import dataclasses
import functools
import io
import math
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxlinear._flax.checks import Placement
from jaxlinear._flax.layout import axis_counts, kernel_to_weight


class Drawing(NamedTuple):
    """How the parameters of a layer are drawn from a key, and where.

    Attributes:
      kernel_init: draws the kernel, as a matrix (in, out). None draws as PyTorch does.
      bias_init: draws the bias, as a vector (out,). None draws as PyTorch does.
      in_shape: sizes of the axes of the input.
      out_shape: sizes of the axes of the output.
      dtype: dtype of the parameters.
      device: where the weight is created, or None.
    """

    kernel_init: nn.initializers.Initializer | None
    bias_init: nn.initializers.Initializer | None
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: DTypeLike
    device: Placement | None

    def weight(self, key) -> Any:
        """The weight (*out, *in)."""
        return _placed(_weight, key, self, self.device)

    def bias(self, key) -> Any:
        """The bias (*out,), sharded as the same axes of the weight."""
        device = self.device
        if isinstance(device, NamedSharding):
            spec = PartitionSpec(*device.spec[: len(self.out_shape)])
            device = device.update(spec=spec)
        return _placed(_bias, key, self, device)


def _placed(draw, key, drawing, device):
    if device is None:
        return draw(key, drawing)
    is_one = isinstance(device, jax.Device)
    sharding = SingleDeviceSharding(device) if is_one else device
    # Every device computes its own shard, so none ever holds more.
    return jax.jit(draw, static_argnums=1, out_shardings=sharding)(key, drawing)


def _weight(key, drawing):
    in_shape, out_shape = drawing.in_shape, drawing.out_shape
    matrix = math.prod(in_shape), math.prod(out_shape)
    init = uniform(matrix[0]) if drawing.kernel_init is None else drawing.kernel_init
    drawn = init(key, matrix, drawing.dtype)
    if isinstance(drawn, nn.meta.AxisMetadata) and not isinstance(
        drawn, nn.Partitioned
    ):
        # The names of its axes could not be moved with them.
        raise TypeError(
            "`kernel_init` must return an array or a flax.linen.Partitioned, got"
            f" {type(drawn).__name__}"
        )
    kernel = _reshaped("kernel_init", drawn, matrix, (*in_shape, *out_shape))
    weight = kernel_to_weight(kernel, axis_counts(in_shape, out_shape))
    return _checked_placeable(weight, drawing.device)


def _bias(key, drawing):
    vector = (math.prod(drawing.out_shape),)
    in_features = math.prod(drawing.in_shape)
    init = uniform(in_features) if drawing.bias_init is None else drawing.bias_init
    drawn = init(key, vector, drawing.dtype)
    bias = _reshaped("bias_init", drawn, vector, drawing.out_shape)
    return _checked_placeable(bias, drawing.device)


def _checked_placeable(parameter, device):
    """Refuse a box that cannot be split over devices with what is inside."""
    for leaf in jax.tree.leaves(parameter):
        if device is not None and not isinstance(leaf, jax.Array):
            raise TypeError(
                "an initializer must return an array where `device` is given, got"
                f" {type(leaf).__name__}: name the axes in `kernel_metadata` and"
                " `bias_metadata`"
            )
    return parameter


def _reshaped(name, drawn, shape, new_shape):
    """What an initializer has drawn, which may be in a box with names of its axes."""
    if isinstance(drawn, nnx.VariableMetadata):
        value = _reshaped(name, drawn.raw_value, shape, new_shape)
        return dataclasses.replace(drawn, raw_value=value)
    if isinstance(drawn, nn.Partitioned):
        # Not by its `unbox`, which would shard the matrix by the names of all axes.
        return drawn.replace(value=_reshaped(name, drawn.value, shape, new_shape))
    if isinstance(drawn, nn.meta.AxisMetadata):
        return drawn.replace_boxed(_reshaped(name, nn.unbox(drawn), shape, new_shape))
    required = f"`{name}` must return an array of shape {shape}"
    drawn_shape = getattr(drawn, "shape", None)
    if drawn_shape is None:
        raise TypeError(
            f"{required}, got {type(drawn).__name__}. If it makes initializers, call it"
        )
    if drawn_shape != shape:
        raise ValueError(f"{required}, got shape {drawn_shape}")
    return drawn.reshape(new_shape)


@functools.cache  # One function object per size: `jax.jit` compiles each once.
def uniform(in_features):
    """An initializer that draws from U(-√k, √k), k = 1/in_features.

    Every value lies inside the bound in every dtype. The two parts of a complex value
    are drawn from U(-√(k/2), √(k/2)): its modulus is at most √k and its variance k/3,
    as for a real one. With no input features the bound is zero.
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
    # Drawn in float16 or bfloat16, a value can round beyond the bound, and few distinct
    # values are near zero. So draw in float32, and clip at the largest value of the
    # dtype that is inside.
    drawn = jax.dtypes.canonicalize_dtype(dtype)
    limit = np.asarray(bound, drawn)
    if float(limit) > bound:
        limit = np.nextafter(limit, np.zeros((), drawn))
    if bound and not limit:
        raise ValueError(
            f"`param_dtype` must have values inside ±{bound:.2g} other than zero, got"
            f" {limit.dtype}"
        )
    if jnp.finfo(drawn).bits < 32:
        drawn = jnp.float32
    values = jax.random.uniform(key, shape, drawn, -bound, bound)
    return jnp.clip(values, -float(limit), float(limit)).astype(dtype)


# No device of JAX's can be pickled: its platform and number are.


def pickled_placement(device):
    """A device, a sharding or None, in bytes that ``pickle.loads`` can read."""
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
