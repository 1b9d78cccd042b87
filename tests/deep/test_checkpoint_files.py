"""Files that are damaged, and a process that is killed while it writes one."""

import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc

import jax
import numpy as np
import pytest

from jaxlinear.torch import load, save

SHAPES = {
    f"layers.{i}.{name}": shape
    for i in range(4)
    for name, shape in (("weight", (16, 8)), ("bias", (16,)))
}


def state(seed):
    generator = np.random.default_rng(seed)
    return {n: generator.normal(size=s).astype("float32") for n, s in SHAPES.items()}


def damaged(whole, chance):
    """One way to damage a file, drawn at random."""
    content = bytearray(whole)
    kind = chance.choice(["bits", "bits", "cut", "splice", "noise", "pickle"])
    if kind == "bits":
        # Most of them in the header.
        end = chance.choice([len(content), 800, 800])
        for _ in range(chance.choice([1, 1, 2, 8, 64])):
            content[chance.randrange(end)] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[chance.randrange(len(content)) :]
    elif kind == "splice":
        start = chance.randrange(len(content))
        content[start : start + chance.randrange(64)] = chance.randbytes(
            chance.randrange(64)
        )
    elif kind == "noise":
        content = bytearray(chance.randbytes(chance.randrange(200)))
    else:
        content = bytearray(pickle.dumps(os.getcwd)) + content
    return bytes(content)


def forged(whole, chance):
    """A header that says something else, with the data that was there."""
    size = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    entry = header[chance.choice([name for name in header if name[0] != "_"])]
    offsets = [-1, 0, 4, 64, 512, 1 << 40, 1 << 63, (1 << 64) - 1]
    shapes = [
        [1 << 62, 4],
        [1 << 31, 1 << 31],
        [8, 16],
        [128],
        [16, 8, 1],
        [],
        [0],
        [-1],
    ]
    dtypes = ["I32", "F16", "F64", "none", "F8_E4M3", "F4", "U32", "C64"]
    kind = chance.choice(["offsets", "shape", "dtype", "twice", "length"])
    if kind == "offsets":
        entry["data_offsets"] = chance.sample(offsets, 2)
    elif kind == "shape":
        entry["shape"] = chance.choice(shapes)
    elif kind == "dtype":
        entry["dtype"] = chance.choice(dtypes)
    text = json.dumps(header).encode()
    if kind == "twice":
        first, second = chance.sample(sorted(SHAPES), 2)
        text = text.replace(f'"{first}"'.encode(), f'"{second}"'.encode())
    length = len(text) + (chance.choice([-3, 3, 1 << 40]) if kind == "length" else 0)
    return struct.pack("<Q", length) + text + data


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_500_damaged_files_are_refused_or_loaded(ending, tmp_path):
    if ending == ".pt":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    path, chance = tmp_path / f"model{ending}", random.Random(0)
    save(state(0), path)
    whole = path.read_bytes()
    target = jax.tree.map(np.zeros_like, state(0))
    ends = {"refused": 0, "loaded": 0}
    for _ in range(500):
        is_forged = ending == ".safetensors" and chance.random() < 0.5
        content = (forged if is_forged else damaged)(whole, chance)
        path.write_bytes(content)
        tracemalloc.start()
        try:
            loaded = load(target, path)
        except ValueError:
            ends["refused"] += 1
        else:
            # What is left is what the file says.
            assert {n: a.shape for n, a in loaded.items()} == SHAPES
            ends["loaded"] += 1
        # What Python needs for a small file is not the file's.
        assert tracemalloc.get_traced_memory()[1] < 4 * len(whole) + 2**20
        tracemalloc.stop()
        assert all(not np.any(array) for array in target.values())
    assert ends["refused"] > 400
    assert ends["loaded"] > 0


# It imports what it needs once, and for each line that it reads starts a process that
# saves until it is killed.
WRITER = """
import os, sys
import numpy as np
from jaxlinear.torch import save

for _ in sys.stdin:
    value, saving = 0, os.fork()
    while not saving:
        value += 1
        array = np.full((500, 500), value, "float32")
        save(dict.fromkeys("abcd", array), sys.argv[1])
    print(saving, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(saving, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
def test_a_save_that_is_killed_leaves_a_whole_file(file, tmp_path):
    """At 50 moments in all; each time the file is one that was saved."""
    path, chance = tmp_path / file, random.Random(file)
    target = {name: np.zeros((500, 500), "float32") for name in "abcd"}
    save(target, path)
    values = set()
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        **dict.fromkeys(["stdin", "stdout"], subprocess.PIPE),
        text=True,
        bufsize=1,
    ) as writer:
        for _ in range(25):
            print(file=writer.stdin)
            saving = int(writer.stdout.readline())
            time.sleep(chance.uniform(0, 0.1))
            os.kill(saving, signal.SIGKILL)
            assert int(writer.stdout.readline()) == -signal.SIGKILL
            loaded = load(target, path)
            [value] = {float(x) for a in loaded.values() for x in np.unique(a)}
            values.add(value)
        writer.stdin.close()
    assert len(values) > 1  # There was time to save.
