"""The functions: what becomes of the gradient of each example."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxlinear._examples.arguments import Arguments
from jaxlinear._examples.factors import sum_of_squares, total
from jaxlinear._examples.gradients import Examples


def squared_grad_norms(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
) -> Callable[..., Any]:
    """The squared norm of each example's gradient, without the gradients.

    With G and X the cotangent and the input of a layer, the gradient of one example is
    Gᵀ X, and its norm needs only the factors::

        one token        ‖Gᵀ X‖² = ‖g‖² ‖x‖²
        T tokens         ‖Gᵀ X‖² = Σ_ts (g_t · g_s) (x_t · x_s)

    or the product itself, if that is fewer operations. So it is computed for every
    parameter that the program uses only as a weight or bias of a linear layer, as a
    matrix in a product such as ``x @ kernel``, or as a table from which rows are
    taken. The gradient of any other, such as the scale of a normalization, is computed
    for each example. So is that of a parameter that is in a ``cond`` or a function with
    a derivative of its own. The values are those of ``vmap(grad(fun))`` in each case:
    a parameter that is used several times, or in every step of a loop, has the tokens
    of all its uses.

    The sums are in float32 at least, and factors have the dtypes in which the layer
    multiplies them. So norms are those of the gradients before they are rounded, and
    under products of 8 bits an example is quantized with a scale of its own.

    Args:
      fun: the loss of a batch, a real scalar. It is called with one example.
      argnums: the arguments to differentiate with respect to, as in :func:`jax.grad`:
        trees of real floating arrays.
      batch_argnums: the arguments that are examples: trees of arrays whose first axis
        is that of the batch.
      keep_batch_dim: whether ``fun`` gets an example with a first axis of size 1, or
        without that axis.

    Returns:
      A function of the arguments of ``fun``. It returns the tree of those of
      ``argnums``, with squared norms of shape (batch,) in float32 at least. The squared
      norm of the gradient of several parameters is the sum of theirs.

    Raises:
      ValueError: if ``argnums`` or ``batch_argnums`` are not different arguments or
        have no array, or arrays of the batch have no axis or different numbers of
        examples; or inside ``shard_map``, if a parameter is split over an axis of the
        mesh over which the examples are.
      TypeError: if a parameter is not real and floating, or ``fun`` does not return a
        real scalar for one example.

    Example:
      >>> import jax.numpy as jnp, jaxlinear
      >>> def loss(weight, x):
      ...     return jaxlinear.linear(x, weight).sum()
      >>> jaxlinear.squared_grad_norms(loss)(jnp.ones((2, 3)), jnp.eye(4, 3))
      Array([2., 2., 2., 0.], dtype=float32)
    """
    arguments = Arguments.of(fun, argnums, batch_argnums, keep_batch_dim)

    def squared_norms(*args, **kwargs):
        given = arguments.given(args, kwargs)

        examples = Examples(given.loss, given.leaves, given.batch, keeps=False)
        norms = examples.gradients().norms
        return given.tree.unflatten(given.over_devices(norms))

    return squared_norms


class ExampleValues(NamedTuple):
    """What :func:`jaxlinear.clipped_grad` returns of each example, if it is asked to.

    Attributes:
      values: the loss (batch,), or None.
      grad_norms: the norm of the gradient before it is clipped (batch,), or None.
      aux: what ``fun`` returns besides, with a first axis of the batch, or None.
    """

    values: jax.Array | None
    grad_norms: jax.Array | None
    aux: Any


def clipped_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: ArrayLike,
    normalize_by: ArrayLike = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    return_values: bool = False,
    return_grad_norms: bool = False,
    passes: Literal[1, 2] = 1,
) -> Callable[..., Any]:
    """The sum of the examples' gradients, each clipped to a norm.

    With gᵢ the gradient of example i, C ``l2_clip_norm`` and n ``normalize_by``::

        Σᵢ min(1, C / ‖gᵢ‖) gᵢ / n

    The norms are those of :func:`jaxlinear.squared_grad_norms`, and no gradient of one
    example is computed where they have factors. Leaving out one example changes the
    result by a norm of C / n at most, up to rounding. To train with differential
    privacy, add noise in that proportion, with :func:`optax.add_noise` or jax-privacy.

    The arguments and results have the names and meanings of ``clipped_grad`` of
    jax-privacy 2, with ``nan_safe``: an example whose norm is infinite or NaN
    contributes nothing.

    Args:
      fun: the loss of a batch, a real scalar, or that and further results if
        ``has_aux``. It is called with one example.
      argnums: the arguments to differentiate with respect to.
      has_aux: whether ``fun`` returns a pair.
      l2_clip_norm: C, 0 or more; infinite for norms without clipping.
      normalize_by: n, greater than 0, such as the number of examples for a mean.
      batch_argnums: the arguments that are examples.
      keep_batch_dim: whether ``fun`` gets an example with a first axis of size 1.
      return_values: whether to return the losses.
      return_grad_norms: whether to return the norms.
      passes: 1 computes the gradient from factors that one backward pass keeps, G and X
        of all layers. 2 keeps none: after the norms, a second backward pass computes
        the gradient of the weighted sum of losses. That takes more time, and for layers
        under ``scan`` or ``jax.checkpoint`` less memory.

    Returns:
      A function of the arguments of ``fun``, and of ``is_padding_example``, booleans
      (batch,) for examples that contribute nothing, or None. It returns the gradient,
      or if anything else is asked for, the gradient and an
      :class:`jaxlinear.ExampleValues`.

    Raises:
      ValueError: as for :func:`jaxlinear.squared_grad_norms`, and if ``l2_clip_norm``,
        ``normalize_by``, ``passes`` or the shape of ``is_padding_example`` are not
        those above.
      TypeError: as for :func:`jaxlinear.squared_grad_norms`.

    Example:
      >>> import jax.numpy as jnp, jaxlinear
      >>> def loss(weight, x):
      ...     return jaxlinear.linear(x, weight).sum()
      >>> grad = jaxlinear.clipped_grad(loss, l2_clip_norm=2.0**0.5)
      >>> grad(jnp.ones((2, 3)), 5 * jnp.eye(4, 3))
      Array([[1., 1., 1.],
             [1., 1., 1.]], dtype=float32)
    """
    arguments = Arguments.of(fun, argnums, batch_argnums, keep_batch_dim, has_aux)
    _check_number("l2_clip_norm", l2_clip_norm, "0 or more", lambda c: c >= 0)
    _check_number("normalize_by", normalize_by, "greater than 0", lambda n: n > 0)
    if passes not in (1, 2):
        raise ValueError(f"`passes` must be 1 or 2, got {passes!r}")

    def clipped(*args, is_padding_example=None, **kwargs):
        given = arguments.given(args, kwargs)
        given.check_padding(is_padding_example)

        examples = Examples(given.loss, given.leaves, given.batch, keeps=passes == 1)
        if passes == 1:
            found, pull = examples.gradients(), None
        else:
            found, pull = examples.gradients_and_pull()
        norms = jnp.sqrt(total(given.over_devices(found.norms)))
        is_finite = is_counted = jnp.isfinite(norms)
        if is_padding_example is not None:
            is_counted &= ~jnp.asarray(is_padding_example)
        weights = jnp.where(norms > l2_clip_norm, l2_clip_norm / norms, 1)
        weights = jnp.where(is_counted, weights / normalize_by, 0)
        if pull is None:
            grads = examples.weighted_sum(found, weights, is_counted)
        else:
            # 0 times the NaN of what does not count would be NaN.
            grads = lax.cond(
                jnp.all(is_finite),
                lambda grads: grads,
                lambda _: examples.gradient_of_counted(weights, is_counted),
                pull(weights, is_counted),
            )
        grads = given.tree.unflatten(given.summed_over_devices(grads))
        if not (has_aux or return_values or return_grad_norms):
            return grads
        return grads, ExampleValues(
            values=found.values if return_values else None,
            grad_norms=norms if return_grad_norms else None,
            aux=found.aux if has_aux else None,
        )

    return clipped


class GradientNoise(NamedTuple):
    """What :func:`jaxlinear.gradient_noise` estimates, two scalars.

    Both are unbiased, and the second may be negative in a small batch: take the means
    of both over steps before the ratio.

    Attributes:
      variance: tr Σ, the sum of the variances of a gradient's elements over examples.
      squared_norm: ‖E g‖², of the gradient of the expected loss.
    """

    variance: jax.Array
    squared_norm: jax.Array

    @property
    def scale(self) -> jax.Array:
        """The ratio tr Σ / ‖E g‖², the batch size that balances noise and gradient."""
        return self.variance / self.squared_norm


def gradient_noise(mean_grad: Any, squared_norms: ArrayLike) -> GradientNoise:
    """The noise of a gradient, from the examples of one batch.

    With ḡ the mean of the gradients gᵢ of n examples::

        tr Σ = (Σᵢ ‖gᵢ‖² - n ‖ḡ‖²) / (n - 1)        ‖E g‖² = ‖ḡ‖² - tr Σ / n

    The ratio is the simple noise scale of McCandlish et al. (2018,
    https://arxiv.org/abs/1812.06162): well below it a step with twice as many examples
    makes nearly twice the progress, well above it hardly more.

    Args:
      mean_grad: ḡ, a tree of arrays.
      squared_norms: ‖gᵢ‖² (n,), of the gradient of all these arrays.

    Raises:
      ValueError: if there are fewer than two examples.

    Example:
      >>> import jax.numpy as jnp, jaxlinear
      >>> def loss(weight, x):
      ...     return jaxlinear.linear(x, weight).sum()
      >>> grad = jaxlinear.clipped_grad(
      ...     loss, l2_clip_norm=jnp.inf, normalize_by=4, return_grad_norms=True
      ... )
      >>> mean, examples = grad(jnp.ones((2, 3)), jnp.eye(4, 3))
      >>> noise = jaxlinear.gradient_noise(mean, examples.grad_norms**2)
      >>> round(float(noise.variance), 4)
      1.5
    """
    squared_norms = jnp.asarray(squared_norms)
    if squared_norms.ndim != 1 or len(squared_norms) < 2:
        raise ValueError(
            "`squared_norms` must be those of two examples or more, got shape"
            f" {squared_norms.shape}"
        )
    count = len(squared_norms)
    of_mean = total([*map(sum_of_squares, jax.tree.leaves(mean_grad))])
    variance = (jnp.sum(squared_norms) - count * of_mean) / (count - 1)
    return GradientNoise(variance, of_mean - variance / count)


def _check_number(name, value, required, is_right):
    """Arrays may be traced: of these nothing is known."""
    if isinstance(value, numbers.Real) and not is_right(value):
        raise ValueError(f"`{name}` must be {required}, got {value!r}")
