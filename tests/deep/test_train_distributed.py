"""The example over several processes, killed at any moment and started again."""

import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from oracle import wide

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "examples" / "launch.py"
EXAMPLE = ROOT / "examples" / "train_distributed.py"
KILLS = int(os.environ.get("KILLS", "1"))
STEPS = 40
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}
ENVIRONMENT.pop("XLA_FLAGS", None)  # One device in each process.


def start(folder, processes, sharding):
    command = [sys.executable, LAUNCHER, str(processes), EXAMPLE]
    return subprocess.Popen(
        [*command, "--steps", str(STEPS), "--sharding", sharding],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder, processes, sharding):
    run = start(folder, processes, sharding)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    return printed


def parameters(folder):
    """What the last checkpoint has, by path, as NumPy arrays."""
    checkpointer = ocp.PyTreeCheckpointer()
    path = folder / "train_distributed" / str(STEPS) / "default"
    saved = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    leaves = jax.tree.leaves_with_path(
        checkpointer.restore(path, restore_args=as_numpy)
    )
    return {jax.tree_util.keystr(path): array for path, array in leaves}


def ranks_of(run):
    """The two processes that a launcher starts, once it has."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    for _ in range(100):
        found = [int(pid) for pid in children.read_text().split()]
        if len(found) == 2:
            return found
        time.sleep(0.05)
    raise AssertionError("no process was started")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The parameters at the end, and the seconds until then."""
    folder, begin = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    printed = finish(folder, 2, "fsdp")
    seconds = time.monotonic() - begin
    losses = [
        float(line.split()[-1]) for line in printed.splitlines() if "loss" in line
    ]
    assert losses[-1] < losses[0] - 0.2
    return parameters(folder), seconds


@pytest.mark.parametrize("kill", range(KILLS))
def test_it_ends_as_it_would_have_whichever_process_is_killed(
    kill, undisturbed, tmp_path
):
    expected, seconds = undisturbed
    chance = random.Random(kill)
    run = start(tmp_path, 2, "fsdp")
    ranks, victim = ranks_of(run), chance.randrange(2)
    time.sleep(chance.uniform(0, 0.8 * seconds))
    os.kill(ranks[victim], signal.SIGKILL)
    printed, _ = run.communicate(timeout=60)
    if run.returncode:  # Else it was faster than before.
        assert f"Process {victim} ended with -9, so the others are ended." in printed
        assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    finish(tmp_path, 2, "fsdp")
    for name, array in parameters(tmp_path).items():
        np.testing.assert_array_equal(array, expected[name])


def test_another_number_of_processes_goes_on(undisturbed, tmp_path):
    run = start(tmp_path, 2, "data")
    for line in run.stdout:
        if line.startswith("step 16"):
            break
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    run.communicate(timeout=60)
    finish(tmp_path, 4, "fsdp")
    for name, array in parameters(tmp_path).items():
        # Sums over devices in another order, through forty steps. The bias of keys is
        # zero but for rounding: no softmax depends on it.
        exact = wide(undisturbed[0][name])
        error, size = np.linalg.norm(wide(array) - exact), np.linalg.norm(exact)
        assert error < 1e-4 * size + 1e-6


def test_it_listens_on_loopback_alone_unless_told_otherwise(monkeypatch):
    program = runpy.run_path(str(LAUNCHER))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "192.0.2.1")
    monkeypatch.setattr(sys, "argv", ["launch.py", "2", str(EXAMPLE)])
    with pytest.raises(
        SystemExit, match=r"would listen at 192\.0\.2\.1: pass --listen"
    ):
        program["main"]()
