"""The collectives of a compiled program, read from its text, and an option for it.

Not with `jaxlinear.inspect`, which the tests of it compare with this.
"""

import math
import re

import jax

# The emitters of fusions that users have, where a test compares whole programs.
IS_OLD = jax.__version_info__ < (0, 11)
NEWER_EMITTERS = {"xla_cpu_use_fusion_emitters": True} if IS_OLD else {}

BYTES = {
    "pred": 1,
    "s8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
}


def collectives(compiled):
    """Kind, dtype and bytes of each array that a collective moves, sorted.

    A collective may move several arrays at once, and may be split in start and done.
    """
    kinds = r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-\w+?"
    operation = rf"= (.*?) ({kinds})(?:-start)?\("
    found = []
    for result, kind in re.findall(operation, compiled.as_text()):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            size = math.prod(int(n) for n in shape.split(",") if n)
            found.append((kind, dtype, size * BYTES[dtype]))
    return sorted(found)
