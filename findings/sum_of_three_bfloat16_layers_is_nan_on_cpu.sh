#!/usr/bin/env bash
# JAX 0.11.2 and 0.12.0.1, XLA for CPUs: jitted, the sum of three linear layers in
# bfloat16 with ReLU between them is NaN. Outside jit it is finite, and under jit it is
# finite in float32, with two layers, and with JAX 0.10.2. Compiled on x86-64.
# Output: see the last lines (layers, dtype, whether it is finite outside and under jit)
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnums=0, inline=True)
def total(dtype, x, weights):
    for k, weight in enumerate(weights):
        x = jax.nn.relu(x) if k else x.astype(dtype)
        x = x @ weight.astype(dtype).T
    return x.sum()


keys = jax.random.split(jax.random.key(0), 4)
x = jax.random.normal(keys[0], (64, 128))
weights = [jax.random.normal(key, (128, 128)) / 11 for key in keys[1:]]
for count, dtype in (3, "bfloat16"), (3, "float32"), (2, "bfloat16"):
    with jax.disable_jit():
        outside = total(dtype, x, weights[:count])
    inside = total(dtype, x, weights[:count])
    print(jax.__version__, count, dtype, jnp.isfinite(outside), jnp.isfinite(inside))
PYTHON
for version in 0.12.0.1 0.11.2 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 3 bfloat16 True False
0.12.0.1 3 float32 True True
0.12.0.1 2 bfloat16 True True
0.11.2 3 bfloat16 True False
0.11.2 3 float32 True True
0.11.2 2 bfloat16 True True
0.10.2 3 bfloat16 True True
0.10.2 3 float32 True True
0.10.2 2 bfloat16 True True
EXPECTED
