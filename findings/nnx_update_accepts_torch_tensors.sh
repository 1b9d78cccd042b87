#!/usr/bin/env bash
# Flax 0.12.8, JAX 0.10.2, PyTorch 2.13.0: `nnx.update` puts PyTorch's tensors into a model
# without a word, and the model can be called. The first jitted call or gradient raises
# TypeError, far from the line that is to blame.
# Output: the class of the kernel after the update, then what a call, a jitted call and a
# gradient give
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 torch==2.13.0
JAX_PLATFORMS=cpu "$folder/env/bin/python" - >"$folder/found" <<'PYTHON'
import jax.numpy as jnp
import torch
from flax import nnx

model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
nnx.update(model, {"bias": torch.ones(2), "kernel": torch.ones(2, 2)})
print(type(model.kernel[...]))
x = jnp.ones((1, 2))


def loss(model, x):
    return model(x).sum()


for function in loss, nnx.jit(loss), nnx.grad(loss):
    try:
        function(model, x)
        print("works")
    except TypeError:
        print("TypeError")
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
<class 'torch.Tensor'>
works
TypeError
TypeError
EXPECTED
