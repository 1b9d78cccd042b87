#!/usr/bin/env bash
# JAX 0.12.0.1 and 0.10.2, XLA for CPUs: two equal maxima of one array that is split over
# devices are two numbers of the collectives in the compiled program. So a scale that
# several operations need, as in 8-bit products, is better computed once by hand.
# Output: version, then the number of values that collectives reduce
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
cat >"$folder/program.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def scaled(x, y):
    return x / jnp.max(jnp.abs(x)), y * jnp.max(jnp.abs(x))


mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
a = jax.ShapeDtypeStruct((64, 32), "float32", sharding=rows)
text = jax.jit(scaled).lower(a, a).compile().as_text()
reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
print(jax.__version__, sum(types.count("f32[]") for types in reduced))
PYTHON
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 2
0.10.2 2
EXPECTED
