#!/usr/bin/env bash
# Flax 0.12.12, JAX 0.12.0.1: with `dtype=bfloat16` the `Embed` of NNX and of Linen casts
# the whole table before the lookup, so the gradients of a token are added in bfloat16. In
# it 256 + 1 is 256: of a token that occurs 3,072 times with gradients of one, the float32
# embedding gets 256. Without `dtype`, with the cast after the lookup, it gets 3,072.
# Output: library, dtype, and the gradient of the token
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12
JAX_PLATFORMS=cpu "$folder/env/bin/python" - >"$folder/found" <<'PYTHON'
import jax
import jax.numpy as jnp
from flax import linen, nnx

tokens = jnp.zeros(3072, "int32")


def total(vectors):
    return vectors.astype("bfloat16").astype("float32").sum()


for dtype in "bfloat16", None:
    embed = nnx.Embed(8, 4, dtype=dtype, rngs=nnx.Rngs(0))
    gradient = nnx.grad(lambda embed: total(embed(tokens)))(embed)
    print("NNX", dtype, gradient.embedding[0, 0])

    embed = linen.Embed(8, 4, dtype=dtype)
    variables = embed.init(jax.random.key(0), tokens)
    gradient = jax.grad(lambda v: total(embed.apply(v, tokens)))(variables)
    print("Linen", dtype, gradient["params"]["embedding"][0, 0])
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
NNX bfloat16 256.0
Linen bfloat16 256.0
NNX None 3072.0
Linen None 3072.0
EXPECTED
