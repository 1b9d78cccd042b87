#!/usr/bin/env bash
# JAX 0.10.2 and Flax 0.12.8, XLA for CPUs: `nnx.Linear(dtype=bfloat16)` has a bias
# gradient that depends on how the tokens lie in axes. XLA adds at most 32 elements of each
# axis in a row, in bfloat16, in which 256 + 1 is 256. 65,536 terms of 1 give 65,536 in
# one axis, a fourth of it in two and a 128th in three. `jnp.sum` of the same array is
# right: it sums bfloat16 in float32.
# Output: axes of the tokens, the gradient of Flax's bias, `jnp.sum` of the same terms.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat >"$folder/program.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from flax import nnx

layer = nnx.Linear(16, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


@nnx.jit
def bias_gradient(layer, x, G):
    def loss(layer):
        return jnp.sum((layer(x) * G).astype("float32"))

    return nnx.grad(loss)(layer).bias[...]


for tokens in (65536,), (256, 256), (64, 32, 32):
    x = jnp.zeros((*tokens, 16), "bfloat16")
    G = jnp.ones((*tokens, 8), "bfloat16")
    found = bias_gradient(layer, x, G)
    summed = jnp.sum(G, range(len(tokens)))
    print(tokens, float(found[0]), float(summed[0]))
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" | tee "$folder/found"
diff "$folder/found" - <<'EXPECTED'
(65536,) 65536.0 65536.0
(256, 256) 16384.0 65536.0
(64, 32, 32) 512.0 65536.0
EXPECTED
