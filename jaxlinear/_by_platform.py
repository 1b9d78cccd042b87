"""A function that has a form of its own on CPUs, chosen when a program is lowered.

The form depends on the CPU's instructions and on the number of devices. A program is
traced before a backend is started, or where there is no CPU backend to ask. So the
question waits until a program is lowered for a CPU. That takes a primitive:
`jax.lax.platform_dependent` traces its functions for all platforms.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

by_platform_p = Primitive("by_platform")


def by_platform(form, *arrays):
    """``form.plain(*arrays)``, and on CPUs ``form.on_cpu(*arrays, is_alone=...)``.

    Both return the same type of array and are linear in each argument that is
    differentiated. ``form`` is a value with a hash, for JAX's caches. ``is_alone`` is
    False where JAX maps or differentiates the function.
    """
    return by_platform_p.bind(*arrays, form=form)


@partial(jax.jit, static_argnames="form", inline=True)
def _plain(*arrays, form):
    return form.plain(*arrays)


def _on_cpu(*arrays, form):
    return form.on_cpu(*arrays, is_alone=True)


by_platform_p.def_impl(jax.jit(by_platform_p.bind, static_argnames="form"))
by_platform_p.def_abstract_eval(
    lambda *a, **p: _plain.trace(*a, **p).jaxpr.out_avals[0]
)
for _platform, _function in {None: _plain, "cpu": _on_cpu}.items():
    _rule = mlir.lower_fun(_function, multiple_results=False)
    mlir.register_lowering(by_platform_p, _rule, platform=_platform)


def _jvp(primals, tangents, *, form):
    def differentiated(*arrays):
        on_cpu = partial(form.on_cpu, is_alone=False)
        return lax.platform_dependent(*arrays, cpu=on_cpu, default=form.plain)

    terms = [
        differentiated(*primals[:k], tangent, *primals[k + 1 :])
        for k, tangent in enumerate(tangents)
        if type(tangent) is not ad.Zero
    ]
    return by_platform(form, *primals), sum(terms[1:], terms[0])


ad.primitive_jvps[by_platform_p] = _jvp


class _Mapped(NamedTuple):
    """What `jax.vmap` makes of a form."""

    form: Any
    in_axes: tuple[int | None, ...]
    axis_size: int
    spmd_axis_name: Any

    def plain(self, *arrays):
        return self._mapped(self.form.plain)(*arrays)

    def on_cpu(self, *arrays, is_alone):
        return self._mapped(partial(self.form.on_cpu, is_alone=False))(*arrays)

    def _mapped(self, function):
        size, name = self.axis_size, self.spmd_axis_name
        return jax.vmap(function, self.in_axes, axis_size=size, spmd_axis_name=name)


def _batch(axis, arrays, places, *, form):
    if all(place is None for place in places):
        return by_platform(form, *arrays), None
    mapped = _Mapped(form, tuple(places), axis.size, axis.spmd_name)
    return by_platform(mapped, *arrays), 0


batching.fancy_primitive_batchers[by_platform_p] = _batch
