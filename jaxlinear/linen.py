"""The linear layer for Flax Linen."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxlinear._checks import (
    Placement,
    check_input,
    check_shapes,
    checked_array,
    checked_backward_dtype,
    checked_dtype,
    checked_features,
    checked_optional_dtype,
    checked_sharding,
)
from jaxlinear._init import bias_sharding, placed, uniform
from jaxlinear._linear import linear
from jaxlinear._precision import Precision, checked_precision


class Linear(nn.Module):
    """Y = X Wᵀ + B over the last axis, with the derivative of :func:`jaxlinear.linear`.

    The parameters have PyTorch's names and layout, ``weight`` (out_features,
    in_features) and ``bias`` (out_features,), where in_features is read from the input.
    Both start from U(-√k, √k) with k = 1/in_features.

    Attributes:
      out_features: size of the last axis of the output.
      use_bias: whether there is a bias.
      dtype: dtype of the computation and of the output. Default: the promoted dtype of
        the input and the parameters.
      param_dtype: dtype of the parameters.
      weight_init: initializer of the weight, ``init(key, shape, dtype)``; wrap it in
        ``nn.with_partitioning`` to name the weight's axes.
      bias_init: initializer of the bias.
      device: a ``jax.Device`` or a ``jax.sharding.Sharding`` where the parameters are
        created. It shards the weight; the bias is sharded as the weight's first axis.
      precision: precision of the three products, as in :func:`jaxlinear.linear`.
      backward_dtype: dtype of the backward products, as in :func:`jaxlinear.linear`.
      reduce_dtype: dtype in which partial sums are added across devices, as in
        :func:`jaxlinear.linear`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlinear.linen import Linear
      >>> params = Linear(2).init(jax.random.key(0), jnp.ones((8, 3)))
      >>> jax.tree.map(jnp.shape, params)
      {'params': {'bias': (2,), 'weight': (2, 3)}}
    """

    out_features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    weight_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer | None = None
    device: Placement | None = None
    precision: lax.PrecisionLike | Precision = None
    backward_dtype: DTypeLike | None = None
    reduce_dtype: DTypeLike | None = None

    @nn.compact
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
          ValueError: if ``x`` is a scalar, ``out_features`` is negative, or
            ``precision`` is unknown.
          TypeError: if ``x`` is no array, ``out_features`` no integer, a dtype neither
            floating nor complex, or ``device`` neither a device nor a sharding.
        """
        x = checked_array("x", x)
        check_input(x)
        weight = nn.unbox(self.get_variable("params", "weight"))
        if weight is not None:
            # Flax would refuse another number of features without naming `x`.
            check_shapes(x, weight, bias=None)
        in_features = x.shape[-1]
        out_features = checked_features("out_features", self.out_features)
        dtype = checked_optional_dtype("dtype", self.dtype)
        checked_precision(self.precision)
        checked_backward_dtype(self.backward_dtype, dtype)
        reduce_dtype = checked_optional_dtype("reduce_dtype", self.reduce_dtype)
        param_dtype = checked_dtype("param_dtype", self.param_dtype)
        sharding = checked_sharding("device", self.device)

        init = placed(self.weight_init or uniform(in_features), sharding)
        weight = self.param("weight", init, (out_features, in_features), param_dtype)
        bias = None
        if self.use_bias:
            init = placed(
                self.bias_init or uniform(in_features), bias_sharding(sharding)
            )
            bias = self.param("bias", init, (out_features,), param_dtype)
        return linear(
            x,
            weight,
            bias,
            dtype=dtype,
            precision=self.precision,
            backward_dtype=self.backward_dtype,
            reduce_dtype=reduce_dtype,
            out_sharding=out_sharding,
        )
