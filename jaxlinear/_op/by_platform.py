"""A function that has other forms on some platforms, chosen when a program is lowered.

The form on a CPU depends on its instructions and on the number of devices. A program
may be traced before a backend is started, or where there is no CPU backend to ask. So
the question waits until a program is lowered for a CPU. That takes a primitive:
`jax.lax.platform_dependent` traces its functions for all platforms.

Policies of `jax.checkpoint` enter the choice that JAX has, and so find a product that
they save. Checkify, roofline and other interpreters enter ours. Hence two functions.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.jet import jet_rules
from jax.interpreters import ad, batching, mlir

from jaxlinear._every_mode.jet import jet_of_program
from jaxlinear._every_mode.open import OpenPrimitive, is_open


def by_platform(form, *operands):
    """``form.plain(*operands)``, or ``form.on(platform, is_alone, *operands)``.

    Both return one array of the same type, and differ on ``form.platforms``. The form
    has a hash, for JAX's caches. ``is_alone`` is False if JAX maps or differentiates
    the function.
    """
    if is_open():
        return form.plain(*operands)
    arrays, tree = jax.tree.flatten(operands)
    return by_platform_p.bind(*arrays, form=form, tree=tree)[0]


def visible_by_platform(form, *operands):
    """The same, visible to policies of ``jax.checkpoint`` on all platforms but CPUs."""
    if is_open():
        return form.plain(*operands)
    forms = {platform: partial(form.on, platform, True) for platform in form.platforms}
    if "cpu" in forms:
        forms["cpu"] = partial(by_platform, form)
    return lax.platform_dependent(*operands, default=form.plain, **forms)


@partial(jax.jit, static_argnames=("form", "tree"), inline=True)
def _plain(*arrays, form, tree):
    return [form.plain(*tree.unflatten(arrays))]


by_platform_p = OpenPrimitive(
    "by_platform", _plain, lambda *, tree, **_: tree.num_leaves
)


def _on(platform, *arrays, form, tree, call_jaxpr):
    return [form.on(platform, True, *tree.unflatten(arrays))]


for _platform in "cpu", "cuda", "rocm", "tpu":
    _rule = mlir.lower_fun(partial(_on, _platform), multiple_results=True)
    mlir.register_lowering(by_platform_p, _rule, platform=_platform)


def _jvp(primals, tangents, *, form, tree, call_jaxpr):
    moving = {k: t for k, t in enumerate(tangents) if type(t) is not ad.Zero}

    def differentiated(some):
        arrays = [some.get(k, primal) for k, primal in enumerate(primals)]
        forms = {p: partial(form.on, p, False) for p in form.platforms}
        operands = tree.unflatten(arrays)
        return lax.platform_dependent(*operands, default=form.plain, **forms)

    of = {k: primals[k] for k in moving}
    _, tangent = jax.jvp(differentiated, (of,), (moving,))
    return by_platform_p.bind(*primals, form=form, tree=tree), [tangent]


ad.primitive_jvps[by_platform_p] = _jvp
jet_rules[by_platform_p] = jet_of_program


class _Mapped(NamedTuple):
    """What `jax.vmap` makes of a form."""

    form: Any
    in_axes: Any
    axis_size: int
    spmd_axis_name: Any

    @property
    def platforms(self):
        return self.form.platforms

    def plain(self, *operands):
        return self._mapped(self.form.plain)(*operands)

    def on(self, platform, is_alone, *operands):
        return self._mapped(partial(self.form.on, platform, False))(*operands)

    def _mapped(self, function):
        size, name = self.axis_size, self.spmd_axis_name

        def of_arrays(arrays, tree):
            return function(*tree.unflatten(arrays))

        def mapped(*operands):
            arrays, tree = jax.tree.flatten(operands)
            apply = partial(of_arrays, tree=tree)
            axes = ([*self.in_axes],)
            return jax.vmap(apply, axes, axis_size=size, spmd_axis_name=name)(arrays)

        return mapped


def _batch(axis, arrays, places, *, form, tree, call_jaxpr):
    if all(place is None for place in places):
        return by_platform_p.bind(*arrays, form=form, tree=tree), [None]
    mapped = _Mapped(form, tuple(places), axis.size, axis.spmd_name)
    return by_platform_p.bind(*arrays, form=mapped, tree=tree), [0]


batching.fancy_primitive_batchers[by_platform_p] = _batch
