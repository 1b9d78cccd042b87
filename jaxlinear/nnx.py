"""The linear layer for Flax NNX."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

try:
    from flax import nnx
except ModuleNotFoundError as error:
    message = "jaxlinear.nnx needs Flax: pip install 'jaxlinear[flax]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from jaxlinear._arguments import (
    Placement,
    check_initializer,
    checked_drawn,
    checked_features,
    checked_optional_dtype,
    checked_param_dtype,
    checked_precision,
    checked_products,
    checked_sharding,
    refuse_others,
)
from jaxlinear._linear import linear
from jaxlinear._parameters import bias_sharding, created, initializer, swapped_names
from jaxlinear._product import Products


class Linear(nnx.Module):
    """Y = X Wᵀ + B over the last axis, with the derivative of :func:`jaxlinear.linear`.

    It takes the arguments of ``flax.nnx.Linear``, with the same meaning: initializers
    and metadata speak of a kernel (in, out). The parameters have PyTorch's names and
    layout, ``weight`` (out_features, in_features) and ``bias`` (out_features,), so that
    a PyTorch state dict loads as it is. What looks for a parameter called ``kernel``
    must be told of ``weight``: ``nnx.WeightNorm(layer, feature_axes=0,
    variable_filter=nnx.PathContains("weight"))``, or ``"weight"`` in the mask of an
    optimizer.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      use_bias: whether there is a bias.
      dtype: dtype of the computation and of the output. Default: the promoted dtype of
        the input and the parameters.
      param_dtype: dtype of the parameters.
      precision: precision of the three products, as in :func:`jaxlinear.linear`.
      products: what one product has for itself, as in :func:`jaxlinear.linear`.
      kernel_init: initializer ``init(key, shape, dtype)`` that draws the transposed
        weight (in_features, out_features). Default: U(-√k, √k), k = 1/in_features, as
        in PyTorch.
      bias_init: initializer of the bias. Default: the same distribution.
      device: a ``jax.Device`` or a ``jax.sharding.Sharding`` where the parameters are
        created. It shards the weight (out, in); the bias is sharded as the weight's
        first axis. Name the axes in the metadata then, not by
        ``nnx.with_partitioning``.
      rngs: random number generators; the stream ``params`` draws the parameters.
      kernel_metadata: metadata of the weight's ``nnx.Param``. An ``out_sharding`` names
        the axes (in, out), and is kept as that of the weight's (out, in).
      bias_metadata: metadata of the bias's ``nnx.Param``.

    Raises:
      ValueError: if a number of features is negative, a precision is unknown, or an
        initializer returns another shape.
      TypeError: if a number of features is no integer, a dtype is neither floating nor
        complex, ``device`` is neither a device nor a sharding, an initializer cannot be
        called, or an argument is one of Flax's that has no place here
        (``dot_general``, ``promote_dtype``, ``preferred_element_type``).

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
        precision: lax.PrecisionLike = None,
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
        self.in_features = checked_features("in_features", in_features)
        self.out_features = checked_features("out_features", out_features)
        self.use_bias = use_bias
        self.dtype = checked_optional_dtype("dtype", dtype)
        self.param_dtype = checked_param_dtype(param_dtype)
        self.precision = checked_precision("precision", precision)
        self.products = checked_products(products, None, self.dtype)
        check_initializer("kernel_init", kernel_init)
        check_initializer("bias_init", bias_init)
        sharding = checked_sharding("device", device)

        weight = created(
            initializer(kernel_init, in_features),
            _weight,
            rngs.params(),
            (self.in_features, self.out_features),
            self.param_dtype,
            sharding,
        )
        self.weight = nnx.Param(weight, **_swapped_metadata(kernel_metadata))
        self.bias: nnx.Param[jax.Array] | None = nnx.data(None)
        if use_bias:
            bias = created(
                initializer(bias_init, in_features),
                _bias,
                rngs.params(),
                (self.out_features,),
                self.param_dtype,
                bias_sharding(sharding),
            )
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
            products=self.products,
            out_sharding=out_sharding,
        )


def _weight(kernel, shape):
    """The weight (out, in) of a kernel, which may be in a box with metadata."""
    if not isinstance(kernel, nnx.VariableMetadata):
        return checked_drawn("kernel_init", kernel, shape).T
    weight = checked_drawn("kernel_init", kernel.raw_value, shape).T
    metadata = _swapped_metadata(kernel.metadata)
    return dataclasses.replace(kernel, raw_value=weight, metadata=metadata)


def _swapped_metadata(metadata):
    # Flax's name of the sharding, and those that it had before.
    names = {"out_sharding", "sharding", "sharding_names"} & metadata.keys()
    swapped = {n: metadata[n] and swapped_names(metadata[n]) for n in names}
    return {**metadata, **swapped}


def _bias(bias, shape):
    is_boxed = isinstance(bias, nnx.VariableMetadata)
    checked_drawn("bias_init", bias.raw_value if is_boxed else bias, shape)
    return bias
