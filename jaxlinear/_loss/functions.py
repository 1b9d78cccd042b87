"""The functions: the arguments, then which op computes."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlinear._checks import ArrayLike, compute_dtype
from jaxlinear._loss.block import Loss, Spec
from jaxlinear._loss.by_classes import statistics_of
from jaxlinear._loss.by_rows import total_of
from jaxlinear._loss.checks import check_is_real, check_tokens, checked_loss
from jaxlinear._loss.logits import capped, joined_over_devices
from jaxlinear._loss.on_mesh import on_mesh
from jaxlinear._op.sharding import is_traced_with_explicit_axes
from jaxlinear._plain import is_plain, plain_linear
from jaxlinear._product import Precision, Products, accumulator_dtype
from jaxlinear._product_checks import with_defaults

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    h: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    reduction: Reduction = "mean",
    weights: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    products: Products | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """The cross-entropy of the linear layer z = h Wᵀ + B, without its logits z.

    Shapes::

        h (*, in)   weight (classes, in)   labels (*)   bias (classes,)   weights (*)

    where ``*`` is any number of leading axes, including none. The loss of a token with
    label y, label smoothing ε and z-loss ζ is::

        (1 - ε) (lse - z_y) + ε (lse - mean z) + ζ lse²        lse = log Σ exp z

    With a soft cap c, z is c tanh((h Wᵀ + B) / c). A token whose label is
    ``ignore_index``, or none of 0 … classes - 1, has no loss and no gradient, unless
    its h is infinite or NaN: 0 times that is NaN.

    The logits exist for a block of tokens or of classes at a time, in float32, and so
    does their gradient. With p = softmax(z) that is, for the loss of one token without
    options, G = p - onehot(y); the gradients are those of the layer::

        ∇h = G W     ∇W = Gᵀ h     ∇B = Σ G

    summed in float32 and rounded once, to the dtypes of their arguments. Where
    ``dtype`` has fewer bits, G is rounded for both products, except at the label, where
    it is close to -1: what is rounded away there is added in float32.

    ``mean`` and ``sum`` compute the gradient beside the loss, if there is one, with
    three products. ``none`` takes four: the backward pass computes the logits again.
    The function is differentiable in ``h``, ``weight``, ``bias`` and ``weights``, in
    every mode of :func:`jaxlinear.linear` but ``jax.linear_transpose``. It is jitted.

    On a mesh with explicit axes, and under :func:`jaxlinear.plain_autodiff`, it
    computes the same loss with its logits.

    Args:
      h: the input of the layer.
      weight: its matrix, as PyTorch's or as an embedding table lies.
      labels: integers.
      bias: its bias, or None.
      reduction: ``"none"`` for the weighted loss of each token, ``"sum"`` for their
        sum, ``"mean"`` for that divided by the sum of the weights of the tokens that
        are not ignored. If that is zero, so is the mean; PyTorch's is NaN.
      weights: one weight for each token, 0 or more: a mask, for instance, also of
        booleans. Default: 1. PyTorch's weights of classes are
        ``class_weights[labels]``, and ``mean`` then divides as PyTorch's does; with
        label smoothing PyTorch also weights the classes of mean z, this does not.
      ignore_index: label of tokens that are ignored.
      label_smoothing: ε, from 0 to 1 (Szegedy et al., 2016,
        https://arxiv.org/abs/1512.00567).
      z_loss: ζ, 0 or more (Chowdhery et al., PaLM, 2022,
        https://arxiv.org/abs/2204.02311).
      soft_cap: c, greater than 0, or None (Gemma Team, Gemma 2, 2024,
        https://arxiv.org/abs/2408.00118).
      dtype: floating dtype of the products' operands, as in :func:`jaxlinear.linear`.
      precision: precision of the products, as there.
      products: overrides both for one product at a time, as there, without 8 bits and
        without ``preferred_element_type``.
      axis_name: inside :func:`jax.shard_map` with ``check_vma=True``, its default, the
        axis or axes of the mesh over which the classes are split. ``weight`` and
        ``bias`` are then a device's part, and ``labels`` are numbers of the whole.

    Returns:
      The loss, in float32 (float64 for operands in float64): a scalar, or (*) for
      ``"none"``.

    Raises:
      ValueError: if the shapes are not those above, weights are negative, an option is
        out of its range, or ``axis_name`` does not split the weight.
      TypeError: if an argument is not an array, labels are not integers, or a dtype is
        not one of those above.

    The function and its names are those of PyTorch's ``linear_cross_entropy``:
    https://docs.pytorch.org/docs/stable/nn.functional.html

    Example:
      >>> import jax, jax.numpy as jnp, jaxlinear
      >>> h, weight, labels = jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.array([1, -100])
      >>> float(jaxlinear.linear_cross_entropy(h, weight, labels))  # log 4
      1.3862943649291992
    """
    arrays, options = checked_loss(
        *(h, weight, labels, bias, weights),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        soft_cap=soft_cap,
        dtype=dtype,
        precision=precision,
        products=products,
        axis_name=axis_name,
    )
    return _run(_loss_of, arrays, options)


class LogLikelihood(NamedTuple):
    """What :func:`jaxlinear.linear_log_likelihood` returns, for each token.

    Attributes:
      negative: lse - z_y, the negative log-likelihood of the label, or 0 for a label
        that is not one of the classes.
      log_sum_exp: lse = log Σ exp z.
      prediction: the class of the largest logit, the first of several, in int32.
    """

    negative: jax.Array
    log_sum_exp: jax.Array
    prediction: jax.Array


def linear_log_likelihood(
    h: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    soft_cap: float | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    products: Products | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> LogLikelihood:
    """What a model says of each token, without its logits z = h Wᵀ + B.

    For perplexity, accuracy, distillation and reinforcement learning. The arguments are
    those of :func:`jaxlinear.linear_cross_entropy`; the first two results are (*) in
    float32 and are differentiated as its losses of ``reduction="none"`` are.

    Example:
      >>> import jax.numpy as jnp, jaxlinear
      >>> h, weight = jnp.ones((2, 3)), jnp.eye(4, 3)
      >>> found = jaxlinear.linear_log_likelihood(h, weight, jnp.array([0, 3]))
      >>> accuracy = (found.prediction == jnp.array([0, 3])).mean()
      >>> float(accuracy)
      0.5
    """
    arrays, options = checked_loss(
        *(h, weight, labels, bias, None),
        soft_cap=soft_cap,
        dtype=dtype,
        precision=precision,
        products=products,
        axis_name=axis_name,
    )
    return _run(_likelihood_of, arrays, options)


def _run(function, arrays, options):
    is_bare = is_plain() or any(map(is_traced_with_explicit_axes, arrays.values()))
    apply = function if is_bare else _jitted[function]
    return apply(options=options, **arrays)


def _loss_of(h, weight, labels, bias=None, weights=None, *, options):
    spec = _spec(h, weight, bias, options)
    labels = _counted(labels, spec.classes(weight), options.ignore_index)
    if weights is None:
        weights = jnp.ones_like(labels, spec.dtype)
    weights = jnp.where(labels < 0, 0, weights.astype(spec.dtype))
    if options.reduction == "mean":
        # Before the walk: its gradients need no multiplication afterwards.
        whole = jnp.sum(weights)
        weights /= jnp.where(whole == 0, 1, whole)
    arrays = h, weight, bias, labels, weights
    if options.reduction == "none":
        return _on_devices(_losses, *arrays, spec)
    return _on_devices(_total, *arrays, spec, sums=True)


def _likelihood_of(h, weight, labels, bias=None, *, options):
    spec = _spec(h, weight, bias, options)._replace(predicts=True)
    labels = _counted(labels, spec.classes(weight))
    return _on_devices(_likelihood, h, weight, bias, labels, None, spec)


_jitted = {
    function: jax.jit(function, static_argnames="options")
    for function in (_loss_of, _likelihood_of)
}


def _spec(h, weight, bias, options):
    """The checks that need shapes and dtypes, and the static argument of the ops."""
    check_tokens(h, weight, bias)
    dtype = compute_dtype(options.dtype, h, weight, bias)
    if not jnp.issubdtype(dtype, jnp.inexact):
        dtype = jnp.dtype("float32")
    check_is_real(dtype)
    products = with_defaults(options.products, dtype, h, weight, bias)
    wide = accumulator_dtype(dtype)
    products = [p._replace(preferred_element_type=wide) for p in products]
    return Spec(
        Products(*products),
        dtypes=(h.dtype, weight.dtype, None if bias is None else bias.dtype),
        soft_cap=options.soft_cap,
        reads_total=bool(options.label_smoothing),
        predicts=False,
        loss=Loss(options.label_smoothing, options.z_loss),
        axes=options.axes,
    )


def _counted(labels, classes, ignore_index=-1):
    """The labels in int32, and -1 for every token that has no loss."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    is_counted = (labels >= 0) & (labels < classes)
    if 0 <= ignore_index < classes:
        is_counted &= labels != ignore_index
    # In two steps: unsigned labels have no -1.
    places = jnp.where(is_counted, labels, 0).astype(jnp.int32)
    return jnp.where(is_counted, places, -1)


def _on_devices(function, h, weight, bias, labels, weights, spec, sums=False):
    arrays = h, weight, bias, labels, weights
    on_it = [a for a in arrays if a is not None and is_traced_with_explicit_axes(a)]
    if on_it and not is_plain():
        mesh = jax.typeof(on_it[0]).sharding.mesh
        return on_mesh(function, *arrays, spec, mesh, sums=sums)
    return function(*arrays, spec)


def _total(h, weight, bias, labels, weights, spec):
    if is_plain():
        return jnp.sum(_losses(h, weight, bias, labels, weights, spec))
    return total_of(h, weight, bias, labels, weights, spec)


def _losses(h, weight, bias, labels, weights, spec):
    return weights * spec.losses(_read(h, weight, bias, labels, spec), labels, weight)


def _likelihood(h, weight, bias, labels, _, spec):
    read: Any = _read(h, weight, bias, labels, spec)
    negative = spec.losses(read, labels, weight)
    return LogLikelihood(negative, read.log_sum_exp, read.prediction)


def _read(h, weight, bias, labels, spec):
    if not is_plain():
        labels = jnp.where(jnp.all(h == 0, -1), labels, labels)  # Mapped as h is.
        return statistics_of(h, weight, bias, labels, spec)
    forward = spec.products.forward
    dtype, precision = forward.operand_dtype, forward.precision
    Y = plain_linear(h, weight, bias, dtype, precision, None).astype(spec.dtype)
    rows = spec.rows_of(capped(Y, spec.soft_cap), labels, spec.first_of(weight))
    return joined_over_devices(rows, spec.axes).statistics
