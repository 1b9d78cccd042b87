#!/usr/bin/env bash
# JAX 0.12.0.1: all collectives in a compiled program that `jax.shard_map` wrote have one
# channel_id, 1, those of two shard_maps also. Where the partitioner wrote them, each has
# its own. Who counts collectives by their channels finds one. JAX 0.10.2 does the same.
# Output: version, then the number of collectives and of channels of one shard_map, of two
# shard_maps, and of automatic partitioning
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
cat >"$folder/program.py" <<'PYTHON'
import re

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
split, whole = PartitionSpec("a", "b"), PartitionSpec()


def mapped(body):
    return jax.shard_map(
        body, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )


def one(x):
    def body(x):
        largest = jax.lax.pmax(x, "b")
        return jax.lax.psum(x, "a"), largest, jax.lax.all_gather(x, "a", tiled=True)

    return mapped(body)(x)


def two(x):
    return [mapped(lambda x, name=name: jax.lax.psum(x, name))(x) for name in "ab"]


def automatic(x):
    results = x.sum(0), x.max(1)
    return jax.lax.with_sharding_constraint(results, NamedSharding(mesh, whole))


def counted(function):
    sharding = NamedSharding(mesh, split)
    x = jax.ShapeDtypeStruct((64, 64), "float32", sharding=sharding)
    text = jax.jit(function).lower(x).compile().as_text()
    channels = re.findall(r" (?:all-reduce|all-gather)\(.*channel_id=(\d+)", text)
    return len(channels), len({*channels})


print(jax.__version__, counted(one), counted(two), counted(automatic))
PYTHON
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 (3, 1) (2, 1) (4, 4)
0.10.2 (3, 1) (2, 1) (4, 4)
EXPECTED
