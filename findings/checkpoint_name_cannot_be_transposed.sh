#!/usr/bin/env bash
# JAX 0.10.2 and 0.12.0.1: `jax.ad_checkpoint.checkpoint_name` is the identity, but has no
# transpose. `jax.linear_transpose` of a function that names a value raises
# NotImplementedError, though its reverse mode works: there the name is left out of the
# linear program.
# Output: version, the gradient, and what `linear_transpose` gives
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import jax
from jax.ad_checkpoint import checkpoint_name


def double(x):
    return checkpoint_name(2 * x, "doubled")


print(jax.__version__, jax.grad(double)(1.0))
try:
    print(jax.linear_transpose(double, 1.0)(1.0))
except NotImplementedError as error:
    print(error)
PYTHON
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 2.0
Transpose rule (for reverse-mode differentiation) for 'name' not implemented
0.10.2 2.0
Transpose rule (for reverse-mode differentiation) for 'name' not implemented
EXPECTED
