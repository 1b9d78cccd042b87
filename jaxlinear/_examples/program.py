"""A loss as a program, in which the uses of parameters are found and tapped.

The walk follows the parameters through JAX's jitted functions, loops and checkpoints.
Everything else is evaluated as it is, and a parameter that goes into it is one of the
``others``, whose gradients JAX computes: what the walk does not know cannot make a
result wrong.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jaxlinear._every_mode import every_mode_p
from jaxlinear._examples.uses import (
    STEPS,
    Linear,
    Lookup,
    Matrix,
    Parameter,
    Use,
    is_real,
)
from jaxlinear._op.sharding import has_explicit_axes

Path = tuple[int, ...]
"""Where an equation is: the numbers of the equations around it, and its own."""


@dataclass
class Walk:
    """What a walk finds, and what it does there.

    Attributes:
      tap: called with a use, its tap, its arguments and its result. It returns a result
        in the place of that, and what is kept, or None.
      taps: trees of arrays, by the path of the use. In a loop they are those of a step.
      kept: what ``tap`` kept, by the path. Loops stack it.
      uses: the uses, by the path.
      others: the numbers of the parameters that are used otherwise.
    """

    tap: Callable[..., Any] | None = None
    taps: dict[Path, Any] = field(default_factory=dict)
    kept: dict[Path, Any] = field(default_factory=dict)
    uses: dict[Path, Use] = field(default_factory=dict)
    others: set[int] = field(default_factory=set)

    def with_taps(self, taps):
        """The walk through a program that is called with these taps."""
        return Walk(self.tap, taps, {}, self.uses, self.others)

    def taps_in(self, path):
        return {p: tap for p, tap in self.taps.items() if p[: len(path)] == path}

    def values(self, results):
        """The values of results, in which parameters are no longer followed."""
        self.others.update(r.parameter.leaf for r in results if r.parameter)
        return [r.value for r in results]

    def tapped(self, path, use, arguments, result):
        self.uses[path] = use
        if self.tap is None or path not in self.taps:
            return result
        result, kept = self.tap(use, self.taps[path], arguments, result)
        if kept is not None:
            self.kept[path] = kept
        return result


class Traced(NamedTuple):
    """A value, and the parameter that it is, or None."""

    value: Any
    parameter: Parameter | None = None


class Place(NamedTuple):
    """The path to a program, and how often each loop around it runs."""

    path: Path = ()
    lengths: tuple[int, ...] = ()


HERE = Place()


def evaluate(program, arguments, walk, place=HERE):
    """The results of a program of ``Traced`` arguments, as a list of these."""
    program = program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())
    constants = map(Traced, program.consts)
    of = dict(zip(program.jaxpr.constvars, constants, strict=True))
    of |= zip(program.jaxpr.invars, arguments, strict=True)

    def read(atom):
        return Traced(atom.val) if isinstance(atom, Literal) else of[atom]

    for number, equation in enumerate(program.jaxpr.eqns):
        path = (*place.path, number)
        found = _results(
            program, equation, [*map(read, equation.invars)], walk, place, path
        )
        of |= zip(equation.outvars, found, strict=True)
    return [*map(read, program.jaxpr.outvars)]


def _results(program, equation, arguments, walk, place, path):
    values = [a.value for a in arguments]
    parameters = [a.parameter for a in arguments]
    name = equation.primitive.name
    enter = _ENTERED.get(name)
    if enter and any(parameters):
        return enter(equation, arguments, walk, place._replace(path=path))
    results = [*map(Traced, _value(program, equation)(*values))]
    if not any(parameters) or name == "stop_gradient":
        return results
    use = None
    if name in STEPS | _USES.keys() and _has_factors(equation.outvars[0].aval):
        if name in STEPS and len(values) == 1:
            return [results[0]._replace(parameter=parameters[0].after(equation))]
        kind = _USES.get(name)
        use = kind.of(equation, parameters, place.lengths) if kind else None
    if use is None:
        walk.others.update(p.leaf for p in parameters if p)
        return results
    return [Traced(walk.tapped(path, use, values, results[0].value))]


def _has_factors(result):
    """Whether a parameter is followed into a result of this type.

    The factors of a complex result are those of a complex gradient, of which a real
    parameter has the real part. An integer has no gradient. On a mesh with explicit
    axes the types of factors would have to be split too.
    """
    return is_real(result) and not has_explicit_axes(result.sharding.mesh)


def _value(program, equation):
    """The function of one equation."""
    of_variables = [not isinstance(v, Literal) for v in equation.invars]
    names = [*itertools.compress(equation.invars, of_variables)]
    alone = program.jaxpr.replace(
        constvars=[],
        invars=[*dict.fromkeys(names)],
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
    )
    function = jaxpr_as_fun(ClosedJaxpr(alone, ()))

    def value(*values):
        of = dict(zip(names, itertools.compress(values, of_variables), strict=True))
        return function(*of.values())

    return value


_USES = {every_mode_p.name: Linear, "dot_general": Matrix, "gather": Lookup}


# What is entered: evaluated by the walk, under the same function of JAX's.


def _enter_jit(equation, arguments, walk, place):
    return evaluate(equation.params["jaxpr"], arguments, walk, place)


def _enter_checkpoint(equation, arguments, walk, place):
    params = equation.params
    parameters = [a.parameter for a in arguments]
    through = []  # Modules of NNX return their parameters.

    @partial(jax.checkpoint, policy=params["policy"], prevent_cse=params["prevent_cse"])
    def body(values, taps):
        inside = walk.with_taps(taps)
        arguments = map(Traced, values, parameters)
        results = evaluate(params["jaxpr"], arguments, inside, place)
        through[:] = [r.parameter for r in results]
        return [r.value for r in results], inside.kept

    results, kept = body([a.value for a in arguments], walk.taps_in(place.path))
    walk.kept |= kept
    return map(Traced, results, through)


def _enter_scan(equation, arguments, walk, place):
    params = equation.params
    body = params["jaxpr"]
    # What has one axis more outside is an array of the elements of each step.
    carried = _count_of_same_rank(equation.outvars, body.jaxpr.outvars)
    whole = _count_of_same_rank(equation.invars, body.jaxpr.invars)
    constants, carry, xs = (
        arguments[: whole - carried],
        arguments[whole - carried : whole],
        arguments[whole:],
    )
    initial = walk.values(carry)
    inner = [_in_loop(a, is_sliced=False) for a in constants]
    inner += [None] * len(carry)
    inner += [_in_loop(a, is_sliced=True) for a in xs]
    place = Place(place.path, (*place.lengths, params["length"]))
    through = []

    def step(carry, slices):
        elements, taps = slices
        inside = walk.with_taps(taps)
        values = [*(a.value for a in constants), *carry, *elements]
        results = evaluate(body, map(Traced, values, inner), inside, place)
        stacks = [r.parameter and r.parameter.out_of_loop() for r in results[carried:]]
        through[:] = [None] * carried + stacks
        inside.values([r for r, p in zip(results, through, strict=True) if not p])
        results = [r.value for r in results]
        return results[:carried], (results[carried:], inside.kept)

    carry, (ys, kept) = lax.scan(
        step,
        initial,
        ([a.value for a in xs], walk.taps_in(place.path)),
        params["length"],
        params["reverse"],
        params["unroll"],
    )
    walk.kept |= kept
    return map(Traced, [*carry, *ys], through)


def _in_loop(argument, is_sliced):
    return argument.parameter and argument.parameter.in_loop(is_sliced)


def _count_of_same_rank(outer, inner):
    pairs = zip(outer, inner, strict=True)
    return sum(o.aval.ndim == i.aval.ndim for o, i in pairs)


_ENTERED = {
    "jit": _enter_jit,
    "checkpoint": _enter_checkpoint,
    "remat2": _enter_checkpoint,
    "scan": _enter_scan,
}
