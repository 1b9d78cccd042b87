"""The linear layer for Flax Linen."""

import pickle
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

try:
    from flax import linen as nn
except ModuleNotFoundError as _error:
    _message = "jaxlinear.linen needs Flax: pip install 'jaxlinear[flax]'"
    raise ModuleNotFoundError(_message, name=_error.name) from _error

from jaxlinear._checks import ArrayLike, check_input, check_shapes, checked_array
from jaxlinear._flax.checks import (
    Integers,
    Placement,
    as_tuple,
    check_is_matrix,
    keep_checked,
    refuse_kernel,
    refuse_others,
)
from jaxlinear._flax.layout import AxisCounts, axis_counts
from jaxlinear._flax.parameters import Drawing, pickled_placement
from jaxlinear._flax.several_axes import checked_axes, linear_over_axes
from jaxlinear._flax.trees import convert_tree as convert_tree
from jaxlinear._flax.trees import dimension_numbers as dimension_numbers
from jaxlinear._flax.trees import revert_tree as revert_tree
from jaxlinear._flax.trees import with_kernels
from jaxlinear._loss.functions import (
    LogLikelihood,
    Reduction,
    linear_cross_entropy,
    linear_log_likelihood,
)
from jaxlinear._product import Precision, Products


class Linear(nn.Module):
    """Y = X Wᵀ + B over the last axis, with the derivative of :func:`jaxlinear.linear`.

    It takes the arguments of ``flax.linen.Dense``, with the same meaning: initializers
    refer to a kernel (in, out). The parameters have PyTorch's names and layout,
    ``weight`` (out, in) and ``bias`` (out,), where in is read from the input.

    With a tuple of features or of axes it is ``flax.linen.DenseGeneral``, for the
    projections of an attention: ``Linear((8, 8))`` maps ``(*, 64)`` to ``(*, 8, 8)``,
    and ``Linear(64, axis=(-2, -1))`` back. The weight is (*features, *in); it is
    multiplied as a matrix, without a copy.

    Code that looks for a parameter ``kernel`` must look for ``weight`` instead:
    ``nn.WeightNorm(layer, feature_axes=0, variable_filter={"weight"})``, or
    ``"weight"`` in the mask of an optimizer.

    Attributes:
      features: size of the last axis of the output, or of each of its last axes.
      use_bias: whether there is a bias.
      dtype: dtype of the computation and of the output. Default: the promoted dtype of
        the input and the parameters.
      param_dtype: dtype of the parameters.
      precision: precision of the three products, as in :func:`jaxlinear.linear`.
      kernel_init: initializer ``init(key, shape, dtype)`` that draws the transposed
        weight (in, features), as a matrix where there are several axes;
        ``nn.with_partitioning`` names the axes (in, out), and the names are kept in the
        order of the weight (out, in). Default: U(-√k, √k), k = 1/in_features, as in
        PyTorch.
      bias_init: initializer of the bias. Default: the same distribution.
      products: overrides for single products, as in :func:`jaxlinear.linear`.
      device: a ``jax.Device`` or a ``jax.sharding.Sharding`` where the parameters are
        created. A sharding is that of the weight (out, in); the bias is sharded as the
        weight's output axes.
      axis: axes of the input that are contracted, in ascending order, as in Flax.
      promote_dtype, dot_general, dot_general_cls, batch_dims: arguments of Flax's that
        are refused.

    Raises:
      ValueError: if ``features`` is negative, a precision is unknown, or an initializer
        returns another shape.
      TypeError: if ``features`` or ``axis`` is not an integer, a dtype is neither
        floating nor complex, ``device`` is neither a device nor a sharding, an
        initializer cannot be called, or an argument of Flax's is refused.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlinear.linen import Linear
      >>> params = Linear(2).init(jax.random.key(0), jnp.ones((8, 3)))
      >>> jax.tree.map(jnp.shape, params)
      {'params': {'bias': (2,), 'weight': (2, 3)}}
    """

    features: Integers
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None
    kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer | None = None
    promote_dtype: Any = None
    dot_general: Any = None
    dot_general_cls: Any = None
    products: Products | None = None
    device: Placement | None = None
    axis: Integers = -1
    batch_dims: Any = None

    def __post_init__(self) -> None:
        others = "promote_dtype", "dot_general", "dot_general_cls", "batch_dims"
        refuse_others({name: getattr(self, name) for name in others})
        # In the place of it Flax's DenseGeneral has the axes.
        if not isinstance(self.use_bias, bool | np.bool_):
            raise TypeError(
                f"`use_bias` must be True or False, got {self.use_bias!r}: name `axis=`"
            )
        keep_checked(
            self,
            features=self.features,
            axis=self.axis,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            products=self.products,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            device=self.device,
        )
        super().__post_init__()

    if not TYPE_CHECKING:  # For a type checker every name would be an attribute.

        @nn.nowrap
        def __getattr__(self, name):
            refuse_kernel(self, name)
            return super().__getattr__(name)

    # JAX's devices can be neither pickled nor copied: the state has bytes instead.

    @nn.nowrap
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "device": pickled_placement(self.device)}

    @nn.nowrap
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "device": pickle.loads(state["device"])})

    @nn.compact
    def __call__(
        self, x: ArrayLike, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> jax.Array:
        """X Wᵀ + B.

        Args:
          x: input (*, in_features), or with the axes ``axis``.
          out_sharding: as in :func:`jaxlinear.linear`.

        Returns:
          Y (*, features).

        Raises:
          ValueError: if ``x`` is a scalar or does not have the axes that are
            contracted, or these have other sizes than in_features.
          TypeError: if ``x`` is not an array.
        """
        x = checked_array("x", x)
        weight, bias = self._parameters(x)
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

    @nn.compact
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
        dtype, precision and products: ``model.apply(variables, h, labels,
        method="cross_entropy")``. A first call draws the parameters, as that of the
        layer does. A head that is tied to an embedding is not a layer: pass
        ``embed.embedding`` to the function.

        Its arguments, result and errors are those of the function. A layer with several
        input or output axes raises a ``ValueError``, and so do products with 8 bits or
        a ``preferred_element_type``.
        """
        h = checked_array("h", h)
        weight, bias = self._matrix(h)
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

    @nn.compact
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
        h = checked_array("h", h)
        weight, bias = self._matrix(h)
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

    @nn.nowrap
    def _matrix(self, h):
        """The parameters for a loss, which has one axis of classes."""
        check_is_matrix(self.axis, features=self.features)
        return self._parameters(h, name="h")

    @nn.nowrap  # Not a method of its own in `nn.tabulate` and to interceptors.
    def _parameters(self, x, name="x"):
        axis, out_shape = as_tuple(self.axis), as_tuple(self.features)
        weight = nn.unbox(self.get_variable("params", "weight"))
        in_shape = _in_shape(x, axis, weight, name)
        inits = self.kernel_init, self.bias_init
        drawing = Drawing(*inits, in_shape, out_shape, self.param_dtype, self.device)
        weight = self.param("weight", drawing.weight)
        bias = self.param("bias", drawing.bias) if self.use_bias else None
        return weight, bias


def _in_shape(x, axis, weight, name):
    """The sizes of the axes of x that are contracted.

    Flax would refuse a weight with other sizes without naming `x`.
    """
    check_input(x, name)
    sizes = None
    if weight is not None:
        if axis == (-1,) and weight.ndim == 2:
            check_shapes(x, weight, bias=None, name=name)
        sizes = weight.shape[-len(axis) :]
    return tuple(x.shape[one] for one in checked_axes(x, axis, sizes))


def _lecun_normal(key, shape, dtype=jnp.float32):
    """As Flax's own, which cannot be pickled."""
    return nn.initializers.lecun_normal()(key, shape, dtype)


class Dense(Linear):
    """:class:`Linear` with the name and the initial values of ``flax.linen.Dense``.

    Linen names a layer by its class, ``Dense_0``. So a model in which this class
    replaces ``flax.linen.Dense`` keeps the paths of its old checkpoints, and
    :func:`convert_tree` converts these.

    Attributes:
      kernel_init: as in :class:`Linear`. Default: LeCun normal.
      bias_init: initializer of the bias. Default: zeros.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxlinear.linen import Dense, convert_tree, layers_of
      >>> old = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
      >>> checkpoint = old.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> model = nn.Sequential([Dense(4), nn.relu, Dense(2)])
      >>> layers = layers_of(model, jax.random.key(0), jnp.ones((1, 3)))
      >>> variables = convert_tree(checkpoint, layers)
      >>> model.apply(variables, jnp.ones((1, 3))).shape
      (1, 2)
    """

    kernel_init: nn.initializers.Initializer | None = _lecun_normal
    bias_init: nn.initializers.Initializer | None = nn.initializers.zeros


class DenseGeneral(Dense):
    """:class:`Dense` with the name and the first arguments of Flax's DenseGeneral."""

    def __init__(
        self,
        features: Integers,
        axis: Integers = -1,
        batch_dims: Any = None,
        use_bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            features, use_bias, axis=axis, batch_dims=batch_dims, **options
        )


def layers_of(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, AxisCounts]:
    """Our layers in ``model``, by path, with their numbers of axes.

    :func:`convert_tree`, :func:`revert_tree` and :func:`dimension_numbers` take the
    result as their ``layers``.

    Args:
      model: a model.
      *args: what ``model.init`` takes, random keys and an input. Nothing is computed.
      **kwargs: keywords of ``model.init``.

    Returns:
      A dict from dotted paths to how many input and output axes a weight has.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxlinear.linen import Linear, layers_of
      >>> model = nn.Sequential([Linear((2, 4)), nn.relu])
      >>> layers_of(model, jax.random.key(0), jnp.ones((1, 3)))
      {'layers_0': AxisCounts(inputs=1, outputs=2)}
    """
    counts: dict[str, AxisCounts] = {}

    def noted(call, args, kwargs, context):
        layer = context.module
        if isinstance(layer, Linear):
            counts[".".join(layer.path)] = axis_counts(layer.axis, layer.features)
        return call(*args, **kwargs)

    with nn.intercept_methods(noted):
        variables = jax.eval_shape(lambda: model.init(*args, **kwargs))
    # A lifted layer is called twice, the second time without a path.
    _, missing = with_kernels(variables, counts)
    return {path: counts[path] for path in counts if path not in missing}
