"""What `jax.checkpoint` saves of a layer."""

from typing import Any

import jax
from jax.extend.core import Primitive

from jaxlinear._every_mode import every_mode_p
from jaxlinear._linear import _linear

_named = jax.checkpoint_policies.save_only_these_names("linear")


def save_linear_outputs(primitive: Primitive, *types: Any, **parameters: Any) -> bool:
    """A policy for ``jax.checkpoint`` that saves the result of every ``linear``.

    The backward pass then runs no forward product again, and recomputes everything
    else. Unlike ``save_only_these_names("linear")`` it also saves the result of a layer
    that is not differentiated, which has no name.

    Args:
      primitive: the operation that JAX asks about; it calls the policy, not the user.
      *types: the types of its operands.
      **parameters: its parameters.

    Returns:
      Whether the result of the operation is saved for the backward pass.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlinear
      >>> def block(x, weight):
      ...     return jnp.tanh(jaxlinear.linear(x, weight))
      >>> block = jax.checkpoint(block, policy=jaxlinear.save_linear_outputs)
      >>> jax.grad(lambda x: block(x, jnp.ones((2, 3))).sum())(jnp.zeros(3))
      Array([2., 2., 2.], dtype=float32)
    """
    if primitive is every_mode_p and parameters["op"].vjp is _linear:
        return True
    return _named(primitive, *types, **parameters)
