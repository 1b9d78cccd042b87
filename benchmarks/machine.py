"""Where and with what it ran: the processor, its load, the versions, the commit."""

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time

import numpy as np
import psutil

from jaxlinear._op.cpu import NATIVE, bfloat16_form

ROOT = pathlib.Path(__file__).parent.parent
LIBRARIES = ["jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "numpy"]
LIBRARIES += ["optax", "tokamax"]
NOT_BUSY = "idle", "iowait", "guest", "guest_nice"  # Guests are in other fields too.
SETTINGS = ["XLA_FLAGS", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"]
SETTINGS += ["ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"]
"""Environment variables that restrict the instructions or the threads of a library."""

FEATURES = ["avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16"]  # The last of Arm.


def describe(device):
    is_cpu = device.platform == "cpu"
    return {
        "device": f"CPU, {os.cpu_count()} cores" if is_cpu else device.device_kind,
        "cpu": processor() | {"bfloat16 instructions": bfloat16_instructions()},
        "settings": {n: os.environ[n] for n in SETTINGS if os.environ.get(n)},
        "versions": versions(),
        **stamp(),
    }


class Load:
    """What other processes use of the processor, from now on."""

    def __init__(self):
        self._start = self._times()

    def _times(self):
        """Seconds of the clock, of busy cores, and of those that are busy for us.

        A core is busy as well where a hypervisor has taken it.
        """
        cores, own = psutil.cpu_times()._asdict(), psutil.Process()
        busy = sum(cores.values()) - sum(cores.get(name, 0) for name in NOT_BUSY)
        family = [p.cpu_times() for p in (own, *own.children(recursive=True))]
        return time.perf_counter(), busy, sum(t.user + t.system for t in family)

    def of_others(self):
        """Cores that others used, on average."""
        clock, busy, own = np.subtract(self._times(), self._start)
        return max(0.0, float((busy - own) / clock))


def stamp():
    """When, and of which commit."""
    commit, is_clean = git_state(ROOT)
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
        "tree is clean": is_clean,
    }


def stamped(document):
    """The stamp of a document, in words."""
    changed = "" if document["tree is clean"] else " with changes"
    return f"on {document['date'][:10]} at commit {document['commit'][:7]}{changed}"


def kind(document):
    is_native = document["cpu"]["bfloat16 instructions"] == "yes"
    return f"CPU {'with' if is_native else 'without'} bfloat16 instructions"


def place(document):
    """The machine of a document, in words, and how it was restricted."""
    cores = document["device"].removeprefix("CPU, ")
    model = document["cpu"]["model"]
    settings = document.get("settings", {})  # Older files do not have them.
    if settings:
        found = " ".join(f"{name}={value}" for name, value in settings.items())
        model += f", restricted by `{found}`"
    return f"{kind(document)} ({model}), {cores}"


def bfloat16_instructions():
    """Whether XLA compiles for a CPU that has them; it may be told not to use them."""
    return "yes" if bfloat16_form() == NATIVE else "no"


def versions():
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor(file=pathlib.Path("/proc/cpuinfo")):
    """The model, and which of the features that matter here it has.

    Without such a file, as on macOS and Windows, the features are not known: None.
    """
    if not file.exists():
        model = platform.processor() or platform.machine()
        return {"model": model, "features": None}
    lines = (line.partition(":") for line in file.read_text().splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", fields.get("Features", "")).split()
    features = [name for name in FEATURES if name in flags]
    return {"model": fields.get("model name", platform.machine()), "features": features}


def git_state(folder):
    """The commit, and whether the working tree has no other change."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit, not _git(folder, "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):  # No git, or no clone.
        return None, None


def _git(folder, *arguments):
    command = ["git", "-C", str(folder), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout.strip()
