#!/usr/bin/env bash
# jax2onnx 0.17.1, JAX 0.12.0.1: it converts no function that calls a jitted function. It
# converts the same function without `jax.jit`, and functions of `jax.nn` that JAX jits
# itself. With JAX 0.10.2 it converts all three.
# Output: version of JAX, function, and whether it is converted
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
cat >"$folder/program.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from jax2onnx import to_onnx


def product(x):
    return jnp.matmul(x, x)


def jitted(x):
    return jax.jit(product)(x)


def relu(x):
    return jax.nn.relu(x)


for function in product, jitted, relu:
    try:
        to_onnx(function, [(4, 4)])
        print(jax.__version__, function.__name__, True)
    except Exception:
        print(jax.__version__, function.__name__, False)
PYTHON
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet jax2onnx==0.17.1 "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found" 2>/dev/null
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 product True
0.12.0.1 jitted False
0.12.0.1 relu True
0.10.2 product True
0.10.2 jitted True
0.10.2 relu True
EXPECTED
