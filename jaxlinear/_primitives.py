"""The primitives of this package."""

from jax.extend.core import Primitive

from jaxlinear._every_mode import every_mode_p, linear_map_p
from jaxlinear._loss.partitioned import partitioned_p
from jaxlinear._op.by_platform import by_platform_p

PRIMITIVES: tuple[Primitive, ...] = (
    every_mode_p,
    linear_map_p,
    by_platform_p,
    partitioned_p,
)
"""The primitives of this package, for libraries that interpret programs.

Each of their equations has a parameter ``call_jaxpr``: what it computes, as a program
of JAX's own primitives. A library with a rule for each primitive takes one of a few
lines, the same for all::

    def rule(*arrays, call_jaxpr, **_):
        return transformed(jax.extend.core.jaxpr_as_fun(call_jaxpr))(*arrays)

It returns a list of arrays. A library that takes no rules finds products of its own
in :func:`jaxlinear.plain_autodiff`.
"""
