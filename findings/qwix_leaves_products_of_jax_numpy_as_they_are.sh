#!/usr/bin/env bash
# Qwix 0.1.8, Flax 0.12.12, JAX 0.12.0.1: a rule for all modules quantizes no product that
# a module writes as `x @ kernel`, `jnp.dot` or `jnp.matmul`, and says nothing. It does
# quantize `jnp.einsum` and `jax.lax.dot_general`.
# Output: the product, and whether it was quantized
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 qwix==0.1.8
JAX_PLATFORMS=cpu "$folder/env/bin/python" - >"$folder/found" <<'PYTHON'
import jax
import jax.numpy as jnp
import qwix
from flax import nnx

PRODUCTS = {
    "lax.dot_general": lambda x, k: jax.lax.dot_general(x, k, (((1,), (0,)), ((), ()))),
    "jnp.einsum": lambda x, k: jnp.einsum("bi,io->bo", x, k),
    "jnp.dot": lambda x, k: jnp.dot(x, k),
    "jnp.matmul": lambda x, k: jnp.matmul(x, k),
    "x @ kernel": lambda x, k: x @ k,
}


class Model(nnx.Module):
    def __init__(self, product):
        self.product = product
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (64, 64)))

    def __call__(self, x):
        return self.product(x, self.kernel[...])


x = jax.random.normal(jax.random.key(1), (8, 64))
rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
for name, product in PRODUCTS.items():
    model = Model(product)
    quantized = qwix.quantize_model(model, qwix.QtProvider([rule]), x)
    print(name, bool(abs(quantized(x) - model(x)).max() > 1e-3))
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
lax.dot_general True
jnp.einsum True
jnp.dot False
jnp.matmul False
x @ kernel False
EXPECTED
