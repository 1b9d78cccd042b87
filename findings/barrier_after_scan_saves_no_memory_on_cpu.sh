#!/usr/bin/env bash
# JAX 0.10.2, XLA for CPUs: `lax.optimization_barrier` between a `lax.scan` and what
# follows it does not let both use the same memory. A scan over blocks of 512 rows makes
# 16 MiB of logits in each step; with 510 more rows after it, which wait behind a barrier
# for its result, the program needs 16 MiB more. In JAX 0.12.0.1 the barrier prevents it.
# Output: version, then the temporaries in MiB of the scan, with the rows after it, and
# with a barrier between them
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
cat >"$folder/program.py" <<'PYTHON'
import jax
import jax.numpy as jnp

BLOCKS, ROWS = 8, 512


def summed(total, x, weight):
    return total + x.T @ jax.nn.softmax(x @ weight)


def scanned(x, weight):
    def step(total, block):
        return summed(total, block, weight), None

    blocks = x[: BLOCKS * ROWS].reshape(BLOCKS, ROWS, -1)
    return jax.lax.scan(step, jnp.zeros_like(weight), blocks)[0]


def followed(x, weight):
    return summed(scanned(x, weight), x[BLOCKS * ROWS :], weight)


def barred(x, weight):
    waiting = scanned(x, weight), x[BLOCKS * ROWS :], weight
    return summed(*jax.lax.optimization_barrier(waiting))


def temporaries(function):
    x = jax.ShapeDtypeStruct((BLOCKS * ROWS + ROWS - 2, 256), "float32")
    weight = jax.ShapeDtypeStruct((256, 8192), "float32")
    memory = jax.jit(function).lower(x, weight).compile().memory_analysis()
    return f"{memory.temp_size_in_bytes / 2**20:.1f}"


print(jax.__version__, *map(temporaries, (scanned, followed, barred)))
PYTHON
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 28.5 44.9 29.0
0.10.2 28.5 44.9 44.9
EXPECTED
