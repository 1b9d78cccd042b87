#!/usr/bin/env bash
# JAX 0.10.2 and 0.12.0.1: a program with `jax.experimental.custom_partitioning` over
# several devices is never found in JAX's persistent cache of compiled programs: each
# process compiles it again, and the cache counts a miss. Exporting it raises
# "serialization of host_callbacks is not yet implemented", which it has none of.
# Output: version, function, then what the cache counts in the first process and in the
# second, and the error of an export
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
counted = []
jax.monitoring.register_event_listener(lambda name, **_: counted.append(name))


@custom_partitioning
def twice(x):
    return 2 * x


def partition(mesh, arguments, result):
    sharding = arguments[0].sharding
    return mesh, lambda x: 2 * x, sharding, (sharding,)


twice.def_partition(partition, sharding_rule="... -> ...")


def partitioned(x):
    return jnp.sin(twice(x))


def plain(x):
    return jnp.sin(2 * x)


mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
x = jax.device_put(jnp.ones((8, 8)), sharding)
for function in partitioned, plain:
    counted.clear()
    jax.jit(function)(x)
    counts = [name.split("_")[-1] for name in counted if "cache_" in name]
    print(jax.__version__, function.__name__, counts[-1])
if sys.argv[2] == "export":
    try:
        jax.export.export(jax.jit(partitioned))(x)
    except NotImplementedError as error:
        print(error)
PYTHON
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    for last in once export; do
        "$folder/$version/bin/python" "$folder/program.py" "$folder/cache-$version" $last \
            >>"$folder/found"
    done
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 partitioned misses
0.12.0.1 plain misses
0.12.0.1 partitioned misses
0.12.0.1 plain hits
serialization of host_callbacks is not yet implemented
0.10.2 partitioned misses
0.10.2 plain misses
0.10.2 partitioned misses
0.10.2 plain hits
serialization of host_callbacks is not yet implemented
EXPECTED
