#!/usr/bin/env bash
# Qwix 0.1.8, Flax 0.12.12, JAX 0.12.0.1: Qwix replaces functions of JAX while a quantized
# model runs, and the cache of `jax.jit` does not know it. If a function of the model is
# jitted, its first trace serves both: after the quantized model, the plain one computes
# the quantized product; after the plain model, the quantized one computes the exact one.
# Nothing is raised. Of a function that is not jitted both results are right.
# Output: whether the function is jitted and which model runs first, then whether the
# result of each, quantized and plain, has an error
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


class Model(nnx.Module):
    def __init__(self, product):
        self.product = product
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (64, 64)))

    def __call__(self, x):
        return self.product(x, self.kernel[...])


def product(x, kernel):
    return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())))


x = jax.random.normal(jax.random.key(1), (8, 64))
rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
for is_jitted in False, True:
    for first in "quantized", "plain":
        jax.clear_caches()
        plain = Model(jax.jit(product) if is_jitted else product)
        exact = jnp.dot(x, plain.kernel[...])
        with jax.disable_jit():  # Qwix runs the model once, here outside the cache.
            quantized = qwix.quantize_model(plain, qwix.QtProvider([rule]), x)
        models = {"quantized": quantized, "plain": plain}
        order = sorted(models, key=lambda name: name != first)
        found = {name: bool(abs(models[name](x) - exact).max() > 1e-3) for name in order}
        print("jitted" if is_jitted else "not jitted", first, found["quantized"], found["plain"])
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
not jitted quantized True False
not jitted plain True False
jitted quantized True True
jitted plain False False
EXPECTED
