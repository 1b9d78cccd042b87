#!/usr/bin/env bash
# JAX 0.11.2 and 0.12.0.1, XLA for CPUs: the weight gradient of `x @ kernel` in bfloat16
# takes many times as long for an x with a batch axis, (1, 512, 1024), as for one of
# (512, 1024). The operands of its product stay in bfloat16, and it is not in a fusion of
# the library YNN; without the axis they are converted to float32. JAX 0.10.2 converts
# both. Measured on an x86-64 CPU with bfloat16 instructions; the script ends where the
# CPU has none.
# Output: version, shape of x, dtype of the product in the compiled program, and whether
# YNN computes it. Then milliseconds, which are not compared. On two busy cores they were,
# without the axis and with it: 234 and 1725 in 0.12.0.1, 389 and 9521 in 0.11.2, 299 and
# 273 in 0.10.2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    echo not this CPU
    exit 0
fi
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
cat >"$folder/program.py" <<'PYTHON'
import re
import sys
import time

import jax
import jax.numpy as jnp

kernel = jnp.ones((1024, 4096), "bfloat16")


@jax.jit
def weight_gradient(x, G):
    return jax.vjp(lambda kernel: x @ kernel, kernel)[1](G)[0]


for rows in (512,), (1, 512), (2, 256):
    x, G = jnp.ones((*rows, 1024), "bfloat16"), jnp.ones((*rows, 4096), "bfloat16")
    program = weight_gradient.lower(x, G).compile()
    text = program.as_text()
    dtype = re.search(r"= (\w+)\S* dot\(", text)[1]
    print(jax.__version__, x.shape, dtype, "ynn_fusion" in text, flush=True)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        program(x, G).block_until_ready()
        times.append(time.perf_counter() - start)
    print(jax.__version__, x.shape, f"{1e3 * min(times):.0f} ms", file=sys.stderr)
PYTHON
for version in 0.12.0.1 0.11.2 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" \
        >>"$folder/found" 2>>"$folder/times"
done
cat "$folder/found" "$folder/times"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 (512, 1024) f32 False
0.12.0.1 (1, 512, 1024) bf16 False
0.12.0.1 (2, 256, 1024) bf16 False
0.11.2 (512, 1024) f32 False
0.11.2 (1, 512, 1024) bf16 False
0.11.2 (2, 256, 1024) bf16 False
0.10.2 (512, 1024) f32 False
0.10.2 (1, 512, 1024) f32 True
0.10.2 (2, 256, 1024) f32 True
EXPECTED
