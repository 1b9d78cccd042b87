"""The linear layer for Flax NNX."""

import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxlinear._arguments import (
    ArrayLike,
    Integers,
    Placement,
    as_tuple,
    check_axis_matches,
    check_initializer,
    check_unstacked,
    checked_axis,
    checked_features,
    checked_optional_dtype,
    checked_param_dtype,
    checked_precision,
    checked_products,
    checked_sharding,
    refuse_kernel,
    refuse_others,
)
from jaxlinear._axes import linear_over_axes
from jaxlinear._kernels import axes_of, weight_metadata
from jaxlinear._parameters import created_bias, created_weight
from jaxlinear._product import Precision, Products


class Linear(nnx.Module):
    """Y = X Wᵀ + B over the last axis, with the derivative of :func:`jaxlinear.linear`.

    It takes the arguments of ``flax.nnx.Linear``, with the same meaning: initializers
    and metadata speak of a kernel (in, out). The parameters have PyTorch's names and
    layout, ``weight`` (out_features, in_features) and ``bias`` (out_features,), so that
    a PyTorch state dict loads as it is. What looks for a parameter called ``kernel``
    must be told of ``weight``: ``nnx.WeightNorm(layer, feature_axes=0,
    variable_filter=nnx.PathContains("weight"))``, or ``"weight"`` in the mask of an
    optimizer.

    With a tuple of features it is ``flax.nnx.LinearGeneral``, as in the projections of
    an attention: ``Linear(64, (8, 8), ...)`` maps ``(*, 64)`` to ``(*, 8, 8)``, and
    ``Linear((8, 8), 64, axis=(-2, -1), ...)`` back. The weight is (*out_features,
    *in_features), which is multiplied as the matrix that it is in memory.

    Args:
      in_features: size of the last axis of the input, or of each of its axes ``axis``.
      out_features: size of the last axis of the output, or of each of its last axes.
      axis: axes of the input that are contracted, as many as ``in_features``. They are
        taken in ascending order, as in Flax.
      use_bias: whether there is a bias.
      dtype: dtype of the computation and of the output. Default: the promoted dtype of
        the input and the parameters.
      param_dtype: dtype of the parameters.
      precision: precision of the three products, as in :func:`jaxlinear.linear`.
      products: what one product has for itself, as in :func:`jaxlinear.linear`.
      kernel_init: initializer ``init(key, shape, dtype)`` that draws the transposed
        weight (in_features, out_features), as a matrix where there are several axes.
        Default: U(-√k, √k), k = 1/in_features, as in PyTorch.
      bias_init: initializer of the bias. Default: the same distribution.
      device: a ``jax.Device`` or a ``jax.sharding.Sharding`` where the parameters are
        created. It shards the weight (out, in); the bias is sharded as the weight's
        output axes. Name the axes in the metadata then, not by
        ``nnx.with_partitioning``.
      rngs: random number generators; the stream ``params`` draws the parameters.
      kernel_metadata: metadata of the weight's ``nnx.Param``. An ``out_sharding`` names
        the axes (in, out), and is kept as that of the weight's (out, in).
      bias_metadata: metadata of the bias's ``nnx.Param``.

    Raises:
      ValueError: if a number of features is negative, ``axis`` has another length than
        ``in_features``, a precision is unknown, or an initializer returns another
        shape.
      TypeError: if a number of features or an axis is no integer, a dtype is neither
        floating nor complex, ``device`` is neither a device nor a sharding, an
        initializer cannot be called, or an argument is one of Flax's that has no place
        here (``dot_general``, ``promote_dtype``, ``preferred_element_type``,
        ``batch_axis``).

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
        in_features: Integers,
        out_features: Integers,
        *,
        axis: Integers = -1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        products: Products | None = None,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        device: Placement | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        **others: Any,
    ):
        refuse_others(others)
        self.in_features: int | tuple[int, ...] = checked_features(
            "in_features", in_features
        )
        self.out_features: int | tuple[int, ...] = checked_features(
            "out_features", out_features
        )
        self.axis: int | tuple[int, ...] = checked_axis(axis)
        check_axis_matches(self.axis, self.in_features)
        self.use_bias: bool = use_bias
        self.dtype: np.dtype[Any] | None = checked_optional_dtype("dtype", dtype)
        self.param_dtype: np.dtype[Any] = checked_param_dtype(param_dtype)
        self.precision: lax.PrecisionLike = checked_precision("precision", precision)
        self.products: Products = checked_products(products, None, self.dtype)
        check_initializer("kernel_init", kernel_init)
        check_initializer("bias_init", bias_init)
        sharding = checked_sharding("device", device)

        shapes = as_tuple(self.in_features), as_tuple(self.out_features)
        made = *shapes, self.param_dtype, sharding
        weight = created_weight(kernel_init, rngs.params(), *made)
        metadata = weight_metadata(kernel_metadata, axes_of(*shapes))
        self.weight: nnx.Param[jax.Array] = nnx.Param(weight, **metadata)
        self.bias: nnx.Param[jax.Array] | None = nnx.data(None)
        if use_bias:
            bias = created_bias(bias_init, rngs.params(), *made)
            self.bias = nnx.Param(bias, **bias_metadata)

    if not TYPE_CHECKING:  # Else every name would be an attribute.

        def __getattr__(self, name):
            refuse_kernel(self, name)
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}"
            )

        def __setattr__(self, name, value):
            refuse_kernel(self, name)
            super().__setattr__(name, value)

    def __call__(
        self, x: ArrayLike, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> jax.Array:
        """X Wᵀ + B.

        Args:
          x: input (*, in_features), or with the axes ``axis``.
          out_sharding: as in :func:`jaxlinear.linear`.

        Returns:
          Y (*, out_features).

        Raises:
          ValueError: if ``x`` does not have the axes that are contracted, or they have
            other sizes than in_features, or the layer is a stack of layers, which is
            called under ``nnx.vmap`` or ``nnx.scan``.
        """
        weight = self.weight[...]
        bias = None if self.bias is None else self.bias[...]
        check_unstacked(weight, bias, *axes_of(self.in_features, self.out_features))
        return linear_over_axes(
            x,
            weight,
            bias,
            self.axis,
            dtype=self.dtype,
            precision=self.precision,
            products=self.products,
            out_sharding=out_sharding,
        )
