"""The linear layer for Flax NNX."""

import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxlinear._checks import (
    Placement,
    checked_backward_dtype,
    checked_dtype,
    checked_features,
    checked_optional_dtype,
    checked_sharding,
)
from jaxlinear._init import bias_sharding, placed, uniform
from jaxlinear._linear import linear
from jaxlinear._precision import Precision, checked_precision


class Linear(nnx.Module):
    """Y = X Wᵀ + B over the last axis, with the derivative of :func:`jaxlinear.linear`.

    The parameters have PyTorch's names and layout, ``weight`` (out_features,
    in_features) and ``bias`` (out_features,), so that a PyTorch state dict loads as it
    is. Both start from U(-√k, √k) with k = 1/in_features.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      use_bias: whether there is a bias.
      dtype: dtype of the computation and of the output. Default: the promoted dtype of
        the input and the parameters.
      param_dtype: dtype of the parameters.
      precision: precision of the three products, as in :func:`jaxlinear.linear`.
      backward_dtype: dtype of the backward products, as in :func:`jaxlinear.linear`.
      reduce_dtype: dtype in which partial sums are added across devices, as in
        :func:`jaxlinear.linear`.
      weight_init: initializer of the weight, ``init(key, shape, dtype)``.
      bias_init: initializer of the bias.
      device: a ``jax.Device`` or a ``jax.sharding.Sharding`` where the parameters are
        created. It shards the weight; the bias is sharded as the weight's first axis.
        Name the axes in the metadata then, not by ``nnx.with_partitioning``.
      rngs: random number generators; the stream ``params`` draws the parameters.
      weight_metadata: metadata of the weight's ``nnx.Param``, such as ``out_sharding``.
      bias_metadata: metadata of the bias's ``nnx.Param``.

    Raises:
      ValueError: if a number of features is negative, or ``precision`` is unknown.
      TypeError: if a number of features is no integer, a dtype is neither floating nor
        complex, or ``device`` is neither a device nor a sharding.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxlinear.nnx import Linear
      >>> layer = Linear(3, 2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 3))).shape
      (8, 2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike | Precision = None,
        backward_dtype: DTypeLike | None = None,
        reduce_dtype: DTypeLike | None = None,
        weight_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        device: Placement | None = None,
        rngs: nnx.Rngs,
        weight_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        self.in_features = checked_features("in_features", in_features)
        self.out_features = checked_features("out_features", out_features)
        self.use_bias = use_bias
        self.dtype = checked_optional_dtype("dtype", dtype)
        checked_precision(precision)
        self.precision = precision
        checked_backward_dtype(backward_dtype, self.dtype)
        self.backward_dtype = backward_dtype
        self.reduce_dtype = checked_optional_dtype("reduce_dtype", reduce_dtype)
        self.param_dtype = checked_dtype("param_dtype", param_dtype)
        sharding = checked_sharding("device", device)

        init = placed(weight_init or uniform(in_features), sharding)
        weight = init(
            rngs.params(), (self.out_features, self.in_features), self.param_dtype
        )
        self.weight = nnx.Param(weight, **weight_metadata)
        self.bias: nnx.Param[jax.Array] | None = nnx.data(None)
        if use_bias:
            init = placed(bias_init or uniform(in_features), bias_sharding(sharding))
            bias = init(rngs.params(), (self.out_features,), self.param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)

    def __call__(
        self, x: ArrayLike, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> jax.Array:
        """X Wᵀ + B.

        Args:
          x: input (*, in_features).
          out_sharding: as in :func:`jaxlinear.linear`.

        Returns:
          Y (*, out_features).

        Raises:
          ValueError: if ``x`` is a scalar or its last axis is not in_features.
        """
        bias = None if self.bias is None else self.bias[...]
        return linear(
            x,
            self.weight[...],
            bias,
            dtype=self.dtype,
            precision=self.precision,
            backward_dtype=self.backward_dtype,
            reduce_dtype=self.reduce_dtype,
            out_sharding=out_sharding,
        )
