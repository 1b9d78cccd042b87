"""The error of each gradient of a linear layer: ours, the naive formula's and Flax's.

    python examples/gradient_accuracy.py

Every layer gets the same X and the same cotangent G, in float32 and in mixed precision
(float32 parameters, bfloat16 products). Errors are relative to float64, in the
Frobenius norm. ``gradient_accuracy.png`` shows them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxlinear

ROWS, IN, OUT = 2048, 512, 1024
GRADIENTS = "∇X = G W", "∇W = Gᵀ X", "∇B = Σ G"


def ours(x, weight, bias, dtype):
    return jaxlinear.linear(x, weight, bias, dtype=dtype)


def naive(x, weight, bias, dtype):
    x, weight, bias = (a.astype(dtype) for a in (x, weight, bias))
    return x @ weight.T + bias


def flax(x, weight, bias, dtype):
    layer = nnx.eval_shape(lambda: nnx.Linear(IN, OUT, dtype=dtype, rngs=nnx.Rngs(0)))
    layer.kernel, layer.bias = nnx.Param(weight.T), nnx.Param(bias)
    return layer(x)


LAYERS = {"jaxlinear": ours, "x @ W.T + b": naive, "nnx.Linear": flax}


@functools.partial(jax.jit, static_argnames=("layer", "dtype"))
def gradients(layer, X, W, B, G, dtype):
    return jax.vjp(functools.partial(layer, dtype=dtype), X, W, B)[1](G)


def exact_gradients(X, W, G):
    X, W, G = (np.asarray(a, np.float64) for a in (X, W, G))
    return G @ W, G.T @ X, G.sum(0)


def relative_error(found, exact):
    error = np.asarray(found, np.float64) - exact
    return float(np.linalg.norm(error) / np.linalg.norm(exact))


def main():
    # Rounded to bfloat16 beforehand, to measure only the rounding inside the layer.
    draws = np.random.default_rng(0)
    X, W, B, G = (
        jnp.asarray(draws.normal(size=shape), jnp.bfloat16).astype(jnp.float32)
        for shape in ((ROWS, IN), (OUT, IN), (OUT,), (ROWS, OUT))
    )
    exact = exact_gradients(X, W, G)
    console, figure = Console(), Figure(figsize=(10, 4), layout="constrained")
    precisions = {"float32": jnp.float32, "mixed precision": jnp.bfloat16}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, dtype) in zip(panels, precisions.items(), strict=True):
        table = Table("", *GRADIENTS, title=title)
        for k, (name, layer) in enumerate(LAYERS.items()):
            found = gradients(layer, X, W, B, G.astype(dtype), dtype)
            errors = [relative_error(*pair) for pair in zip(found, exact, strict=True)]
            table.add_row(name, *(f"{error:.1e}" for error in errors))
            axes.bar(np.arange(3) + k / 4, errors, 1 / 4, label=name)
        axes.set(title=title, yscale="log")
        axes.set_xticks(np.arange(3) + 1 / 4, GRADIENTS)
        console.print(table)
    panels[0].set_ylabel("relative error against float64")
    panels[0].legend()
    figure.savefig("gradient_accuracy.png", dpi=120)
    console.print("written: gradient_accuracy.png")


if __name__ == "__main__":
    main()
