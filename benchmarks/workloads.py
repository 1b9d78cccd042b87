"""What is timed: shapes of real models, dtypes, and the parts of a training step."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

import jaxlinear


@dataclasses.dataclass(frozen=True)
class Workload:
    """A layer (out, in) and its input (*leading, in)."""

    name: str
    leading: tuple[int, ...]
    in_features: int
    out_features: int

    @property
    def rows(self):
        return math.prod(self.leading)


WORKLOADS = [
    Workload("one row, feed-forward up", (1,), 1024, 4096),
    Workload("one row, feed-forward down", (1,), 4096, 1024),
    Workload("MLP, hidden layer", (128,), 784, 256),
    Workload("small transformer, attention", (8, 128), 512, 512),
    Workload("small transformer, up", (8, 128), 512, 2048),
    Workload("small transformer, down", (8, 128), 2048, 512),
    Workload("512 rows, square", (512,), 1024, 1024),
    Workload("2048 rows, square", (2048,), 1024, 1024),
    Workload("large transformer, attention", (8, 512), 1024, 1024),
    Workload("large transformer, up", (2048,), 1024, 4096),
    Workload("large transformer, down", (2048,), 4096, 1024),
    Workload("classifier head", (512,), 2048, 1000),
    Workload("vocabulary head", (128,), 768, 32000),
    Workload("65536 rows", (65536,), 256, 256),
]
QUICK = ["one row, feed-forward up", "512 rows, square", "small transformer, up"]

GROWTH = [Workload(f"growth {4**k}", (4**k,), 512, 512) for k in range(9)]
"""Cost against the number of rows, from 1 to 65 536."""

DECODING = [
    Workload(f"decoding {rows} of {features}", (rows,), features, 4096)
    for features in (4096, 1024)
    for rows in (1, 2, 4, 8, 16)
]
"""The forward pass of a few rows, which reads the weight and little else."""

DTYPES = {  # name: dtype of x and Y, dtype of the parameters
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "mixed": ("bfloat16", "float32"),
    "float16": ("float16", "float16"),
    "float8": ("bfloat16", "float32"),
    "int8": ("bfloat16", "float32"),
}

RECIPES = {"float8": jaxlinear.FLOAT8, "int8": jaxlinear.INT8}
"""Of our layer in 8 bits, beside which the others compute in bfloat16."""

RECIPE_ERRORS = {"float8": 0.09, "int8": 0.02}
"""What rounding two independent operands explains of a product, relative.

It is √((u² + v²)/3) with the unit roundoffs of e5m2 and e4m3, an eighth and a
sixteenth; and of int8 √(2/12) of a step, where the largest of a row is five times the
root mean square. A tenth more is for chance.
"""

MODES = {
    "forward": ["Y"],
    "input gradient": ["grad_X"],
    "weight gradient": ["grad_W"],
    "bias gradient": ["grad_B"],
    "step": ["Y", "grad_X", "grad_W", "grad_B"],
}
"""What is timed, and its results: ``step`` is the forward pass and all gradients."""


def problem(workload, dtype_name):
    """x, weight, bias and the cotangent of Y, such that Y has about unit variance."""
    x_dtype, parameter_dtype = DTYPES[dtype_name]
    shape = workload.out_features, workload.in_features
    generator = np.random.default_rng(0)

    def draw(shape, dtype, scale=1.0):
        values = generator.standard_normal(shape, np.float32) * np.float32(scale)
        return values.astype(jnp.dtype(dtype))

    return (
        draw((*workload.leading, workload.in_features), x_dtype),
        draw(shape, parameter_dtype, workload.in_features**-0.5),
        draw(shape[:1], parameter_dtype),
        draw((*workload.leading, workload.out_features), x_dtype),
    )


def answers(arrays, dtype_name):
    """Each result in float64, the sum of its terms' magnitudes, and their number.

    The operands are those in the compute dtype.
    """
    compute_dtype = jnp.dtype(DTYPES[dtype_name][0])
    operands = [a.astype(compute_dtype).astype(np.float64) for a in arrays]

    def formulas(X, W, B, G):
        X_rows, G_rows = X.reshape(-1, X.shape[-1]), G.reshape(-1, G.shape[-1])
        return X @ W.T + B, G @ W, G_rows.T @ X_rows, G_rows.sum(0)

    (out_features, in_features), rows = arrays[1].shape, arrays[0][..., 0].size
    terms = in_features + 1, out_features, rows, rows
    exact, magnitudes = formulas(*operands), formulas(*map(np.abs, operands))
    found = zip(exact, magnitudes, terms, strict=True)
    return dict(zip(MODES["step"], found, strict=True))


def work(workload, mode, arrays):
    """Floating-point operations of a mode, and the bytes that it must read or write."""
    x, weight, bias, cotangent = (a.nbytes for a in arrays)
    product = 2 * workload.rows * workload.in_features * workload.out_features
    sums = workload.rows * workload.out_features
    return {
        "forward": (product + sums, x + weight + bias + cotangent),
        "input gradient": (product, cotangent + weight + x),
        "weight gradient": (product, cotangent + x + weight),
        "bias gradient": (sums, cotangent + bias),
        "step": (3 * product + 2 * sums, 2 * (x + weight + bias + cotangent)),
    }[mode]


def results_of(mode, apply):
    """The function of (parameters, x, cotangent) that a mode times.

    ``apply`` maps the parameters, a tree of one weight and one bias, and x to Y.
    """

    def step(parameters, x, cotangent):
        Y, vjp = jax.vjp(apply, parameters, x)
        grads, grad_X = vjp(cotangent)
        by_rank = {leaf.ndim: leaf for leaf in jax.tree.leaves(grads)}
        return {"Y": Y, "grad_X": grad_X, "grad_W": by_rank[2], "grad_B": by_rank[1]}

    def chosen(parameters, x, cotangent):
        if mode == "forward":
            return [apply(parameters, x)]
        results = step(parameters, x, cotangent)
        return [results[name] for name in MODES[mode]]

    return chosen
