#!/usr/bin/env bash
# JAX 0.10.2 and 0.12.0.1, XLA for CPUs: a bfloat16 product of a few rows with a weight of
# 4096 x 4096 first writes the weight to memory in float32, 64 MiB in each call. In 0.12.0.1
# `x @ kernel` does not from two rows on; `x @ weight.T` does in both versions, and one row
# always does.
# Output: version, rows, and the MiB of temporaries of `x @ weight.T` and of `x @ kernel`,
# in whole 64 MiB
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import jax


def of_weight(x, weight):
    return x @ weight.T


def of_kernel(x, kernel):
    return x @ kernel


for rows in 1, 16, 64:
    shapes = (rows, 4096), (4096, 4096)
    arguments = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    found = []
    for function in of_weight, of_kernel:
        program = jax.jit(function).lower(*arguments).compile()
        size = program.memory_analysis().temp_size_in_bytes
        found.append(size // 2**26 * 64)
    print(jax.__version__, rows, *found)
PYTHON
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 1 64 64
0.12.0.1 16 64 0
0.12.0.1 64 64 0
0.10.2 1 64 64
0.10.2 16 64 64
0.10.2 64 64 64
EXPECTED
