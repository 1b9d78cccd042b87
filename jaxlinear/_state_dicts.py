"""PyTorch's state dicts, in files and in memory: names and tensors, read when needed.

What is in a file decides nothing before it has been checked: a safetensors file by the
safetensors package, an index here, and a file of PyTorch's by PyTorch, which unpickles
tensors alone.
"""

import contextlib
import json
import math
import mmap
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class Tensor(NamedTuple):
    """A tensor that has not been read yet.

    ``read()`` is an array that shares memory with the file or with PyTorch: a slice of
    it reads no more than itself.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def tensors_of(source) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a file, by name."""
    if isinstance(source, Mapping):
        return {name: _in_memory(name, value) for name, value in source.items()}
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "`source` must be a path or a state dict, got"
            f" {type(source).__name__}: pass its `state_dict()` if it is a module"
        )
    path = Path(source)
    if path.name.endswith(INDEX):
        return _sharded(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in PICKLED:
        return _pickled(path)
    raise ValueError(f"`source` must end in {_ENDINGS}, got {str(source)!r}")


INDEX = ".safetensors.index.json"
PICKLED = (".pt", ".pth", ".bin")
_ENDINGS = ".safetensors, .safetensors.index.json, .pt, .pth or .bin"
