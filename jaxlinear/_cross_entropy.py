"""The last linear layer of a model and its loss, without the logits.

Read from top to bottom: the public functions, the derivative of the loss, then two ops.
``_statistics`` walks over blocks of the vocabulary and computes each again for the
backward pass; ``_total`` walks over blocks of rows and has the gradient at once.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlinear._checks import ArrayLike, compute_dtype
from jaxlinear._cross_entropy_checks import check_is_real, check_tokens, checked_loss
from jaxlinear._every_mode import in_every_mode
from jaxlinear._linear import linear
from jaxlinear._op.blocks import (
    block,
    by_platform,
    put,
    vocabulary_block,
    walk,
)
from jaxlinear._op.formulas import bias_gradient, input_gradient, weight_gradient
from jaxlinear._op.logits import (
    Statistics,
    capped,
    filled_as,
    gradient,
    gradient_at_label,
    joined,
    logits,
    no_rows,
    rounded,
    rows_of,
    scale_for,
)
from jaxlinear._op.sharding import ArrayType, is_traced_with_explicit_axes
from jaxlinear._plain import is_plain, plain_linear
from jaxlinear._product import Precision, Products, accumulator_dtype
from jaxlinear._product_checks import with_defaults


def linear_cross_entropy(
    h: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    weights: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    products: Products | None = None,
) -> jax.Array:
    """The cross-entropy of the linear layer z = h Wᵀ + B, without its logits z.

    Shapes::

        h (*, in)    weight (classes, in)    labels (*)    bias (classes,)    weights (*)

    where ``*`` is any number of leading axes, including none. The loss of a token with
    label y, label smoothing ε and z-loss ζ is::

        (1 - ε) (lse - z_y) + ε (lse - mean z) + ζ lse²        lse = log Σ exp z

    With a soft cap c, z is c tanh((h Wᵀ + B) / c). A token whose label is
    ``ignore_index``, or none of 0 … classes - 1, has no loss and no gradient.

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
      reduction: ``"none"`` for the weighted loss of each token, ``"sum"`` for their sum,
        ``"mean"`` for that divided by the sum of the weights of the tokens that are not
        ignored. If that is zero, so is the mean; PyTorch's is NaN.
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

    Returns:
      The loss, in float32 (float64 for operands in float64): a scalar, or (*) for
      ``"none"``.

    Raises:
      ValueError: if the shapes are not those above, weights are negative, or an option
        is out of its range.
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
    )
    return _run(_likelihood_of, arrays, options)


def _run(function, arrays, options):
    apply = function if _is_unfused(arrays["weight"]) else _jitted[function]
    return apply(options=options, **arrays)


def _is_unfused(weight):
    return is_plain() or is_traced_with_explicit_axes(weight)


def _loss_of(h, weight, labels, bias=None, weights=None, *, options):
    spec = _spec(h, weight, bias, options)
    labels = _counted(labels, weight.shape[0], options.ignore_index)
    if weights is None:
        weights = jnp.ones(labels.shape, spec.dtype)
    weights = jnp.where(labels < 0, 0, weights.astype(spec.dtype))
    if options.reduction == "none" or _is_unfused(weight):
        read = _read(h, weight, bias, labels, spec)
        losses = weights * spec.loss(read, labels, weight.shape[0])
        if options.reduction == "none":
            return losses
        total = jnp.sum(losses)
    else:
        total = _total_of(h, weight, bias, labels, weights, spec)
    if options.reduction == "sum":
        return total
    whole = jnp.sum(weights)
    return total / jnp.where(whole == 0, 1, whole)


def _likelihood_of(h, weight, labels, bias=None, *, options):
    spec = _spec(h, weight, bias, options)._replace(predicts=True)
    labels = _counted(labels, weight.shape[0])
    read = _read(h, weight, bias, labels, spec)
    return LogLikelihood(
        negative=spec.loss(read, labels, weight.shape[0]),
        log_sum_exp=read.log_sum_exp,
        prediction=read.prediction,
    )


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
    )


def _counted(labels, classes, ignore_index=-1):
    """The labels in int32, and -1 for every token that has no loss."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    is_counted = (labels >= 0) & (labels < classes)
    if 0 <= ignore_index < classes:
        is_counted &= labels != ignore_index
    return jnp.where(is_counted, labels, 0).astype(jnp.int32) - ~is_counted


def _read(h, weight, bias, labels, spec):
    if not _is_unfused(weight):
        labels = jnp.where(jnp.all(h == 0, -1), labels, labels)  # Mapped as h is.
        return _statistics_of(h, weight, bias, labels, spec)
    if is_plain():
        forward = spec.products.forward
        dtype, precision = forward.operand_dtype, forward.precision
        Y = plain_linear(h, weight, bias, dtype, precision, None).astype(spec.dtype)
    else:
        Y = linear(h, weight, bias, dtype=spec.dtype, products=spec.products)
    return spec.rows_of(capped(Y, spec.soft_cap), labels).statistics


class Loss(NamedTuple):
    """A loss of a token, by what it reads of the logits z of a vocabulary of v.

    With ε, ζ: log Σ exp z - (1 - ε) z_label - ε / v Σ z + ζ (log Σ exp z)².
    """

    label_smoothing: float
    z_loss: float

    def __call__(self, read, labels, size):
        ε, ζ = self.label_smoothing, self.z_loss
        loss = read.log_sum_exp - (1 - ε) * read.label
        if read.total is not None:
            loss -= ε / size * read.total
        if ζ:
            loss += ζ * read.log_sum_exp**2
        return jnp.where(labels >= 0, loss, 0)


class Spec(NamedTuple):
    """The static argument of both ops. It has a hash, being a key of JAX's caches."""

    products: Products
    dtypes: tuple[np.dtype, np.dtype, np.dtype | None]  # Of h, weight and bias.
    soft_cap: float | None
    reads_total: bool
    predicts: bool
    loss: Loss | None = None

    @property
    def dtype(self):
        """That of the logits and of all sums: float32 at least."""
        return self.products.forward.preferred_element_type

    def logits(self, X, W, B):
        return logits(X, W, B, self.products.forward, self.soft_cap)

    def rows_of(self, z, labels, first=0):
        return rows_of(z, labels, first, self.reads_total, self.predicts)


# The rule. With z_nv = Σ_i h_ni w_vi + b_v for each row n, p = softmax(z), and the
# derivative g of the loss by what it reads of a row,
#
#     ∂Loss/∂z_nv = g_lse p_nv + g_label [v = label_n] + g_total
#
# which is G in the three formulas of the linear layer. It exists for a block only.


class Gradients(NamedTuple):
    """The gradients of h, weight and bias. That of what is not differentiated is None."""

    X: Any
    W: Any
    B: Any


def _gradients(G, X, W, wanted, spec):
    """∇X = G W, ∇W = Gᵀ X and ∇B = Σ G of a block, in float32 at least."""
    _, input_grad, weight_grad = spec.products
    wide = ArrayType(spec.dtype, None)
    grad_X = grad_W = grad_B = None
    if wanted.X is not None:
        grad_X = input_gradient(_rounded(G, input_grad), W, input_grad, wide)
    if wanted.W is not None:
        grad_W = weight_gradient(_rounded(G, weight_grad), X, weight_grad, wide)
    if wanted.B is not None:
        grad_B = bias_gradient(G, wide)
    return Gradients(grad_X, grad_W, grad_B)


def _no_gradients(wanted, X, W, dtype):
    shapes = Gradients(X.shape, W.shape, W.shape[:1])
    return Gradients(
        *(
            None if is_wanted is None else filled_as(X, shape, 0, dtype)
            for is_wanted, shape in zip(wanted, shapes, strict=True)
        )
    )


class Left(NamedTuple):
    """What is rounded away from G at the label (*), for each product, or None.

    There G is p - 1, close under -1, where bfloat16 has three digits: one number a row
    makes up most of the error of both products. It is put back in float32.
    """

    X: jax.Array | None
    W: jax.Array | None


def _left_at_label(g_label, spec):
    _, *products = spec.products
    return Left(
        *(
            None if p.operand_dtype == spec.dtype else g_label - _rounded(g_label, p)
            for p in products
        )
    )


def _with_left(gradients, left, X, W, labels, spec):
    _, input_grad, weight_grad = spec.products
    grad_X, grad_W, _ = gradients
    if grad_X is not None and left.X is not None:
        rows = jnp.take(W, jnp.maximum(labels, 0), axis=0)
        grad_X += left.X[..., None] * _as_operand(rows, input_grad, spec)
    if grad_W is not None and left.W is not None:
        update = left.W[..., None] * _as_operand(X, weight_grad, spec)
        places = jnp.where(labels < 0, W.shape[0], labels)
        grad_W = grad_W.at[places].add(update, mode="drop")
    return gradients._replace(X=grad_X, W=grad_W)


def _rounded(G, product):
    return rounded(G, product.operand_dtype)


def _as_operand(array, product, spec):
    return array.astype(product.operand_dtype).astype(spec.dtype)


def _shared_operand(array, spec):
    """What all products of a walk read, or the array where they read several dtypes."""
    dtypes = {product.operand_dtype for product in spec.products}
    return array.astype(*dtypes) if len(dtypes) == 1 else array


def _scaled(g, spec):
    """``g`` times a power of two for float16, and the inverse of that, or None."""
    _, *gradients = spec.products
    low = [p.operand_dtype for p in gradients if p.operand_dtype == jnp.float16]
    scale = scale_for(low[0], g) if low else None
    if scale is None:
        return g, None
    return jax.tree.map(lambda a: a * scale, g), 1 / scale


def _times(scale, gradients):
    if scale is None:
        return gradients
    return jax.tree.map(lambda a: a * scale, gradients)


# What a loss reads, and its gradient: two walks over blocks of the vocabulary.


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _statistics(h, weight, bias, labels, spec):
    X = _shared_operand(h, spec)

    def body(rows, first, size):
        z = spec.logits(X, block(weight, first, size), block(bias, first, size))
        return joined(rows, spec.rows_of(z, labels, first))

    none = no_rows(labels, spec.dtype, spec.reads_total, spec.predicts)
    size = vocabulary_block(weight.shape[0])
    return walk(body, none, weight.shape[0], size).statistics


class Kept(NamedTuple):
    """The arguments, what was read of the logits (*), and which gradients are wanted."""

    X: Any
    W: Any
    B: Any
    labels: jax.Array
    log_sum_exp: jax.Array
    label: jax.Array
    wanted: Gradients  # An empty tuple for what is wanted, otherwise None.


def _wanted(h, weight, bias):
    primals = (h, weight, bias)
    return Gradients(*(() if p is not None and p.perturbed else None for p in primals))


def _statistics_forward(h, weight, bias, labels, spec):
    W, B = weight.value, None if bias is None else bias.value
    read = _statistics.fun(h.value, W, B, labels.value, spec)
    return read, Kept(
        *(h.value, W, B, labels.value, read.log_sum_exp, read.label),
        wanted=_wanted(h, weight, bias),
    )


def _statistics_backward(spec, kept, g):
    _, W, B, labels, log_sum_exp, label, wanted = kept
    X = _shared_operand(kept.X, spec)
    g, inverse = _scaled(g._replace(prediction=None), spec)

    def body(gradients, first, size):
        W_b, B_b = block(W, first, size), block(B, first, size)
        z = spec.logits(X, W_b, B_b)
        G = gradient(z, labels, first, log_sum_exp, g, spec.soft_cap)
        found = _gradients(G, X, W_b, wanted, spec)
        return Gradients(
            X=None if wanted.X is None else gradients.X + found.X,
            W=put(gradients.W, first, found.W),
            B=put(gradients.B, first, found.B),
        )

    gradients = _no_gradients(wanted, X, W, spec.dtype)
    gradients = walk(body, gradients, W.shape[0], vocabulary_block(W.shape[0]))
    g_label = gradient_at_label(label, log_sum_exp, g, spec.soft_cap)
    left = _left_at_label(jnp.where(labels < 0, 0, g_label), spec)
    gradients = _with_left(gradients, left, X, W, labels, spec)
    return *_in_dtypes(spec, _times(inverse, gradients)), None


def _in_dtypes(spec, gradients):
    """Each gradient in the dtype of its argument."""
    return [
        None if found is None else found.astype(dtype)
        for found, dtype in zip(gradients, spec.dtypes, strict=True)
    ]


_statistics.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)


def _statistics_differential(spec, kept, tangents):
    """The tangents of what is read, a block at a time: Σ p dz, dz_label and Σ dz."""
    X, W, B, labels, log_sum_exp, _, _ = kept
    dX, dW, dB, _ = tangents

    def body(tangent, first, size):
        def of_block(array):
            return block(array, first, size)

        at = Gradients(X, of_block(W), of_block(B))
        moving = Gradients(dX, of_block(dW), of_block(dB))
        z, dz = _jvp(spec.logits, at, moving)
        p = jnp.exp(z - log_sum_exp[..., None])
        places = first + jnp.arange(size, dtype=labels.dtype)
        at_label = jnp.where(labels[..., None] == places, dz, 0)
        return Statistics(
            log_sum_exp=tangent.log_sum_exp + jnp.sum(p * dz, -1),
            label=tangent.label + jnp.sum(at_label, -1),
            total=jnp.sum(dz, -1) + tangent.total if spec.reads_total else None,
            prediction=None,
        )

    zero = filled_as(labels, labels.shape, 0, spec.dtype)
    none = Statistics(zero, zero, zero if spec.reads_total else None, None)
    tangent = walk(body, none, W.shape[0], vocabulary_block(W.shape[0]))
    if not spec.predicts:
        return tangent
    return tangent._replace(prediction=np.zeros(labels.shape, jax.dtypes.float0))


def _jvp(function, at, moving):
    """The value and the tangent of ``function`` along what is not None."""
    fixed = [at_one if d is None else None for at_one, d in zip(at, moving, strict=True)]
    some = [None if d is None else at_one for at_one, d in zip(at, moving, strict=True)]

    def of_some(some):
        return function(*(f if s is None else s for s, f in zip(some, fixed, strict=True)))

    return jax.jvp(of_some, (some,), ([*moving],))


_statistics_of = in_every_mode(
    _statistics,
    _statistics_differential,
    leading=["h", "labels", "X", "log_sum_exp", "label"],
)


# The loss of all tokens together, and its gradient in the same walk over blocks of rows:
# three products, where the walks above take four.


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _total(h, weight, bias, labels, weights, spec):
    read = _statistics.fun(h, weight, bias, labels, spec)
    return jnp.sum(weights * spec.loss(read, labels, weight.shape[0]))


class KeptTotal(NamedTuple):
    """The gradient of the total, of what is differentiated."""

    X: Any
    W: Any
    B: Any
    weights: Any


def _total_forward(h, weight, bias, labels, weights, spec):
    wanted = _wanted(h, weight, bias)
    arrays = [
        h.value.reshape(-1, h.value.shape[-1]),
        weight.value,
        None if bias is None else bias.value,
        labels.value.reshape(-1),
        weights.value.reshape(-1),
    ]
    walk_over_rows = partial(_walk_over_rows, spec, wanted)
    total, losses, gradients = by_platform(walk_over_rows, *arrays)
    if gradients.X is not None:
        gradients = gradients._replace(X=gradients.X.reshape(h.value.shape))
    losses = losses.reshape(weights.value.shape) if weights.perturbed else None
    return total, KeptTotal(*gradients, losses)


def _walk_over_rows(spec, wanted, block_rows, X, W, B, labels, weights):
    """The total, the losses (n,) and the gradients, of rows X (n, in)."""
    X, W = _shared_operand(X, spec), _shared_operand(W, spec)

    def body(carry, first, size):
        losses, left, gradients = carry
        X_b, labels_b, weights_b = (block(a, first, size) for a in (X, labels, weights))
        z = spec.logits(X_b, W, B)
        read = spec.rows_of(z, labels_b).statistics
        found, pull = jax.vjp(lambda read: spec.loss(read, labels_b, W.shape[0]), read)
        (g,) = pull(weights_b)
        g, inverse = _scaled(g, spec)
        G = gradient(z, labels_b, 0, read.log_sum_exp, g, spec.soft_cap)
        g_label = gradient_at_label(read.label, read.log_sum_exp, g, spec.soft_cap)
        of_block = _gradients(G, X_b, W, wanted, spec), _left_at_label(g_label, spec)
        of_block, its_left = _times(inverse, of_block)
        gradients = Gradients(
            X=put(gradients.X, first, of_block.X),
            W=None if wanted.W is None else gradients.W + of_block.W,
            B=None if wanted.B is None else gradients.B + of_block.B,
        )
        left = jax.tree.map(lambda a, part: put(a, first, part), left, its_left)
        return put(losses, first, found), left, gradients

    zeros = filled_as(X, labels.shape, 0, spec.dtype)
    nothing = _no_gradients(wanted, X, W, spec.dtype)
    carry = zeros, _left_at_label(zeros, spec), nothing
    losses, left, gradients = walk(body, carry, X.shape[0], block_rows)
    gradients = _with_left(gradients, left, X, W, labels, spec)
    return jnp.sum(weights * losses), losses, gradients


def _total_backward(spec, kept, g):
    *gradients, losses = _times(g, kept)
    return *_in_dtypes(spec, gradients), None, losses


_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)


def _total_differential(spec, kept, tangents):
    dX, dW, dB, _, dweights = tangents
    pairs = zip(kept, (dX, dW, dB, dweights), strict=True)
    return sum(jnp.sum(g * d.astype(g.dtype)) for g, d in pairs if d is not None)


def _total_of_losses(h, weight, bias, labels, weights, spec):
    read = _statistics_of(h, weight, bias, labels, spec)
    return jnp.sum(weights * spec.loss(read, labels, weight.shape[0]))


# Of many totals each has its own cotangent. So the weight gradient that they share is not
# known in the forward pass, but one for each.
_total_of = in_every_mode(_total, _total_differential, mapped=_total_of_losses)


