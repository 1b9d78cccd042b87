"""Random programs around the loss of a linear layer, judged by NumPy in float64.

Tangents and Hessian-vector products are differences of the oracle's values and
gradients.
"""

import contextlib
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from loss_oracle import (
    as_float64,
    counted,
    divisor,
    exact,
    exact_gradients,
    in_range,
    unfused,
    unfused_logits,
    weights_of,
)
from random_programs import BASE_SEED, draws

from jaxlinear import Product, Products, linear_cross_entropy, linear_log_likelihood

# dtype of h, of the parameters, ``dtype=``, and of the gradients' products.
DTYPES = {
    "float32": ("float32", "float32", None, []),
    "bfloat16": ("bfloat16", "bfloat16", None, []),
    "float16": ("float16", "float16", None, []),
    "mixed": ("bfloat16", "float32", "bfloat16", []),
    "parameters in few bits": ("float32", "bfloat16", "float32", []),
    "cast": ("float32", "float32", "float16", []),
    "products": ("float32", "float32", None, ["bfloat16", "float16", "float32"]),
    "alternative": ("float32", "float32", None, ["alternative_float16"]),
    "float64": ("float64", "float64", None, []),
}
LABELS = ["int8", "uint8", "int16", "uint16", "uint32", "int32", "int32", "int32"]
MODES = {
    "value": 2,
    "vjp": 4,
    "value_and_grad": 3,
    "jvp": 3,
    "Hessian-vector": 2,
    "reverse twice": 1,
    "gradient of a tangent": 1,
}
SECOND_ORDER = {"Hessian-vector", "reverse twice", "gradient of a tangent"}
DIFFERENTIABLE = ["h", "weight", "bias", "weights"]

# Ours may be off by so many times what the loss with logits is off, if that is more
# than this part of the bound: both are sums of roundings of random sign.
TIMES_UNFUSED, PART_OF_BOUND = 4, 1 / 8


class Case(NamedTuple):
    """A program: the loss in a mode, and perhaps in a map."""

    number: int
    kind: str  # a reduction, or "log likelihood"
    dtypes: str
    products: tuple | None  # dtypes of the gradients' products
    precision: str | None
    options: dict
    leading: tuple
    features: int
    classes: int
    spread: float  # of the logits
    label_dtype: str
    names: list  # of the arrays that there are
    weights: str  # dtype of the weights
    mode: str
    moving: list  # what is differentiated
    map: str | None  # "vmap" or "scan"
    maps: dict  # the mapped axis of each array that is mapped
    length: int  # of the map
    gradient_of_map: bool  # rather than map of gradients
    checkpoint: bool
    jit: bool


def random_case(number):
    rng, choice, chance, some_of = draws(number)

    leading, classes, length = (math.inf,), 1, 1
    while math.prod(leading) * classes * length > 2**21:
        leading = tuple(choice([1, 2, 3, 5]) for _ in range(choice([0, 1, 1, 2, 3])))
        if leading and chance(0.4):
            leading = (*leading[1:], choice([0, 1, 33, 511, 512, 513, 1025]))
        borders = [1000, 1023, 1024, 1025, 2049, 2049]
        classes = choice([1, 2, 7, 40, 100] if chance(0.6) else borders)
        classes = 5000 if chance(0.03) else classes
        length = choice([1, 2, 3])
    dtypes = choice(["float32", *DTYPES])
    products = DTYPES[dtypes][3]
    options = {}
    if chance(0.3):
        options["label_smoothing"] = choice([0.1, 0.5, 1.0])
    if chance(0.3):
        options["z_loss"] = choice([1e-3, 0.1])
    kind = choice(["mean", "sum", "none", "none", "log likelihood"])
    if chance(0.5):
        options["ignore_index"] = choice([0, classes - 1, -1, 255, -100, 2**40])
    options = {} if kind == "log likelihood" else options
    if chance(0.3):
        options["soft_cap"] = choice([2.0, 30.0])
    names = ["h", "weight"] + (["bias"] if chance(0.6) else [])
    names += ["weights"] if kind != "log likelihood" and chance(0.5) else []
    weights = choice(["float32", "float32", "bool", "int8", "bfloat16"])
    is_float = weights in ("float32", "bfloat16")
    floating = [n for n in names if n != "weights" or is_float]
    mode = choice([mode for mode, times in MODES.items() for _ in range(times)])
    mapped = choice([None, "vmap", "vmap", "scan"]) if chance(0.6) else None
    case = Case(
        number=number,
        kind=kind,
        dtypes=dtypes,
        products=(choice(products), choice(products)) if products else None,
        precision=choice([None, None, "highest", "default"]),
        options=options,
        leading=leading,
        features=choice([1, 3, 8, 16, 64]),
        classes=classes,
        spread=choice([0.3, 1.0, 3.0]),
        label_dtype=choice(LABELS),
        names=[*names, "labels"],
        weights=weights,
        mode=mode,
        moving=[] if mode == "value" else some_of(floating),
        map=mapped,
        maps={},
        length=length,
        gradient_of_map=mapped is not None and chance(0.4),
        checkpoint=chance(0.15),
        jit=chance(0.8),
    )
    if not mapped:
        return case
    shapes = shapes_of(case)
    with_axis = some_of([n for n in shapes if not n.startswith("along ")])
    if case.gradient_of_map:
        with_axis.append("cotangent")
    if not {*with_axis} & {*case.names}:
        with_axis.append("labels")
    with_axis = sorted({*with_axis})
    maps = {
        n: 0
        if mapped == "scan" or n == "cotangent"
        else int(rng.integers(len(shapes[n]) + 1))
        for n in with_axis
    }
    maps |= {f"along {n}": a for n, a in maps.items() if f"along {n}" in shapes}
    return case._replace(maps=maps)


def shapes_of(case):
    """The shape of each array of a program, without the axis of a map."""
    result = {"mean": (), "sum": (), "log likelihood": (*case.leading, 2)}
    of_all = {
        "h": (*case.leading, case.features),
        "weight": (case.classes, case.features),
        "bias": (case.classes,),
        "weights": case.leading,
        "labels": case.leading,
    }
    shapes = {name: of_all[name] for name in case.names}
    if case.mode in {"jvp", *SECOND_ORDER}:
        shapes |= {f"along {name}": of_all[name] for name in case.moving}
    if case.mode not in {"value", "jvp"}:
        shapes["cotangent"] = result.get(case.kind, case.leading)
    return shapes


def wide_dtype(case):
    return "float64" if case.dtypes == "float64" else "float32"


def operand_dtypes(case):
    """Of the three products."""
    h, _, dtype, _ = DTYPES[case.dtypes]
    gradients = case.products or (dtype or h,) * 2
    return [dtype or h, *(d.replace("alternative_", "") for d in gradients)]


def argument_values(case):
    """NumPy arrays, whose values every operand of the products can have."""
    rng = np.random.default_rng((BASE_SEED, case.number, 1))
    h_dtype, parameter_dtype, *_ = DTYPES[case.dtypes]
    dtypes = {"h": h_dtype, "weight": parameter_dtype, "bias": parameter_dtype}
    values = {}
    for name, shape in shapes_of(case).items():
        axis, of = case.maps.get(name), name.removeprefix("along ")
        if axis is not None:
            shape = (*shape[:axis], case.length, *shape[axis:])
        if name == "labels":
            values[name] = label_values(case, rng, shape)
            continue
        value = rng.normal(size=shape)
        if of == "weight":
            value *= case.spread / math.sqrt(case.features)
        if name == "weights":
            value = np.abs(value) + 0.25
            if name not in case.moving:
                value = np.where(rng.random(shape) < 0.3, 0, value)
        for dtype in [*operand_dtypes(case), "bfloat16"]:
            value = value.astype(jnp.dtype(dtype))
        if name == "cotangent":
            value = value.astype("float32") * rng.choice([1, 1, 2.0**-24])
        of_weights = case.weights if of == "weights" else wide_dtype(case)
        values[name] = value.astype(jnp.dtype(dtypes.get(of, of_weights)))
    return values


def label_values(case, rng, shape):
    dtype = np.dtype(case.label_dtype)
    bounds = np.iinfo(dtype)
    labels = rng.integers(0, min(case.classes, int(bounds.max) + 1), shape)
    strange = np.array([-100, -1, case.classes, 255, bounds.max, bounds.min])
    strange = strange[(strange >= bounds.min) & (strange <= bounds.max)]
    share = rng.choice([0, 0.1, 0.3, 0.3, 1], p=[0.2, 0.3, 0.3, 0.15, 0.05])
    return np.where(
        rng.random(shape) < share, rng.choice(strange, shape), labels
    ).astype(dtype)


# The program.


def fused(case, arrays):
    options = case.options | {"dtype": DTYPES[case.dtypes][2]}
    options["precision"] = case.precision
    if case.products:
        options["products"] = Products(Product(), *map(Product, case.products))
    given = [arrays[name] for name in ("h", "weight", "labels")]
    if case.kind == "log likelihood":
        found = linear_log_likelihood(*given, arrays.get("bias"), **options)
        return jnp.stack([found.negative, found.log_sum_exp], -1), found.prediction
    options |= {"reduction": case.kind, "weights": arrays.get("weights")}
    return linear_cross_entropy(*given, arrays.get("bias"), **options), None


def with_logits(case, arrays):
    h, weight, labels = (arrays[name] for name in ("h", "weight", "labels"))
    forward, *gradients = operand_dtypes(case)
    wide = wide_dtype(case)
    products = Products(
        Product(forward, case.precision, preferred_element_type=wide),
        *(Product(dtype, case.precision) for dtype in gradients),
    )
    arguments, options = (h, weight, labels, arrays.get("bias")), case.options
    losses = unfused(*arguments, products=products, **options)
    if case.kind == "log likelihood":
        bias, cap = arrays.get("bias"), options.get("soft_cap")
        z = unfused_logits(h, weight, bias, products, cap)
        return jnp.stack([losses, jax.nn.logsumexp(z, -1)], -1), jnp.argmax(z, -1)
    is_counted = in_range(labels.astype("int32"), case.classes, options)
    weights = arrays.get("weights", is_counted).astype(wide)
    weights = jnp.where(is_counted, weights, 0)
    if case.kind == "none":
        return weights * losses, None
    whole = jnp.sum(weights) if case.kind == "mean" else jnp.ones((), wide)
    return jnp.sum(weights * losses) / jnp.where(whole == 0, 1, whole), None


def program(case, loss):
    """The function of a dict of arrays that the case is, of a ``loss``."""

    def in_mode(function):
        def run(arrays):
            fixed = dict(arrays)
            moving = {name: fixed.pop(name) for name in case.moving}
            along = {name: fixed.pop(f"along {name}", None) for name in case.moving}

            def value(moving):
                return function(fixed | moving)[0]

            def total(moving):
                return jnp.sum(fixed["cotangent"] * value(moving))

            if case.mode == "value":
                loss, prediction = function(fixed)
                return {"loss": loss, "prediction": prediction}
            if case.mode == "vjp":
                loss, vjp = jax.vjp(value, moving)
                return {"loss": loss} | vjp(fixed["cotangent"])[0]
            if case.mode == "value_and_grad":
                found, gradients = jax.value_and_grad(total)(moving)
                return {"total": found} | gradients
            if case.mode == "jvp":
                loss, tangent = jax.jvp(value, (moving,), (along,))
                return {"loss": loss, "tangent": tangent}
            if case.mode == "Hessian-vector":
                return jax.jvp(jax.grad(total), (moving,), (along,))[1]

            def by_tangent(moving):
                return jax.jvp(total, (moving,), (along,))[1]

            def by_gradient(moving):
                gradients = jax.grad(total)(moving)
                return sum(wide_dot(case, gradients[n], along[n]) for n in moving)

            is_forward = case.mode == "gradient of a tangent"
            return jax.grad(by_tangent if is_forward else by_gradient)(moving)

        return run

    def mapped(function):
        def vmap(arrays):
            in_axes = {name: case.maps.get(name) for name in arrays}
            return jax.vmap(function, (in_axes,))(arrays)

        def scan(arrays):
            moving = {n: a for n, a in arrays.items() if n in case.maps}
            fixed = {n: a for n, a in arrays.items() if n not in case.maps}
            return lax.scan(lambda _, m: (None, function(fixed | m)), None, moving)[1]

        return {None: function, "vmap": vmap, "scan": scan}[case.map]

    function = partial(loss, case)
    if case.gradient_of_map:
        function = mapped(function)
    if case.checkpoint:
        function = jax.checkpoint(function)
    function = in_mode(function)
    return function if case.gradient_of_map else mapped(function)


def wide_dot(case, a, b):
    return jnp.sum(a.astype(wide_dtype(case)) * b.astype(wide_dtype(case)))


# The oracle.


def elements(case, values):
    """The arrays of each element of the map."""
    for k in range(case.length if case.map else 1):
        yield {
            n: np.take(a, k, case.maps[n]) if n in case.maps else a
            for n, a in values.items()
        }


def arguments_of(arrays):
    return arrays["h"], arrays["weight"], arrays["labels"], arrays.get("bias")


def token_weights(case, arrays):
    """What the loss of each token is multiplied by."""
    weights = weights_of(arguments_of(arrays), arrays.get("weights"), case.options)
    return weights, divisor(weights, case.kind)


def exact_value(case, arrays):
    losses, log_sum_exp, _ = exact(*arguments_of(arrays), **case.options)
    if case.kind == "log likelihood":
        return np.stack([losses, log_sum_exp], -1)
    weights, whole = token_weights(case, arrays)
    return weights * losses if case.kind == "none" else (weights * losses).sum() / whole


def exact_total(case, arrays):
    return np.sum(as_float64(arrays["cotangent"]) * exact_value(case, arrays))


def exact_gradient(case, arrays):
    """Of the sum of cotangent times loss, by each array that is differentiated."""
    arguments, cotangent = arguments_of(arrays), as_float64(arrays["cotangent"])
    if case.kind == "log likelihood":
        cotangents, of_log_sum_exp = cotangent[..., 0], cotangent[..., 1]
        found = exact_gradients(
            *arguments,
            cotangents=cotangents,
            of_log_sum_exp=of_log_sum_exp,
            **case.options,
        )
        return dict(zip(DIFFERENTIABLE, found, strict=False))
    weights, whole = token_weights(case, arrays)
    found = exact_gradients(
        *arguments, cotangents=cotangent * weights / whole, **case.options
    )
    losses, *_ = exact(*arguments, **case.options)
    if case.kind == "mean":
        is_counted = counted(arrays["labels"], case.classes, case.options)
        losses = (losses - (weights * losses).sum() / whole) * is_counted / whole
    return dict(zip(DIFFERENTIABLE, (*found, cotangent * losses), strict=True))


STEP = 1e-4


def along(function, case, arrays):
    """The derivative of ``function`` along the directions, by differences.

    Their error is of the fourth order in the step.
    """

    def at(step):
        moved = {
            n: as_float64(arrays[n]) + step * as_float64(arrays[f"along {n}"])
            for n in case.moving
        }
        return function(case, arrays | moved)

    one, two = (jax.tree.map(np.subtract, at(k * STEP), at(-k * STEP)) for k in (1, 2))
    return jax.tree.map(lambda a, b: (8 * a - b) / (12 * STEP), one, two)


def expected(case, arrays):
    """The results of an element of the map."""
    if case.mode in SECOND_ORDER:
        return of_moving(case, along(exact_gradient, case, arrays))
    if case.mode == "value_and_grad":
        total = {"total": exact_total(case, arrays)}
        return total | of_moving(case, exact_gradient(case, arrays))
    results = {"loss": exact_value(case, arrays)}
    if case.mode == "vjp":
        results |= of_moving(case, exact_gradient(case, arrays))
    if case.mode == "jvp":
        results["tangent"] = along(exact_value, case, arrays)
    return results


def of_moving(case, gradients):
    return {name: gradients[name] for name in case.moving}


def is_summed(case, name):
    """Whether the result of a map is the sum of those of its elements."""
    return case.gradient_of_map and (
        name == "total" or (name in case.moving and name not in case.maps)
    )


def eps(dtype):
    return float(jnp.finfo(dtype).eps)


def bounds(case, arrays):
    """By how much rounding may move each result of an element of the map, in norm.

    Let u be the eps of float32 times the root of the number of terms of the longest
    sum. The logits of a row are off by u times the magnitudes of their terms, and so
    is each exponential, relatively. G is a difference, so its terms' magnitudes P are
    summed. For a product of fewer bits, G is off by their eps, in random directions.
    """
    h, weight, labels, bias = arguments_of(arrays)
    classes, ζ = case.classes, case.options.get("z_loss", 0)
    losses, log_sum_exp, z = exact(h, weight, labels, bias, **case.options)
    rows = losses.size
    u = eps(wide_dtype(case)) * (4 + math.sqrt(max(rows, *weight.shape)))
    low = [eps(dtype) for dtype in operand_dtypes(case)[1:]]
    low = [e if e > eps("float32") else 0 for e in low]

    def by_rows(array, *shape):
        return np.abs(as_float64(array)).reshape(rows, *shape)

    X, z, lse = (
        by_rows(h, case.features),
        z.reshape(rows, classes),
        by_rows(log_sum_exp),
    )
    W, B = np.abs(as_float64(weight)), np.zeros(classes)
    B = B if bias is None else np.abs(as_float64(bias))
    terms = (X @ W.T + B).max(-1)
    is_counted = by_rows(counted(labels, classes, case.options))
    weights, whole = np.ones(rows), 1
    if case.kind != "log likelihood":
        weights, whole = token_weights(case, arrays)
    weights = is_counted * by_rows(weights) / whole
    cotangent = arrays.get("cotangent", np.ones(()))
    of_lse = np.zeros(rows)
    if case.kind == "log likelihood":
        pairs = np.broadcast_to(cotangent, (*losses.shape, 2))
        cotangent, of_lse = pairs[..., 0], by_rows(pairs[..., 1])
    cotangent = by_rows(np.broadcast_to(cotangent, losses.shape))
    of_square = 1 + 2 * ζ * (1 + lse)

    def of_terms(factors, of_lse=0.0):
        """P for the rows' factors of the loss and of log Σ exp z."""
        p = np.exp(z - log_sum_exp.reshape(rows, 1))
        is_label = np.asarray(labels).reshape(rows, 1) == np.arange(classes)
        of_row = (factors * of_square + of_lse)[:, None]
        return of_row * p + factors[:, None] * (is_label + 1 / classes)

    def products(P, X, W):
        return {"h": P @ W, "weight": P.T @ X, "bias": P.sum(0)}

    def norms(arrays):
        return {name: np.linalg.norm(a) for name, a in arrays.items()}

    P = of_terms(cotangent * weights, of_lse)
    amplified = u * (1 + terms)
    of_loss = is_counted * amplified * of_square * (1 + 2 * lse + terms)
    found = {"loss": np.linalg.norm(weights * of_loss)}
    if case.kind in ("mean", "sum"):
        found["loss"] = np.sum(weights * of_loss)
    if case.kind == "log likelihood":
        found["loss"] = 2 * np.linalg.norm(amplified * (1 + 2 * lse + terms))
    found["total"] = np.sum(cotangent * weights * of_loss)
    found["total"] += np.sum(of_lse * amplified * (1 + 2 * lse + terms))

    moving = {
        n: np.abs(as_float64(arrays[f"along {n}"]))
        for n in case.moving
        if f"along {n}" in arrays
    }
    dX = moving.get("h", np.zeros(X.shape)).reshape(X.shape)
    dW, dB = moving.get("weight", 0 * W), moving.get("bias", 0 * B)
    dz = (dX @ W.T + X @ dW.T + dB).max(-1)
    dweights = (
        is_counted * by_rows(moving.get("weights", np.zeros(losses.shape))) / whole
    )
    if case.kind == "mean":
        dweights = dweights + weights * dweights.sum()
    curved = 2 * of_square * (1 + 2 / case.options.get("soft_cap", math.inf))
    # Gradients of a gradient are summed in the dtypes of the arguments.
    coarsest = [eps(d) for d in DTYPES[case.dtypes][:2]]
    rounding = amplified + max(*low, *coarsest)
    if case.mode == "jvp":
        of_token = curved * rounding * dz
        both = weights * of_token + dweights * of_loss
        found["tangent"] = (
            np.sum(both) if case.kind in ("mean", "sum") else np.linalg.norm(both)
        )
        if case.kind == "log likelihood":
            found["tangent"] = 2 * np.linalg.norm(of_token)
        return found
    if case.mode in SECOND_ORDER:
        P_2 = (curved * dz * rounding)[:, None] * P
        P_2 += rounding[:, None] * of_terms(cotangent * dweights)
        found |= norms(
            {
                n: a + b
                for (n, a), b in zip(
                    products(P_2, X, W).items(),
                    products(rounding[:, None] * P, dX, dW).values(),
                    strict=True,
                )
            }
        )
        of_token = is_counted * curved * rounding * dz
        own = (
            of_token
            + (weights * of_token + dweights * of_loss).sum()
            + of_loss * dweights.sum()
        )
        found["weights"] = np.linalg.norm(cotangent * is_counted * own / whole)
        return found
    if case.mode == "value":
        return found
    G = np.abs(gradient_of_logits(case, arrays))
    rounded = norms({n: np.sqrt(a) for n, a in products(G**2, X**2, W**2).items()})
    found |= norms(products(amplified[:, None] * P, X, W))
    found["h"] += low[0] * rounded["h"]
    found["weight"] += low[1] * rounded["weight"]
    own = of_loss + (weights * of_loss).sum() * (case.kind == "mean")
    found["weights"] = np.linalg.norm(cotangent * is_counted * own / whole)
    return found


def gradient_of_logits(case, arrays):
    """That is the gradient of h, if the weight is the identity."""
    h, weight, _, bias = arguments_of(arrays)
    Y = as_float64(h) @ as_float64(weight).T
    Y = Y if bias is None else Y + as_float64(bias)
    identity = {"h": Y, "weight": np.eye(case.classes), "bias": None}
    found = exact_gradient(case, arrays | identity)["h"]
    return found.reshape(-1, case.classes)


def difference(case, results, of_unfused):
    """What is wrong with the results, or nothing. ``of_unfused()`` are the others."""
    values = argument_values(case)
    wanted, limits = [], []
    for arrays in elements(case, values):
        wanted.append(expected(case, arrays))
        limits.append(bounds(case, arrays))
    for name in wanted[0]:
        of_float64 = joined(case, name, [element[name] for element in wanted])
        found = as_float64(results[name])
        if found.shape != of_float64.shape:
            return f"{name} has shape {found.shape} instead of {of_float64.shape}"
        own = values[name].dtype if name in case.moving else wide_dtype(case)
        if results[name].dtype != own:
            return f"{name} has dtype {results[name].dtype} instead of {own}"
        size = np.linalg.norm(of_float64)
        bound = sum(limit[name] for limit in limits) + eps(own) * size
        bound += math.sqrt(found.size) * float(jnp.finfo(own).smallest_normal)
        if case.mode in SECOND_ORDER or name == "tangent":
            bound += 1e-9 * size  # Of the differences.
        error = np.linalg.norm(found - of_float64)
        if not error <= bound:
            return f"{name} is off by {error / bound:.3g} times the bound"
        if error > PART_OF_BOUND * bound:
            of_other = np.linalg.norm(as_float64(of_unfused()[name]) - of_float64)
            if error > TIMES_UNFUSED * of_other:
                return (
                    f"{name} is off by {error / of_other:.3g} times what the loss with"
                    f" logits is off, {error / bound:.3g} times the bound"
                )
    return None


def joined(case, name, parts):
    """A result of the map, of those of its elements."""
    if case.map is None:
        return np.asarray(parts[0])
    if is_summed(case, name):
        return np.sum(parts, 0)
    is_gradient = case.gradient_of_map and name in case.moving
    return np.stack(parts, case.maps[name] if is_gradient else 0)


def failure(case):
    """What is wrong with the case, or None: ``failure(random_case(number))``."""
    is_wide = case.dtypes == "float64"
    with jax.enable_x64(True) if is_wide else contextlib.nullcontext():
        arrays = {n: jnp.asarray(a) for n, a in argument_values(case).items()}

        def results(loss, is_jitted=True):
            run = program(case, loss)
            return (jax.jit(run) if is_jitted else run)(arrays)

        try:
            found = results(fused, case.jit)
        except Exception as error:
            return f"{case}: {type(error).__name__} {error}"
        wrong = difference(case, found, partial(results, with_logits))
    return wrong and f"{case}: {wrong}"
