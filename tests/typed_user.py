"""Code of a user, checked by pyright in its strict mode: the public names have types.

It is never run. What is not public, or has another type, is an error there.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Callable
from typing import assert_type

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxlinear
from jaxlinear import FLOAT8, Product, Products
from jaxlinear.inspect import Explanation


def forward(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    highest = Products(weight_grad=Product(precision="highest"))
    y = jaxlinear.linear(x, weight, bias, dtype="bfloat16", products=highest)
    return assert_type(y, jax.Array)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = jaxlinear.nnx.Linear(3, (4, 2), dtype="bfloat16", rngs=rngs)
        self.down = jaxlinear.nnx.Linear((4, 2), 3, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


def of_modules(x: jax.Array) -> None:
    model = Model(nnx.Rngs(0))
    assert_type(model.up.weight, nnx.Param[jax.Array])
    assert_type(model.up.bias, nnx.Param[jax.Array] | None)
    assert_type(model.up.out_features, int | tuple[int, ...])
    assert_type(model.up.products, Products)

    # What the code takes: variables, lists for pairs, and NumPy's integers.
    variable = nnx.Param(x)
    jaxlinear.linear(variable, model.up.weight, precision=["highest", "default"])
    assert_type(model.up(variable), jax.Array)
    assert_type(model.up.cross_entropy(variable, x, reduction="none"), jax.Array)
    found = model.up.log_likelihood(x, x, soft_cap=30)
    assert_type(found, jaxlinear.LogLikelihood)
    assert_type(jaxlinear.linen.Linear(2).cross_entropy(variable, x), jax.Array)
    model.up.cross_entropy(x, x, reduction="average")  # pyright: ignore
    size = np.int64(3)
    layer = jaxlinear.nnx.Linear(
        size, [size], precision=["high", "high"], rngs=nnx.Rngs(0)
    )
    assert_type(layer.in_features, int | tuple[int, ...])
    jaxlinear.linen.Dense(size, precision=["high", "high"])
    assert_type(jaxlinear.linen.DenseGeneral(4, (-2, -1)).use_bias, bool)
    Product(precision=["high", "default"])

    report = jaxlinear.nnx.convert(model)
    assert_type(report, jaxlinear.nnx.Report)
    assert_type(report.left_alone, dict[str, str])
    assert_type(jaxlinear.nnx.revert(model), jaxlinear.nnx.Report)
    layers = jaxlinear.nnx.layers_of(model)
    jaxlinear.nnx.convert_tree({"a": x}, layers)
    jaxlinear.nnx.dimension_numbers(layers, dict[str, int])({"a": x})
    jaxlinear.linen.layers_of(nn.Dense(3), jax.random.key(0), x)
    assert_type(jaxlinear.nnx.convert_tree({"a": x}, ["a"]), dict[str, jax.Array])
    assert_type(jaxlinear.linen.Linear(2, products=FLOAT8).use_bias, bool)

    jaxlinear.torch.save(model, "model.safetensors", rename={"up": "linear1"})
    jaxlinear.torch.load(model, "model.safetensors", strict=False)
    names = {"table.embedding": ("wte.weight", "lm_head.weight")}
    jaxlinear.torch.load(model, {}, rename=names, ignore=["*.attn.bias"])
    jaxlinear.torch.save(model, "model.pt", rename=lambda name: name, prefix="model.")


def of_functions(x: jax.Array, weight: jax.Array) -> None:
    explanation = jaxlinear.explain(jaxlinear.linear, x, weight, dtype="bfloat16")
    assert_type(explanation, Explanation)
    assert_type(explanation.products[0].product, Product)
    assert_type(explanation.saved_bytes, int)
    with jaxlinear.plain_autodiff():
        assert_type(jaxlinear.__version__, str)


policy: Callable[..., bool] = jaxlinear.save_linear_outputs
_ = Model(nnx.Rngs(0)).up.kernel  # pyright: ignore
_ = jaxlinear.no_such_name  # pyright: ignore
