"""The naive formula, for libraries that replace or look for its product."""

import contextlib
from collections.abc import Iterator
from types import FunctionType

import jax
import jax.numpy as jnp
from jax import lax

# A context that is part of the key of JAX's caches: a function that is called on both
# sides of the switch is traced once for each.
_in_plain_autodiff = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def plain_autodiff() -> Iterator[None]:
    """A context in which ``linear`` is the naive formula, differentiated by autodiff.

    It is for libraries that look for ``lax.dot_general`` in a program and know no
    primitive of ours, such as exporters to ONNX and the compiler of Pallas kernels for
    TPUs. Inside the context ``linear`` is not jitted, and its product is one
    ``lax.dot_general``. Quantizers that replace that function, as Qwix and AQT do, need
    no switch: the layer is the naive formula while they run a model. Nor do JAX's own
    transformations, or libraries that take a rule for :data:`jaxlinear.PRIMITIVES`.

    The layer then computes what the naive formula computes: Y is rounded before the
    bias is added and again afterwards, and parameter gradients have the accuracy of the
    compute dtype. All three products have operands of ``dtype`` and the precision of
    the forward product; the rest of ``products`` is checked and not used. The result
    has no checkpoint name.

    The setting belongs to the thread and to the call: functions returned by
    ``jax.vjp``, ``jax.linearize`` or ``jax.jit(f).lower(...).compile()`` keep the one
    under which they were made. Threads start outside. Contexts may be nested and left
    by an exception; the object may also be used as a decorator.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlinear
      >>> x, weight = jnp.ones(3), jnp.ones((2, 3))
      >>> with jaxlinear.plain_autodiff():
      ...     program = jax.make_jaxpr(jaxlinear.linear)(x, weight)
      >>> [equation.primitive.name for equation in program.eqns]
      ['dot_general']
    """
    with _in_plain_autodiff(True):
        yield


def is_plain():
    """Whether ``linear`` is the naive formula: in the switch, or for a quantizer.

    Quantizers replace ``lax.dot_general`` (AQT) or its code (Qwix) while they run a
    model, for all threads.
    """
    product = lax.dot_general
    is_replaced = product is not _DOT_GENERAL or product.__code__ is not _CODE
    return is_replaced or _in_plain_autodiff.value


_DOT_GENERAL, _CODE = lax.dot_general, lax.dot_general.__code__

# The op multiplies by a copy that nobody replaces: JAX's caches keep what is traced, a
# backward pass as well, for calls after the quantizer has left.
dot_general = FunctionType(
    _CODE,
    _DOT_GENERAL.__globals__,
    argdefs=_DOT_GENERAL.__defaults__,
    closure=_DOT_GENERAL.__closure__,
)
dot_general.__kwdefaults__ = _DOT_GENERAL.__kwdefaults__


def plain_linear(x, weight, bias, dtype, precision, out_sharding):
    """X Wᵀ + B, with nothing around it that hides it."""
    # The spelling of Flax, for what is put in the place of these functions: a weight
    # that Qwix has quantized has no working `astype`, and the `dot_general` of AQT
    # requires `precision` and does not know `out_sharding`.
    X, W = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)
    dimensions = ((X.ndim - 1,), (1,)), ((), ())
    sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
    Y = lax.dot_general(X, W, dimensions, precision=precision, **sharding)
    if bias is not None:
        Y += jnp.expand_dims(bias.astype(dtype), range(Y.ndim - 1))
    return Y
