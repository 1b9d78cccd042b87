"""Taylor series: rules for `jax.experimental.jet`."""

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.experimental.jet import jet, jet_rules
from jax.extend.core.primitives import cond_p, name_p

from .linear_map import linear_map_p, names_of
from .op import every_mode_p, names_of_arrays


def jet_of_program(primals, series, *, call_jaxpr, **_):
    """The series of the program that an equation shows."""
    function = jax.extend.core.jaxpr_as_fun(call_jaxpr)
    return jet(function, primals, series, factorial_scaled=False)


def _jet_of_op(primals, series, **params):
    op = params["op"]
    if not op.is_multilinear:
        return jet_of_program(primals, series, **params)
    names, (first, second) = names_of_arrays(op, params["tree"]), op.linear_in
    is_factor = [name not in first for name in names]
    is_added = [name in first and name in second for name in names]
    return _jet_of_products(every_mode_p, primals, series, is_factor, is_added, params)


def _jet_of_linear_map(primals, series, **params):
    """The series of a sum of tangents, each multiplied by one residual or by none."""
    op = params["op"]
    if not op.is_multilinear or op.terms.keys() != {*op.arguments}:
        return jet_of_program(primals, series, **params)
    of_residuals, of_tangents = names_of(op, params["tree"])
    is_factor = [True] * len(of_residuals) + [False] * len(of_tangents)
    is_added = [False] * len(of_residuals)
    is_added += [op.terms[name].residual is None for name in of_tangents]
    return _jet_of_products(linear_map_p, primals, series, is_factor, is_added, params)


def _jet_of_products(primitive, primals, series, is_factor, is_added, params):
    """Each coefficient is a sum of products of those of the factors and of the others.

    What is added to the products is added once.
    """
    coefficients = [[p, *s] for p, s in zip(primals, series, strict=True)]

    def product(i, j):
        chosen = []
        for of_one, first, added in zip(coefficients, is_factor, is_added, strict=True):
            a = of_one[i if first else j]
            chosen.append(jnp.zeros_like(a) if added and i > 0 else a)
        return primitive.bind(*chosen, **params)

    orders = []
    for order in range(len(coefficients[0])):
        products = [product(i, order - i) for i in range(order + 1)]
        orders.append([sum(of_one) for of_one in zip(*products, strict=True)])
    first, *rest = orders
    return first, [list(of_one) for of_one in zip(*rest, strict=True)]


jet_rules[every_mode_p] = _jet_of_op
jet_rules[linear_map_p] = _jet_of_linear_map


# JAX has no rules for two of its own primitives.


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


jet_rules.setdefault(name_p, _jet_of_name)
jet_rules.setdefault(cond_p, _jet_of_choice)
