#!/usr/bin/env bash
# PyTorch 2.13.0 beside JAX 0.10.2, on a CPU with two or more cores: after a product the
# threads of PyTorch's OpenMP go on spinning, and use a core for milliseconds in which the
# process only sleeps. Those of XLA sleep. Whoever times both in one process, in turn,
# times XLA's next program beside that spinning: here its product took 0.59 to 0.70 ms
# right behind PyTorch and 0.43 to 0.45 behind itself. OMP_WAIT_POLICY=PASSIVE ends the
# spinning (0.51 to 0.60 and 0.42 to 0.44 ms), and makes PyTorch wake its threads for each
# call.
# Output: the library that was called last, OMP_WAIT_POLICY, and whether the process uses
# more than a millisecond of a core in the 20 ms of sleep that follow. Then milliseconds,
# which are not compared: of a core in that sleep, and of XLA's next product (medians).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 torch==2.13.0
cat >"$folder/program.py" <<'PYTHON'
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import torch

x, w = jnp.ones((128, 784)), jnp.ones((784, 256))
a, b = torch.ones(128, 784), torch.ones(784, 256)
product = jax.jit(jnp.matmul)
CALLS = {
    "jax": lambda: product(x, w).block_until_ready(),
    "torch": lambda: torch.mm(a, b),
}


def seconds(clock, call):
    start = clock()
    call()
    return clock() - start


def asleep(call):
    call()
    return seconds(time.process_time, lambda: time.sleep(0.02))


def behind(call):
    call()
    return seconds(time.perf_counter, CALLS["jax"])


for name, call in CALLS.items():
    used = 1e3 * statistics.median(asleep(call) for _ in range(100))
    policy = os.environ.get("OMP_WAIT_POLICY", "default")
    print(name, policy, used > 1, flush=True)
    behind_it = 1e3 * statistics.median(behind(call) for _ in range(1000))
    print(name, policy, f"{used:.2f} {behind_it:.2f} ms", file=sys.stderr)
PYTHON
export JAX_PLATFORMS=cpu
for policy in '' PASSIVE; do
    env ${policy:+OMP_WAIT_POLICY=$policy} "$folder/venv/bin/python" "$folder/program.py" \
        >>"$folder/found" 2>>"$folder/times"
done
cat "$folder/found" "$folder/times"
diff "$folder/found" - <<'EXPECTED'
jax default False
torch default True
jax PASSIVE False
torch PASSIVE False
EXPECTED
