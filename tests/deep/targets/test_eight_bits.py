"""Compiled for GPUs and TPUs that are not here: they multiply 8 bits, in every product.

`eight_bits.py` prints the figures.
"""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("eight_bits.py")
COMPILERS = {"h100": "jax_cuda12_plugin", "b200": "jax_cuda12_plugin", "v5e": "libtpu"}
COMPILERS |= {"v6e": "libtpu", "tpu7x": "libtpu"}
NAMES = "forward_product", "input_gradient", "weight_gradient"


@functools.cache
def found(target, recipe):
    """The rows of each product, and that of the whole."""
    if not importlib.util.find_spec(COMPILERS[target]):
        pytest.skip(f"needs {COMPILERS[target]}, the compiler for {target}")
    result = subprocess.run(
        [sys.executable, PROGRAM, target, recipe], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    *products, whole = map(json.loads, result.stdout.splitlines())
    return {row["product"]: row for row in products}, whole


@pytest.mark.parametrize("target", ["h100", "b200"])
@pytest.mark.parametrize("recipe", ["FLOAT8", "FLOAT8 per row"])
def test_one_call_of_cublas_multiplies_float8_in_each_product(recipe, target):
    products, _ = found(target, recipe)
    assert set(products) == set(NAMES)
    for name, row in products.items():
        assert (row["runs as"], row["count"]) == ("__cublas$lt$matmul$f8", 1)
        first = "float8_e4m3fn" if name == "forward_product" else "float8_e5m2"
        assert row["operands"] == [first, "float8_e4m3fn"]


def test_a_scale_of_each_row_is_applied_by_a_kernel_behind_each_product():
    """One scale of a tensor is a factor of the call, which adds the bias, too."""
    per_tensor, per_row = (found("h100", r)[1] for r in ("FLOAT8", "FLOAT8 per row"))
    assert per_row["kernels"] >= per_tensor["kernels"] + 3
    assert per_row["MiB"] > 1.5 * per_tensor["MiB"]


@pytest.mark.parametrize("target", ["h100", "b200"])
def test_gpus_multiply_int8(target):
    products, _ = found(target, "INT8")
    for row in products.values():
        assert row["runs as"] == "__cublas$lt$matmul"
        assert row["operands"] == ["int8", "int8"]


@pytest.mark.parametrize("target", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize("recipe", ["FLOAT8", "INT8"])
def test_8_bits_reach_the_matrix_units_of_tpus(recipe, target):
    products, _ = found(target, recipe)
    assert set(products) == set(NAMES)
    for row in products.values():
        assert row["runs as"] == "convolution"
        assert {operand[:4] for operand in row["operands"]} <= {"floa", "int8"}
        assert not {"float32", "bfloat16", "int32"} & set(row["operands"])
