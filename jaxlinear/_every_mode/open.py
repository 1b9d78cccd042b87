"""Primitives that show what they compute to interpreters that do not know them.

JAX has one word for "look inside": the parameter ``call_jaxpr``, a program. checkify
and roofline enter it, and any interpreter of JAX's own calls can. Without it, checkify
would miss a NaN in silence, and roofline would count nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

# A context that is part of the key of JAX's caches.
_is_open = jax.make_user_context(default_value=False)


def is_open():
    """Whether a ``call_jaxpr`` is traced, which has only JAX's own primitives."""
    return _is_open.value


class OpenPrimitive(Primitive):
    """A primitive whose equations carry what they compute, in ``call_jaxpr``.

    Its results are a list of arrays. ``compute`` of arrays and of parameters is jitted
    and returns a tree of them; ``count`` of the parameters is the number of arrays. The
    program is derived from the other parameters each time an equation is made, and is
    there for interpreters: JAX's own rules may ignore it.
    """

    multiple_results = True

    def __init__(self, name: str, compute: Any, count: Callable[..., int]):
        super().__init__(name)
        self._compute, self._count = compute, count

        def computed(*arrays, call_jaxpr, **params):
            return jax.tree.leaves(compute(*arrays, **params))

        self.def_impl(computed)
        self.def_abstract_eval(lambda *_, call_jaxpr, **params: call_jaxpr.out_avals)
        mlir.register_lowering(self, mlir.lower_fun(computed, multiple_results=True))

    def tree(self, *arrays, **params):
        """``compute`` of the arrays as one equation: a tree."""
        results = jax.tree.structure(self.types(*arrays, **params))
        return jax.tree.unflatten(results, self.bind(*arrays, **params))

    def types(self, *arrays, **params):
        """The types of what ``compute`` returns: a tree."""
        return self._program(arrays, params).out_info

    def bind(self, *arrays, call_jaxpr=None, subfuns=(), **params):
        if subfuns:
            return self._bind_checked(arrays, *subfuns, **params)
        program = self._program(arrays, params).jaxpr
        return super().bind(*arrays, call_jaxpr=program, **params)

    def to_lojax(self, *arrays, call_jaxpr, **params):
        """What JAX's next implementation of ``jax.checkpoint`` asks of a primitive.

        It does where ``compute`` has one in it.
        """
        return jax.tree.leaves(self._compute(*arrays, **params))

    def _program(self, arrays, params):
        with _is_open(True):
            program = self._compute.trace(*map(jax.typeof, arrays), **params)
        if len(program.jaxpr.in_avals) != len(arrays):  # It became an argument.
            raise TypeError(
                f"the function of {self.name} must not close over a traced array: make"
                " it an argument"
            )
        return program

    def _bind_checked(self, values, checked, **params):
        """What checkify binds: ``checked`` is ``call_jaxpr`` with its checks.

        Errors that were found earlier come first, then our arrays. The results are
        those of the primitive, which has derivatives of its own; the program runs
        beside it, for the errors.
        """
        arrays = values[len(values) - self._count(**params) :]
        results = self.bind(*arrays, **params)
        found = checked.call_wrapped(*map(lax.stop_gradient, values))
        return [*found[: len(found) - len(results)], *results]
