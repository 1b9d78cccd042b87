"""Random programs around the layer, of which none may fail or give another value.

The neighbours of a product decide what XLA makes of it: which transposes it folds into
the product, and whether it then has code to run it. So each case draws the neighbours.
"""

import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from oracle import wide

import jaxlinear
from jaxlinear import Product, Products, linear

BASE_SEED, CASES_PER_PROGRAM = 0, 50

# dtype of x, of the parameters, and ``dtype=``
BFLOAT16 = [
    ("bfloat16", "bfloat16", None),
    ("float32", "float32", "bfloat16"),
    ("bfloat16", "float32", "bfloat16"),
]
OTHERS = [("float32", "float32", None), ("float16", "float16", None)]

# What results go through. None makes two values more different than they were, and
# NumPy's arrays, which the oracle gives, have all of them too.
OPERATIONS = {
    "": lambda a: a,
    "negate": operator.neg,
    "abs": abs,
    "bfloat16": lambda a: a.astype("bfloat16"),
    "float32": lambda a: a.astype("float32"),
    "merge": lambda a: a.reshape(math.prod(a.shape[:-1]), a.shape[-1]),
}


# By how much rounding two operands moves a product, relative: float8 by the unit
# roundoffs of e5m2 and e4m3 at most, int8 by much less where no row has an outlier.
RECIPES = {"FLOAT8": 1 / 8 + 1 / 16, "INT8": 0.06}


class Case(NamedTuple):
    """A program, of gradients or of a tangent.

    Each axis is a letter: a, b and c lead, i and o are the features.

    u, v and w are the axes of the maps, of which u is the innermost.
    """

    number: int
    dtypes: tuple
    leaves_in: str | None  # the dtype in which each product leaves its accumulator
    recipe: str | None  # of 8 bits
    sizes: dict  # of each axis
    maps: dict  # "vmap" or "scan" for each of u, v and w
    arguments: dict  # the axes of x, weight, bias and cotangent, in their order
    arrivals: dict  # the same, before the program transposes them
    results: dict  # the axes of Y and of the gradients of x, weight and bias
    operations: dict  # for each result, those before and after it is transposed
    order: list  # of the axes of the transposed results
    cast: list  # arguments that arrive in float32
    constants: list  # arguments that the program closes over
    gradient_of_map: bool  # rather than map of gradients
    checkpoint: bool
    moving: list  # in forward mode, the arguments that have a tangent


def draws(number):
    """What a case is drawn with: a generator, and three ways to choose."""
    rng = np.random.default_rng((BASE_SEED, number))

    def choice(values):
        return values[rng.integers(len(values))]

    def chance(probability):
        return bool(rng.random() < probability)

    def some_of(names, probability=0.5):
        return [n for n in names if chance(probability)] or [choice(names)]

    return rng, choice, chance, some_of


def random_case(number):
    rng, choice, chance, some_of = draws(number)

    def with_axis(axes, new, maps):
        place = 0 if maps[new] == "scan" else rng.integers(len(axes) + 1)
        return axes[:place] + new + axes[place:]

    maps = ["vmap"] * choice([0, 1, 1, 2])
    if chance(0.15):
        maps.insert(rng.integers(len(maps) + 1), "scan")
    maps = dict(zip("uvw", maps, strict=False))
    leading = "abc"[: rng.integers(4)]
    sizes = {"a": math.inf}
    while math.prod(sizes.values()) > 2**20:
        rows = [1, 2, 3, 5, 8, 33, 64]
        sizes = {a: 0 if chance(0.02) else choice(rows) for a in leading}
        sizes |= {a: choice([1, 2, 3, 8, 16, 64, 100, 256]) for a in "io"}
        sizes |= {a: choice([1, 2, 3]) if maps[a] == "vmap" else 2 for a in maps}
    axes = {"x": leading + "i", "weight": "oi"} | ({"bias": "o"} if chance(0.6) else {})
    arguments = axes | {"cotangent": leading + "o"}
    results = {"Y": leading + "o"} | axes
    wanted, gradient_of_map = some_of([*results], 0.3), chance(0.3)
    for new in maps:
        for name in some_of([*axes] if gradient_of_map else [*arguments]):
            arguments[name] = with_axis(arguments[name], new, maps)
        results = {n: with_axis(a, new, maps) for n, a in results.items()}
    if gradient_of_map:
        results = arguments | {"Y": results["Y"]}
        arguments["cotangent"] = results["Y"]
    dtypes = choice(BFLOAT16 if chance(0.8) else OTHERS)
    low = dtypes[2] or dtypes[0]

    def shuffled(axes):
        return "".join(rng.permutation([*axes])) if chance(0.5) else axes

    def two_operations():
        return [choice([*OPERATIONS]) if chance(0.4) else "" for _ in "01"]

    recipe = choice([*RECIPES]) if chance(0.15) else None
    case = Case(
        number=number,
        dtypes=dtypes,
        leaves_in=choice([low, "float32"]) if chance(0.3) and not recipe else None,
        recipe=recipe,
        sizes=sizes,
        maps=maps,
        arguments=arguments,
        arrivals={name: shuffled(axes) for name, axes in arguments.items()},
        results={name: results[name] for name in wanted},
        operations={name: two_operations() for name in wanted},
        order=rng.permutation(7).tolist() if chance(0.7) else [*range(7)],
        cast=some_of([*arguments]) if chance(0.1) else [],
        constants=some_of([*arguments]) if chance(0.2) else [],
        gradient_of_map=gradient_of_map,
        checkpoint=chance(0.1),
        moving=[],
    )
    moving = [name for name in wanted if name != "Y"]
    if not moving or chance(0.7):
        return case
    kept = [name for name in case.results if name == "Y"] + ["tangent"]
    axes = case.results.get("Y", results["Y"])
    return case._replace(
        moving=moving,
        results=dict.fromkeys(kept, axes),
        operations={name: two_operations() for name in kept},
    )


def direction(case, name, a, maps=True):
    """The tangent of an argument: itself, with the features in the other order."""
    axes = [axis for axis in case.arguments[name] if maps or axis not in case.maps]
    features = axes.index("o" if name == "bias" else "i")
    return a[(*[slice(None)] * features, slice(None, None, -1))]


def argument_values(case):
    """NumPy arrays, each of the dtype in which the layer is given it.

    Their values are of the dtype in which it multiplies: where XLA sees a cast to
    bfloat16 and back, it may leave out both.
    """
    rng = np.random.default_rng((BASE_SEED, case.number, 1))
    x_dtype, parameter_dtype, dtype = case.dtypes
    multiplied = dtype or x_dtype
    dtypes = {"x": x_dtype, "cotangent": multiplied}
    values = {}
    for name, axes in case.arguments.items():
        value = rng.normal(size=[case.sizes[a] for a in axes]).astype(multiplied)
        values[name] = value.astype(dtypes.get(name, parameter_dtype))
    return values


def program(case):
    """The function of the case, and the arguments that it does not close over."""

    def layer(arguments):
        x, weight, bias = (arguments.get(name) for name in ("x", "weight", "bias"))
        products = Products(*3 * [Product(preferred_element_type=case.leaves_in)])
        products = getattr(jaxlinear, case.recipe) if case.recipe else products
        Y = linear(x, weight, bias, dtype=case.dtypes[2], products=products)
        return {"Y": Y}

    def with_gradients(function):
        def forward(arguments):
            fixed = dict(arguments)
            moving = {name: fixed.pop(name) for name in case.moving}
            outside = case.gradient_of_map
            tangents = {n: direction(case, n, a, outside) for n, a in moving.items()}
            results, tangent = jax.jvp(
                lambda moving: function(fixed | moving), (moving,), (tangents,)
            )
            results = results | {"tangent": tangent["Y"]}
            return {name: results[name] for name in case.results}

        def run(arguments):
            fixed = dict(arguments)
            moving = {name: fixed.pop(name) for name in case.results if name != "Y"}
            G = {"Y": fixed.pop("cotangent")}
            results, vjp = jax.vjp(lambda moving: function(fixed | moving), moving)
            results = results | vjp(G)[0]
            return {name: results[name] for name in case.results}

        function = jax.checkpoint(function) if case.checkpoint else function
        return forward if case.moving else run

    def mapped(function, new, results):
        def places(axes):
            inside = {n: [a for a in axes[n] if a <= new] for n in axes}
            return {n: a.index(new) if new in a else None for n, a in inside.items()}

        def vmap(arguments):
            in_axes = places({name: case.arguments[name] for name in arguments})
            return jax.vmap(function, (in_axes,), places(results))(arguments)

        def scan(arguments):
            moving = {n: a for n, a in arguments.items() if new in case.arguments[n]}
            fixed = {n: a for n, a in arguments.items() if n not in moving}
            return lax.scan(lambda _, m: (None, function(fixed | m)), None, moving)[1]

        return {"vmap": vmap, "scan": scan}[case.maps[new]]

    function = layer if case.gradient_of_map else with_gradients(layer)
    results = case.results
    if case.gradient_of_map:
        results = {"Y": case.arguments["cotangent"]}
    for new in case.maps:
        function = mapped(function, new, results)
    if case.gradient_of_map:
        function = with_gradients(function)
    values = argument_values(case)

    def run(arriving):
        arguments = {}
        for name, a in (arriving | constants).items():
            arrival, axes = case.arrivals[name], case.arguments[name]
            a = jnp.asarray(a).astype(values[name].dtype)
            arguments[name] = a.transpose([arrival.index(axis) for axis in axes])
        return {n: finished(case, n, a) for n, a in function(arguments).items()}

    arriving = {}
    for name, a in values.items():
        arrival, axes = case.arrivals[name], case.arguments[name]
        a = a.transpose([axes.index(axis) for axis in arrival])
        arriving[name] = a.astype("float32") if name in case.cast else a
    constants = {name: arriving.pop(name) for name in case.constants}
    return run, arriving


def finished(case, name, result):
    before, after = (OPERATIONS[operation] for operation in case.operations[name])
    result = before(result)
    return after(result.transpose([k for k in case.order if k < result.ndim]))


PRODUCTS = {
    "Y": ["x", "weight"],
    "x": ["cotangent", "weight"],
    "weight": ["cotangent", "x"],
    "bias": ["cotangent"],
}


def formulas(case, given):
    """Y, its tangent and the gradients, summed over the axes that a result lacks."""
    arguments = dict(given)
    rows = "".join(a for a in case.sizes if a not in "io")
    ones = np.ones([case.sizes[a] for a in rows])

    def product(names, result):
        axes = ",".join([*(case.arguments[name] for name in names), rows])
        operands = [*(arguments[name] for name in names), ones]
        return np.einsum(f"{axes}->{result}", *operands, optimize=True)

    def tangent(axes):
        total = 0
        for name in case.moving:
            arguments[name] = direction(case, name, given[name])
            names = ["bias"] if name == "bias" else ["x", "weight"]
            total = total + product(names, axes)
            arguments[name] = given[name]
        return total

    results = {
        n: tangent(axes) if n == "tangent" else product(PRODUCTS[n], axes)
        for n, axes in case.results.items()
    }
    if "Y" in results and "bias" in arguments:
        results["Y"] = results["Y"] + product(["bias"], case.results["Y"])
    return results


def difference(case, results):
    """What is wrong with the results, or nothing.

    A result is off by one rounding of its own, to ``leaves_in``, in an operation
    before and one after, each at most half an eps of its magnitude; and by that of
    its accumulation in float32, which for n terms grows like √n eps. The magnitude is
    that of a sum of terms of random sign: the root of the sum of their squares.
    """
    given = argument_values(case)
    arguments = {name: wide(a) for name, a in given.items()}
    expected = formulas(case, arguments)
    squares = formulas(case, {name: a**2 for name, a in arguments.items()})

    def eps(dtype):
        return float(jnp.finfo(dtype).eps)

    terms = math.prod(case.sizes.values())
    for name, result in results.items():
        own = given["cotangent" if name in ("Y", "tangent") else name].dtype
        dtypes = [own, case.leaves_in or own]
        dtypes += {"bfloat16", "float32"} & {*case.operations[name]}
        tolerance = 2 * max(map(eps, dtypes)) + math.sqrt(terms) * eps("float32")
        tolerance += RECIPES.get(case.recipe, 0)
        wanted = finished(case, name, expected[name])
        if wanted.shape != result.shape:
            return f"{name} has shape {result.shape} instead of {wanted.shape}"
        error = np.linalg.norm(wide(result) - wide(wanted))
        bound = tolerance * math.sqrt(np.sum(squares[name]))
        if not error <= bound:
            return f"{name} is off by {error / bound:.3g} times the bound"
    return None


def failures(cases):
    """What is wrong with each case that fails, all run as one program.

    ``failures([random_case(number)])`` runs one of them.
    """
    runs, arriving = zip(*map(program, cases), strict=True)

    @jax.jit
    def joint(arriving):
        return [run(a) for run, a in zip(runs, arriving, strict=True)]

    try:
        results = jax.block_until_ready(joint(arriving))
    except Exception as error:
        alone = [f for case in cases for f in failures([case])] if cases[1:] else []
        return alone or [f"{', '.join(map(str, cases))}: {error}"]
    wrong = [difference(c, r) for c, r in zip(cases, results, strict=True)]
    return [f"{case}: {w}" for case, w in zip(cases, wrong, strict=True) if w]
