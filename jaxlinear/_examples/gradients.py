"""The gradient of each example: its squared norm, and what a clipped sum is made of."""

from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear._examples.factors import norm_dtype, squared_norm, sum_of_squares
from jaxlinear._examples.program import Path, Traced, Walk, evaluate
from jaxlinear._examples.uses import Parameter, Use, arranged
from jaxlinear._op.sharding import is_traced_with_explicit_axes
from jaxlinear._product import accumulator_dtype


class Plan(NamedTuple):
    """Which parameters' gradients are read from their uses.

    Attributes:
      uses: all uses, by their path.
      factored: the numbers of the parameters with no other use.
      at_once: those of them whose norm is taken where the backward pass meets the use.
      rest: the numbers of the parameters with other uses.
    """

    uses: dict[Path, Use]
    factored: frozenset[int]
    at_once: frozenset[int]
    rest: tuple[int, ...]

    @staticmethod
    def of(walk, keeps):
        """``keeps`` says whether G and X are wanted of every use."""
        uses_of = defaultdict(list)
        for use in walk.uses.values():
            for name, parameter in use.parameters.items():
                form = parameter.shapes, use.form(name)
                uses_of[parameter.leaf].append((form, parameter.is_used_once))
        factored, at_once = set(), set()
        for leaf in uses_of.keys() - walk.others:
            forms, once = zip(*uses_of[leaf], strict=True)
            if len({*forms}) == 1:
                factored.add(leaf)
                at_once |= {leaf} if once == (True,) else set()
        rest = walk.others | (uses_of.keys() - factored)
        return Plan(
            walk.uses,
            frozenset(factored),
            frozenset() if keeps else frozenset(at_once),
            tuple(sorted(rest)),
        )

    def names(self, use, leaves):
        return [name for name, p in use.parameters.items() if p.leaf in leaves]

    def taps(self):
        """Zeros, whose cotangents are the norms that are taken at once, and the G."""
        taps = {}
        for path, use in self.uses.items():
            at_once = self.names(use, self.at_once)
            later = self.names(use, self.factored - self.at_once)
            if not at_once and not later:
                continue
            zero = _zeros(use, (), norm_dtype(use.result))
            norms = dict.fromkeys(at_once, zero)
            G = None
            if later:
                result = jax.eval_shape(use.cotangent, use.result)
                G = _zeros(use, result.shape, result.dtype)
            taps[path] = norms, G
        return taps


def _zeros(use, shape, dtype):
    """Zeros for each step of the loops, which vary as the result of the use does."""
    zeros = jnp.zeros((*use.lengths, *shape), dtype)
    axes = tuple(sorted(use.result.manual_axis_type.varying))
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


class Gradients(NamedTuple):
    """Of examples.

    Attributes:
      values: the losses.
      aux: what the loss returns besides.
      norms: the squared norms of the gradients of each parameter.
      factors: what a use kept, and G, by its path.
      rest: the gradients of the parameters that have other uses.
    """

    values: jax.Array
    aux: Any
    norms: list[jax.Array]
    factors: dict[Path, tuple[Any, Any]]
    rest: list[jax.Array]


class Examples:
    """The gradients of ``loss(leaves, example)`` of a batch of examples.

    The loss returns a scalar and something besides.
    """

    def __init__(self, loss, leaves, batch, keeps):
        self.loss, self.leaves, self.batch = loss, leaves, batch
        jax.vmap(lambda example: self._trace(example, keeps))(batch)

    def _trace(self, example, keeps):
        """Read the program of one example."""
        trace = jax.make_jaxpr(self.loss, return_shape=True)
        self.program, result = trace(self.leaves, example)
        self.aux_tree, found = jax.tree.structure(result[1]), Walk()
        jax.eval_shape(lambda leaves: self._run(leaves, example, found)[0], self.leaves)
        self.plan = Plan.of(found, keeps)

    def _run(self, leaves, example, walk):
        arguments = [Traced(leaf, Parameter(k)) for k, leaf in enumerate(leaves)]
        arguments += map(Traced, jax.tree.leaves(example))
        loss, *aux = evaluate(self.program, arguments, walk)
        (value,), aux = walk.values([loss]), [a.value for a in aux]
        return value, (walk.kept, self.aux_tree.unflatten(aux))

    def _tapped(self, leaves, taps, rest, example):
        every = [*leaves]
        for leaf, value in zip(self.plan.rest, rest, strict=True):
            every[leaf] = value
        return self._run(every, example, Walk(_tapped, taps))

    def _found(self, value, kept_and_aux, cotangents):
        """The gradient of an example, from the cotangents of its taps."""
        (kept, aux), (taps, rest) = kept_and_aux, cotangents
        factors = {p: (kept.get(p), G) for p, (_, G) in taps.items() if G is not None}
        at_once = {p: norms for p, (norms, _) in taps.items()}
        norms = _norms(self.plan, len(self.leaves), at_once, factors, rest)
        return Gradients(value, aux, norms, factors, rest)

    def gradients(self):
        """The gradients, from one backward pass."""
        taps, rest = self.plan.taps(), [self.leaves[k] for k in self.plan.rest]

        def one(example):
            def tapped(taps, rest):
                return self._tapped(self.leaves, taps, rest, example)

            value, pull, kept_and_aux = jax.vjp(tapped, taps, rest, has_aux=True)
            return self._found(value, kept_and_aux, pull(jnp.ones_like(value)))

        return jax.vmap(one)(self.batch)

    def gradients_and_pull(self):
        """The gradients, and what pulls weights of the losses back to the leaves.

        Both are backward passes of one forward pass.
        """
        taps = self.plan.taps(), [self.leaves[k] for k in self.plan.rest]
        taps = jax.vmap(lambda _: taps)(self.batch)

        def tapped(leaves, taps):
            one: Any = jax.vmap(self._tapped, (None, 0, 0, 0))
            return one(leaves, *taps, self.batch)

        values, pull, kept_and_aux = jax.vjp(tapped, self.leaves, taps, has_aux=True)
        _, cotangents = pull(jnp.ones_like(values))
        each: Any = jax.vmap(self._found)
        found = each(values, kept_and_aux, cotangents)

        def gradient(weights, is_counted):
            grads, _ = pull(weights.astype(values.dtype))
            for leaf, rest in zip(self.plan.rest, found.rest, strict=True):
                grads[leaf] = _sum_of_rest(rest, weights, is_counted)
            return grads

        return found, gradient

    def weighted_sum(self, found, weights, is_counted):
        """The sum of the gradients with these weights, from their factors."""
        plan = self.plan
        grads: list[Any] = [jnp.zeros_like(leaf) for leaf in self.leaves]
        for leaf, rest in zip(plan.rest, found.rest, strict=True):
            grads[leaf] = _sum_of_rest(rest, weights, is_counted)
        for path, (kept, G) in found.factors.items():
            use = plan.uses[path]
            kept = jax.tree.map(partial(_where, is_counted), kept)
            both = kept, _weighted(G, weights, is_counted)
            for name, parameter in use.parameters.items():
                if parameter.leaf in plan.factored:
                    grads[parameter.leaf] += _gradient_of_use(
                        use, name, parameter, both
                    )
        return grads

    def gradient_of_counted(self, weights, is_counted):
        """The gradient of the sum of the weighted losses."""
        # 0 times the NaN of an example that does not count is NaN: the first that does
        # is in its place.
        numbers = jnp.arange(len(weights))
        if is_traced_with_explicit_axes(is_counted):
            numbers = jax.sharding.reshard(numbers, jax.typeof(is_counted).sharding)
        is_first = numbers == jnp.argmax(is_counted)

        def counted(array):
            if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                data = counted(jax.random.key_data(array))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
            zeros = jnp.zeros_like(array)
            first = jnp.where(_along_first(is_first, array), array, zeros)
            first = jnp.sum(first, 0, dtype=array.dtype, keepdims=True)
            return jnp.where(_along_first(is_counted, array), array, first)

        batch = jax.tree.map(counted, self.batch)

        def total(leaves):
            losses, _ = jax.vmap(lambda example: self.loss(leaves, example))(batch)
            return jnp.sum(losses * weights.astype(losses.dtype))

        is_any = jnp.any(is_counted)
        return [jnp.where(is_any, g, 0) for g in jax.grad(total)(self.leaves)]


def _tapped(use, tap, arguments, Y):
    """Y, whose backward pass gives the tap its norms and G."""
    # Its structure, as the tracers themselves would leak into the rule.
    names, keeps = tuple(tap[0]), tap[1] is not None

    @jax.custom_vjp
    def identity(Y, kept, tap):
        return Y

    def forward(Y, kept, tap):
        return Y, kept

    def backward(kept, G):
        arranged_G = use.cotangent(G)
        one = jax.tree.map(lambda a: arranged((), a)[0], (kept, arranged_G))
        found = {name: squared_norm([use.factors(name, *one)]) for name in names}
        return G, None, (found, arranged_G if keeps else None)

    identity.defvjp(forward, backward)
    kept = use.kept(*arguments)
    return identity(Y, kept, tap), kept if keeps else None


def _norms(plan, count, at_once, factors, rest):
    """The squared norm of the gradient of each parameter."""
    norms: list[Any] = [jnp.zeros((), "float32")] * count
    uses_of = defaultdict(list)
    for path, use in plan.uses.items():
        for name, parameter in use.parameters.items():
            if parameter.leaf in plan.at_once:
                norms[parameter.leaf] = jnp.sum(at_once[path][name])
            elif parameter.leaf in plan.factored:
                arrays = jax.tree.map(partial(arranged, parameter.loops), factors[path])
                uses_of[parameter.leaf].append((use, name, arrays))
    for leaf, uses in uses_of.items():
        norms[leaf] = jnp.sum(_norms_of_slices(uses))
    for leaf, gradient in zip(plan.rest, rest, strict=True):
        norms[leaf] = sum_of_squares(gradient)
    return norms


def _norms_of_slices(uses):
    def norm(arrays):
        pairs = zip(uses, arrays, strict=True)
        return squared_norm([use.factors(name, *one) for (use, name, _), one in pairs])

    return of_slices(norm, [arrays for _, _, arrays in uses])


def of_slices(function, arrays):
    """``function`` of each slice of the arrays (slices, ...), one after the other."""
    if jax.tree.leaves(arrays)[0].shape[0] == 1:
        return function(jax.tree.map(lambda a: a[0], arrays))[None]
    return lax.map(function, arrays)


def _sum_of_rest(gradients, weights, is_counted):
    """The weighted sum of gradients (batch, ...) of one parameter."""
    wide = accumulator_dtype(gradients.dtype)
    weighted = _weighted(gradients, weights, is_counted)
    return jnp.sum(weighted, 0, dtype=wide).astype(gradients.dtype)


def _weighted(array, weights, is_counted):
    wide = accumulator_dtype(array.dtype)
    factors = _along_first(weights.astype(wide), array)
    return _where(is_counted, (array.astype(wide) * factors).astype(array.dtype))


def _where(is_counted, array):
    # Not 0 times what does not count, which may be NaN.
    return jnp.where(_along_first(is_counted, array), array, 0)


def _along_first(vector, array):
    return jnp.expand_dims(vector, range(1, array.ndim))


def _gradient_of_use(use, name, parameter, kept_and_G):
    """The gradient of a batch with respect to one parameter of a use."""
    loops = parameter.loops
    arrays = jax.tree.map(lambda a: arranged(loops, a, axes_before=1), kept_and_G)
    grad = of_slices(lambda both: use.gradient(name, *both), arrays)
    sizes = [n for n, is_sliced in zip(use.lengths, loops, strict=True) if is_sliced]
    return parameter.pulled_back(grad.reshape(*sizes, *grad.shape[1:]))
