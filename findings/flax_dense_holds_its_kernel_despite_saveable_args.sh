#!/usr/bin/env bash
# Flax 0.12.12, JAX 0.12.0.1: a VJP object that `saveable_args` asks to hold no argument
# still holds the float32 kernel of flax.linen.Dense outside `jit`. Under `jit` it holds
# none, and `x @ kernel` holds none in either.
# Output: a line each, with the bytes held outside and under `jit`
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12
JAX_PLATFORMS=cpu "$folder/env/bin/python" - >"$folder/found" <<'PYTHON'
import jax
import jax.numpy as jnp
from flax import linen

x, kernel = jnp.ones((4, 256)), jnp.ones((256, 256))
layer = linen.Dense(256, use_bias=False)


def dense(kernel, x):
    return layer.apply({"params": {"kernel": kernel}}, x)


def product(kernel, x):
    return x @ kernel


def held(function):
    _, vjp = jax.vjp(function, kernel, x, saveable_args=(False, False))
    return sum(a.nbytes for a in jax.tree.leaves(vjp))


for function in dense, product:
    print(function.__name__, held(function), held(jax.jit(function)))
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
dense 266240 0
product 0 0
EXPECTED
