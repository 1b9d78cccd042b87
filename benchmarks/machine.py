"""Where and with what it ran: the processor, the versions, the commit."""

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess

ROOT = pathlib.Path(__file__).parent.parent
LIBRARIES = ["jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "numpy"]
LIBRARIES += ["optax", "tokamax"]
FEATURES = ["avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16"]  # The last of Arm.


def describe(device):
    is_cpu = device.platform == "cpu"
    return {
        "device": f"CPU, {os.cpu_count()} cores" if is_cpu else device.device_kind,
        "cpu": processor(),
        "versions": versions(),
        **stamp(),
    }


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
    """The machine of a document, in words."""
    cores = document["device"].removeprefix("CPU, ")
    return f"{kind(document)} ({document['cpu']['model']}), {cores}"


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
        return {"model": model, "features": None, "bfloat16 instructions": None}
    lines = (line.partition(":") for line in file.read_text().splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", fields.get("Features", "")).split()
    features = [name for name in FEATURES if name in flags]
    is_native = any(name.endswith("bf16") for name in features)
    return {
        "model": fields.get("model name", platform.machine()),
        "features": features,
        "bfloat16 instructions": "yes" if is_native else "no",
    }


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
