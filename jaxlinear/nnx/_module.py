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

from jaxlinear._checks import ArrayLike
from jaxlinear._flax.checks import (
    Integers,
    Placement,
    as_tuple,
    check_is_matrix,
    keep_checked,
    refuse_kernel,
    refuse_others,
)
from jaxlinear._flax.layout import axis_counts, weight_metadata
from jaxlinear._flax.parameters import Drawing
from jaxlinear._flax.several_axes import linear_over_axes
from jaxlinear._loss.functions import (
    LogLikelihood,
    Reduction,
    linear_cross_entropy,
    linear_log_likelihood,
)
from jaxlinear._product import Precision, Products


class Linear(nnx.Module):
    """Y = X Wᵀ + B over the last axis, with the derivative of :func:`jaxlinear.linear`.

    It takes the arguments of ``flax.nnx.Linear``, with the same meaning: initializers
    and metadata refer to a kernel (in, out). The parameters have PyTorch's names and
    layout, ``weight`` (out_features, in_features) and ``bias`` (out_features,), so that
    a PyTorch state dict loads as it is. Code that looks for a parameter ``kernel`` must
    look for ``weight`` instead: ``nnx.WeightNorm(layer, feature_axes=0,
    variable_filter=nnx.PathContains("weight"))``, or ``"weight"`` in the mask of an
    optimizer.

    With a tuple of features it is ``flax.nnx.LinearGeneral``, for the projections of an
    attention: ``Linear(64, (8, 8), ...)`` maps ``(*, 64)`` to ``(*, 8, 8)``, and
    ``Linear((8, 8), 64, axis=(-2, -1), ...)`` back. The weight is (*out_features,
    *in_features); it is multiplied as a matrix, without a copy.

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
      products: overrides for single products, as in :func:`jaxlinear.linear`.
      kernel_init: initializer ``init(key, shape, dtype)`` that draws the transposed
        weight (in_features, out_features), as a matrix where there are several axes.
        Default: U(-√k, √k), k = 1/in_features, as in PyTorch.
      bias_init: initializer of the bias. Default: the same distribution.
      device: a ``jax.Device`` or a ``jax.sharding.Sharding`` where the parameters are
        created. A sharding is that of the weight (out, in); the bias is sharded as the
        weight's output axes. Name the axes in the metadata then, not by
        ``nnx.with_partitioning``.
      rngs: random number generators; the stream ``params`` draws the parameters.
      kernel_metadata: metadata of the weight's ``nnx.Param``. An ``out_sharding`` names
        the axes (in, out); it is kept in the order of the weight (out, in).
      bias_metadata: metadata of the bias's ``nnx.Param``.

    Raises:
      ValueError: if a number of features is negative, ``axis`` has another length than
        ``in_features``, a precision is unknown, or an initializer returns another
        shape.
      TypeError: if a number of features or an axis is not an integer, a dtype is
        neither floating nor complex, ``device`` is neither a device nor a sharding, an
        initializer cannot be called, or an argument of Flax's does not exist here
        (``dot_general``, ``promote_dtype``, ``preferred_element_type``,
        ``batch_axis``).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxlinear.nnx import Linear
      >>> layer = Linear(3, 2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 3))).shape
      (8, 2)
    """

    in_features: int | tuple[int, ...]
    out_features: int | tuple[int, ...]
    axis: int | tuple[int, ...]
    use_bias: bool
    dtype: np.dtype[Any] | None
    param_dtype: np.dtype[Any]
    precision: lax.PrecisionLike
    products: Products
    weight: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array] | None

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
        keep_checked(
            self,
            in_features=in_features,
            out_features=out_features,
            axis=axis,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            products=products,
            kernel_init=kernel_init,
            bias_init=bias_init,
            device=device,
        )
        shapes = as_tuple(self.in_features), as_tuple(self.out_features)
        if len(as_tuple(self.axis)) != len(shapes[0]):
            raise ValueError(
                "`axis` must have as many axes as `in_features`, got"
                f" {self.axis!r} and {self.in_features!r}"
            )
        self.use_bias = use_bias
        drawing = Drawing(kernel_init, bias_init, *shapes, self.param_dtype, device)
        metadata = weight_metadata(kernel_metadata, axis_counts(*shapes))
        self.weight = nnx.Param(drawing.weight(rngs.params()), **metadata)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(drawing.bias(rngs.params()), **bias_metadata)

    if not TYPE_CHECKING:  # For a type checker every name would be an attribute.

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
          ValueError: if ``x`` does not have the axes that are contracted, they have
            other sizes than in_features, or the layer is a stack of layers, which is
            called under ``nnx.vmap`` or ``nnx.scan``.
        """
        weight, bias = self._parameters()
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

    def cross_entropy(
        self,
        h: ArrayLike,
        labels: ArrayLike,
        *,
        reduction: Reduction = "mean",
        weights: ArrayLike | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        soft_cap: float | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> jax.Array:
        """The cross-entropy of this layer, without its logits.

        It is that of :func:`jaxlinear.linear_cross_entropy` of the layer's parameters,
        dtype, precision and products. A head that is tied to an embedding is not a
        layer: pass its table to the function.

        Its arguments, result and errors are those of the function. A layer with several
        input or output axes raises a ``ValueError``, and so do products with 8 bits or
        a ``preferred_element_type``.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from jaxlinear import linear_cross_entropy
          >>> from jaxlinear.nnx import Linear
          >>> rngs = nnx.Rngs(0)
          >>> embed, head = nnx.Embed(4, 3, rngs=rngs), Linear(3, 4, rngs=rngs)
          >>> tokens = jnp.array([0, 3, 1, 2])
          >>> h, labels = embed(tokens[:-1]), tokens[1:]
          >>> head.cross_entropy(h, labels, reduction="none").shape
          (3,)
          >>> linear_cross_entropy(h, embed.embedding, labels).shape  # Tied.
          ()
        """
        weight, bias = self._matrix()
        return linear_cross_entropy(
            h,
            weight,
            labels,
            bias,
            reduction=reduction,
            weights=weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            soft_cap=soft_cap,
            dtype=self.dtype,
            precision=self.precision,
            products=self.products,
            axis_name=axis_name,
        )

    def log_likelihood(
        self,
        h: ArrayLike,
        labels: ArrayLike,
        *,
        soft_cap: float | None = None,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> LogLikelihood:
        """:func:`jaxlinear.linear_log_likelihood` of the layer's parameters.

        The arguments are those of ``cross_entropy``.
        """
        weight, bias = self._matrix()
        return linear_log_likelihood(
            h,
            weight,
            labels,
            bias,
            soft_cap=soft_cap,
            dtype=self.dtype,
            precision=self.precision,
            products=self.products,
            axis_name=axis_name,
        )

    def _matrix(self):
        """The parameters for a loss, which has one axis of classes."""
        check_is_matrix(
            self.axis, in_features=self.in_features, out_features=self.out_features
        )
        return self._parameters()

    def _parameters(self):
        weight = self.weight[...]
        bias = None if self.bias is None else self.bias[...]
        _check_unstacked(weight, bias, axis_counts(self.in_features, self.out_features))
        return weight, bias


def _check_unstacked(weight, bias, counts):
    """Refuse parameters with other axes than the layer's, such as a stack of layers.

    Further axes would be taken for further axes of the input or the output.
    """
    shape = weight.shape
    if len(shape) != sum(counts):
        raise ValueError(
            f"`weight` must have {sum(counts)} axes, (*out_features, *in_features), got"
            f" shape {shape}: a stack of layers is called under `nnx.vmap` or"
            " `nnx.scan`"
        )
    out_shape = shape[: counts.outputs]
    if bias is not None and bias.shape != out_shape:
        raise ValueError(
            f"`bias` must have shape {out_shape}, as the output axes of `weight` of"
            f" shape {shape}, got shape {bias.shape}"
        )
