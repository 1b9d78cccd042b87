#!/usr/bin/env bash
# Orbax 0.12.8, JAX 0.12.0.1: with `partial_restore=True` a parameter that the checkpoint
# does not have keeps the value that it was called with, and nothing says so. After a
# parameter was renamed, the rest of the layer is loaded, and this one is as initialized.
# The option is documented for checkpoints that have more than is asked for. Without it
# an error is raised.
# Output: with and without the option, what is restored of a renamed kernel and of a bias
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 orbax-checkpoint==0.12.8
JAX_PLATFORMS=cpu "$folder/env/bin/python" - "$folder" >"$folder/found" 2>/dev/null <<'PYTHON'
import pathlib
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

path = pathlib.Path(sys.argv[1]) / "checkpoint"
saved = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
wanted = {"weight": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(path, saved)
    for partial in True, False:
        arguments = ocp.args.PyTreeRestore(item=wanted, partial_restore=partial)
        try:
            found = checkpointer.restore(path, args=arguments)
            print(partial, *(f"{name} {value.sum()}" for name, value in found.items()))
        except ValueError:
            print(partial, "ValueError")
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
True bias 2.0 weight 0.0
False ValueError
EXPECTED
