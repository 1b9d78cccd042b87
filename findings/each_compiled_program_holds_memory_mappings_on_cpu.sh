#!/usr/bin/env bash
# JAX 0.10.2 and 0.12.0.1, XLA for CPUs, Linux: each compiled program holds three mappings
# of memory, as long as a cache of JAX holds the program. Linux gives a process 65,530 of
# them (vm.max_map_count). A test suite of 2,000 tests came to the limit in one of its two
# processes, which died without an exception and with memory to spare.
# `jax.clear_caches()` gives the mappings back.
# Output: version, mappings for each of a hundred programs, and after jax.clear_caches()
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import jax
import numpy as np


def mappings():
    with open("/proc/self/maps") as maps:
        return len(list(maps))


@jax.jit
def double(x):
    return 2 * x


double(np.ones(1, "float32"))
before = mappings()
for size in range(2, 102):
    double(np.ones(size, "float32"))
held = mappings() - before
jax.clear_caches()
print(jax.__version__, round(held / 100), round((mappings() - before) / 100))
PYTHON
for version in 0.10.2 0.12.0.1; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.10.2 3 0
0.12.0.1 3 0
EXPECTED
