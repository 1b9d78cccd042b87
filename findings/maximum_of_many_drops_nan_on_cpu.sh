#!/usr/bin/env bash
# JAX 0.10.2, XLA for CPUs: from 4,096 elements on the maximum and the minimum of an array
# with a NaN are finite. Below they are NaN, as the documentation of jax.numpy.max says.
# Output: 4095 True True / 4096 False False (size, whether max and min are NaN)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/env/bin/python" - >"$folder/found" <<'PYTHON'
import jax.numpy as jnp

for size in 4095, 4096:
    a = jnp.arange(size, dtype="float32").at[5].set(jnp.nan)
    print(size, jnp.isnan(a.max()), jnp.isnan(a.min()))
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
4095 True True
4096 False False
EXPECTED
