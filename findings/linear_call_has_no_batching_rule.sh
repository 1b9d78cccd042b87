#!/usr/bin/env bash
# JAX 0.10.2 and 0.12.0.1: `jax.custom_derivatives.linear_call`, the public way to give a
# linear function a transpose of one's own, has no batching rule. `jax.vmap` of it raises
# NotImplementedError, and so does a Jacobian in reverse mode, which maps the transpose.
# Output: version, then what reverse mode, `vmap` and `jacrev` give
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call


def double(x):
    return linear_call(lambda _, x: 2 * x, lambda _, g: 2 * g, (), x)


def what(call):
    try:
        return call().tolist()
    except NotImplementedError as error:
        return str(error)


x = jnp.ones(2)
print(jax.__version__, what(lambda: jax.vjp(double, x)[1](x)[0]))
print(what(lambda: jax.vmap(double)(x)))
print(what(lambda: jax.jacrev(double)(x)))
PYTHON
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 [2.0, 2.0]
Batching rule for 'linear_call' not implemented
Batching rule for 'linear_call' not implemented
0.10.2 [2.0, 2.0]
Batching rule for 'linear_call' not implemented
Batching rule for 'linear_call' not implemented
EXPECTED
