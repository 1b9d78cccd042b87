"""What a GPU or a TPU runs of products of 8 bits, as its compiler says without it.

    python tests/deep/targets/eight_bits.py [--size SIZE] TARGET [RECIPE ...]

compiles a layer of SIZE rows (4096), SIZE features in and as many out, and its
gradients, for TARGET (h100, b200, v5e, v5p, v6e or tpu7x), and prints a line of JSON
for each product: the dtypes that are multiplied, the operation or the library that
multiplies them, and for TPUs the cycles that the compiler expects of it; and one for
the whole: its kernels and the MiB that they read and write. Without recipes all of
them, bfloat16 first. For GPUs by cuBLAS: on a device XLA chooses between it and Triton
by timing.

A process of its own, since the compiler may abort the one that it runs in.
"""

import argparse
import json
import os
import re

from benchmarks.aot import targets

os.environ |= targets.SETTINGS | {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}

import jax
from jax.sharding import SingleDeviceSharding

import jaxlinear
from benchmarks.aot.account import account

RECIPES = {
    "bfloat16": None,
    "FLOAT8": jaxlinear.FLOAT8,
    "FLOAT8_E4M3": jaxlinear.FLOAT8_E4M3,
    "FLOAT8 per row": jaxlinear.Products(
        *(product._replace(scaling="per_row") for product in jaxlinear.FLOAT8)
    ),
    "INT8": jaxlinear.INT8,
}
PRODUCTS = "forward_product", "input_gradient", "weight_gradient"


def arguments(device, size):
    """x, weight, bias and G, on a device that is not here."""
    sharding = SingleDeviceSharding(device)
    shapes = (size, size), (size, size), (size,), (size, size)
    dtypes = "bfloat16", "float32", "float32", "bfloat16"
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def compiled_step(products, arguments):
    def step(x, weight, bias, G):
        def layer(*arrays):
            return jaxlinear.linear(*arrays, dtype="bfloat16", products=products)

        Y, vjp = jax.vjp(layer, x, weight, bias)
        return Y, vjp(G)

    return jax.jit(step).lower(*arguments).compile().as_text()


def cycles(text):
    """Those that the compiler for TPUs expects of each product, with what is fused."""
    found = dict.fromkeys(PRODUCTS, 0)
    for line in text[text.index("\nENTRY") :].splitlines():
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        scope = re.search(r'op_name="[^"]*\b(\w+_product|\w+_gradient)\b', line)
        if estimate and scope and "convolution" in line:
            found[scope[1]] += int(estimate[1])
    return found


def main(target, recipes, size):
    given = arguments(targets.devices(target, 1)[0], size)
    for recipe in recipes or RECIPES:
        found = jaxlinear.explain(
            jaxlinear.linear, *given[:3], dtype="bfloat16", products=RECIPES[recipe]
        )
        text = compiled_step(RECIPES[recipe], given)
        for product in found.products:
            name = product.name.replace(" ", "_")
            row = {"recipe": recipe, "product": name, "runs as": product.runs_as}
            row |= {"operands": product.product.dtype, "count": product.count}
            row |= {"cycles": cycles(text)[name]} if target in targets.TPUS else {}
            print(json.dumps(row), flush=True)
        found = account(text)
        row = {"recipe": recipe, "kernels": found.kernels, "MiB": found.bytes / 2**20}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("target", choices=targets.TARGETS)
    parser.add_argument("recipes", nargs="*")
    options = parser.parse_args()
    main(options.target, options.recipes, options.size)
