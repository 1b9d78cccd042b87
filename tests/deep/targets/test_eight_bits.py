"""Compiled for GPUs and TPUs that are not here: they multiply 8 bits, in every product.

`eight_bits.py` prints the figures.
"""

import json
import pathlib
import subprocess
import sys

import pytest

import jaxlinear
from benchmarks.aot import targets

PROGRAM = pathlib.Path(__file__).with_name("eight_bits.py")
NAMES = ["forward_product", "input_gradient", "weight_gradient"]


def found(target, *recipes, size=4096):
    """Of each recipe the rows of its products, and that of the whole."""
    if why := targets.missing(target, 1):
        pytest.skip(why)
    command = [sys.executable, PROGRAM, "--size", str(size), target, *recipes]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for recipe in recipes:
        *products, whole = (row for row in rows if row["recipe"] == recipe)
        assert [row["product"] for row in products] == NAMES
        yield products, whole


def assert_multiplied(products, runs_as, recipe):
    for row, product in zip(products, recipe, strict=True):
        assert (row["runs as"], row["count"]) == (runs_as, 1)
        dtype = product.dtype
        pair = [dtype] * 2 if isinstance(dtype, str) else [*dtype]
        assert row["operands"] == pair


def test_one_call_of_cublas_multiplies_float8_in_each_product_on_a_b200():
    [(products, _)] = found("b200", "FLOAT8")
    assert_multiplied(products, "__cublas$lt$matmul$f8", jaxlinear.FLOAT8)


def test_an_h100_multiplies_8_bits_and_a_scale_of_a_tensor_costs_no_kernel():
    """It is a factor of the call, which also adds the bias.

    One of each row is applied by a kernel behind each product.
    """
    recipes = "FLOAT8", "FLOAT8 per row", "INT8"
    (float8, per_tensor), (rows, per_row), (int8, _) = found("h100", *recipes)
    assert_multiplied(float8, "__cublas$lt$matmul$f8", jaxlinear.FLOAT8)
    assert_multiplied(rows, "__cublas$lt$matmul$f8", jaxlinear.FLOAT8)
    assert_multiplied(int8, "__cublas$lt$matmul", jaxlinear.INT8)
    assert per_row["kernels"] >= per_tensor["kernels"] + 3
    assert per_row["MiB"] > 1.5 * per_tensor["MiB"]


@pytest.mark.parametrize(
    ("target", "recipe"), [("v5e", "INT8"), ("v6e", "FLOAT8"), ("tpu7x", "FLOAT8")]
)
def test_8_bits_reach_the_matrix_units_of_tpus(target, recipe):
    # At 4096 this takes their compilers two to four times as long.
    [(products, _)] = found(target, recipe, size=1024)
    assert_multiplied(products, "convolution", getattr(jaxlinear, recipe))
