#!/usr/bin/env bash
# JAX 0.10.2 and 0.12.0.1, XLA for CPUs: a product of bfloat16 operands with the
# `preferred_element_type` float32 compiles, and fails when it runs, if its result is
# transposed: "Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32".
# With transposed operands it runs, and so does the transpose outside `jit`. So whether a
# product runs depends on what the program around it does.
# Output: version, what is transposed, and whether it runs
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import jax
import jax.numpy as jnp


def product(a, b):
    return jnp.matmul(a, b, preferred_element_type="float32")


def runs(function):
    a = jnp.ones((256, 256), "bfloat16")
    try:
        jax.block_until_ready(function(a, a))
    except RuntimeError as error:
        assert "BF16 x BF16 = F32" in str(error)
        return False
    return True


print(
    jax.__version__,
    "nothing",
    runs(jax.jit(product)),
    "an operand",
    runs(jax.jit(lambda a, b: product(a, b.T))),
    "the result",
    runs(jax.jit(lambda a, b: product(a, b).T)),
    "outside jit",
    runs(lambda a, b: product(a, b).T),
)
PYTHON
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 nothing True an operand True the result False outside jit True
0.10.2 nothing True an operand True the result False outside jit True
EXPECTED
