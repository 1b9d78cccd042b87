"""What programs of ours have beside JAX's own primitives."""

from jax.extend.core import Primitive

from jaxlinear._linear_map import linear_map_p

PRIMITIVES: tuple[Primitive, ...] = (linear_map_p,)
"""The primitives of this package, for libraries that interpret programs.

Each of their equations has a parameter ``call_jaxpr``: what it computes, as a program
of JAX's own primitives. A library that has one rule for each primitive is told with
it::

    def rule(*arrays, call_jaxpr, **_):
        return interpret(jax.extend.core.jaxpr_as_fun(call_jaxpr))(*arrays)

A rule has a list of results. For what has no rules to register,
:func:`jaxlinear.plain_autodiff` makes the layer the naive formula.
"""
