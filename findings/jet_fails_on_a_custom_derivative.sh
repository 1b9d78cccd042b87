#!/usr/bin/env bash
# JAX 0.10.2 and 0.12.0.1: `jax.experimental.jet` fails on a function with a derivative by
# `jax.custom_jvp`, and so on `jax.nn.relu`. It runs the function with its own tracers
# while another trace is the current one. An error arrives, under jit and outside it.
# `jax.jvp` of the same functions works, and so does `jet` of the formula.
# Output: version, function, whether `jvp` and whether `jet` return
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import jax
from jax.experimental.jet import jet


@jax.custom_jvp
def square(x):
    return x * x


@square.defjvp
def derivative(primals, tangents):
    return square(*primals), 2 * primals[0] * tangents[0]


def formula(x):
    return x * x


def returns(call):
    try:
        call()
    except Exception:
        return False
    return True


for function in formula, square, jax.nn.relu:
    derivatives = (
        lambda f: jax.jvp(f, (3.0,), (1.0,)),
        lambda f: jet(f, (3.0,), ((1.0,),)),
        lambda f: jet(jax.jit(f), (3.0,), ((1.0,),)),
    )
    found = [returns(lambda d=d: d(function)) for d in derivatives]
    print(jax.__version__, function.__name__, *found)
PYTHON
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 formula True True True
0.12.0.1 square True False False
0.12.0.1 relu True False False
0.10.2 formula True True True
0.10.2 square True False False
0.10.2 relu True False False
EXPECTED
