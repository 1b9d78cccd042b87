"""Taylor series through the layer: a rule for `jax.experimental.jet`."""

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.experimental.jet import jet, jet_rules
from jax.extend.core.primitives import cond_p, name_p

from jaxlinear._by_platform import by_platform_p
from jaxlinear._linear_map import linear_map_p, slots_of


def _jet(primals, series, *, kind, tree, levels, **_):
    """The series of a product: each term is a sum of those before it."""
    arguments = [[p, *s] for p, s in zip(primals, series, strict=True)]
    slots = slots_of(tree)
    residual_slots, operand_slots = tree.unflatten(slots)
    # An operand that is multiplied by no residual stands beside the value of one only.
    alone = [
        s for s, t in zip(operand_slots, kind.terms, strict=True) if t.residual is None
    ]

    def term(i, j):
        """Coefficient number i of the residuals with number j of the operands."""
        chosen = []
        for slot, coefficients in zip(slots, arguments, strict=True):
            a = coefficients[i if slot in residual_slots else j]
            chosen.append(jnp.zeros_like(a) if i > 0 and slot in alone else a)
        return linear_map_p.bind(*chosen, kind=kind, tree=tree, levels=levels)[0]

    first, *rest = (
        sum(term(i, order - i) for i in range(order + 1))
        for order in range(len(arguments[0]))
    )
    return [first], [rest]


jet_rules[linear_map_p] = _jet


def _jet_of_form(primals, series, *, call_jaxpr, **_):
    function = jax.extend.core.jaxpr_as_fun(call_jaxpr)
    return jet(function, primals, series, factorial_scaled=False)


jet_rules[by_platform_p] = _jet_of_form


def _jet_of_name(primals, series, **parameters):
    """The checkpoint name of Y in its derivative: the series is that of the array."""
    return name_p.bind(*primals, **parameters), series[0]


def _jet_of_choice(primals, series, *, branches, branches_platforms=None, **_):
    """A choice of platform, and any other: the series of each branch."""
    index, *operands = primals

    def of(branch):
        function = jax.extend.core.jaxpr_as_fun(branch)
        return lambda *both: jet(function, *both, factorial_scaled=False)

    functions, both = [of(branch) for branch in branches], (operands, series[1:])
    if branches_platforms is None:
        return lax.switch(index, functions, *both)
    named = list(zip(functions, branches_platforms, strict=True))
    (default,) = (function for function, names in named if names is None)
    forms = {name: function for function, names in named for name in names or ()}
    return lax.platform_dependent(*both, default=default, **forms)


# JAX has none for its own.
jet_rules.setdefault(name_p, _jet_of_name)
jet_rules.setdefault(cond_p, _jet_of_choice)
