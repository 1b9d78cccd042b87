"""PyTorch's state dicts, in memory and in files: tensors by name, read when needed.

A file is checked before it is believed: a safetensors file by the safetensors package,
an index here, and a file of PyTorch's by PyTorch, with ``weights_only=True``.
"""

import errno
import functools
import importlib
import io
import json
import os
import secrets
import stat
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

INDEX = ".safetensors.index.json"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_WRITTEN = (".safetensors", INDEX, ".pt", ".pth", ".bin")
_READ = (*_WRITTEN, ".bin.index.json", ".ckpt")
_SHARD_BYTES = 5 * 10**9  # As on the Hugging Face Hub.


class Tensor(NamedTuple):
    """A tensor that has not been read yet.

    ``read()`` returns an array in the memory of the file or of PyTorch: slicing it
    first reads only the slice. A dtype that NumPy does not have is a string.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | str
    read: Callable[[], np.ndarray]


def tensors_of(source) -> dict[str, Tensor]:
    """The tensors of a state dict, or of the file at a path, by name."""
    if isinstance(source, Mapping):
        return {name: _in_memory(name, value) for name, value in source.items()}
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"`source` must be a path or a state dict, got {type(source).__name__}"
        )
    path = Path(source)
    if path.is_dir():
        files = [file.name for file in path.iterdir() if _ends(file, _READ)]
        files.sort(key=lambda name: (not name.endswith(".json"), name))
        advice = f": pass a file of it, such as {files[0]!r}" if files else ""
        raise ValueError(
            f"`source` must be a file, got the folder {str(path)!r}{advice}"
        )
    _check_ending("source", path, _READ)
    return _index_tensors(path) if path.suffix == ".json" else _file_tensors(path)


def _file_tensors(path):
    return (_pickled_tensors if path.suffix in PICKLED else _safetensors_tensors)(path)


def _ends(path, endings):
    return path.name.endswith(endings)


def _check_ending(name, path, endings):
    if not _ends(path, endings):
        *others, last = endings
        raise ValueError(
            f"`{name}` must end in {', '.join(others)} or {last}, got {path.name!r}"
        )


# In memory.


def _in_memory(name, value):
    if not isinstance(name, str):
        raise TypeError(f"`source` must have names for its tensors, got {name!r}")
    torch = sys.modules.get("torch")  # If nobody has imported it, there is no tensor.
    if torch and isinstance(value, torch.Tensor):
        if type(value).__torch_dispatch__ != torch.Tensor.__torch_dispatch__:
            # Its values are on other processes, or packed in some way.
            advice = ""
            if hasattr(value, "full_tensor"):
                advice = ": pass its `full_tensor()`, which every process must call"
            raise TypeError(
                f"`source` must have dense tensors with values, got"
                f" {type(value).__name__} at {name!r}{advice}"
            )
        if torch.nn.parameter.is_lazy(value):
            raise TypeError(
                f"`source` must have dense tensors with values, got {name!r}, which"
                " PyTorch draws at the first call of its layer"
            )
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise TypeError(
                f"`source` must have dense tensors with values, got {name!r} with"
                f" {value.layout}, {value.device}, {value.dtype}"
            )
        dtype = _numpy_dtype(str(value.dtype).removeprefix("torch."))
        return Tensor(tuple(value.shape), dtype, lambda: _from_torch(value, dtype))
    if isinstance(value, (np.ndarray, jax.Array)):
        return Tensor(value.shape, value.dtype, lambda: np.asarray(value))
    inner = " (is the state dict inside of it?)" if isinstance(value, Mapping) else ""
    raise TypeError(
        f"`source` must be a state dict of tensors, got {type(value).__name__} at"
        f" {name!r}{inner}"
    )


def _numpy_dtype(name: str) -> Any:
    try:
        return np.dtype(name)  # ml_dtypes adds the dtypes of low precision.
    except TypeError:
        return name


def _from_torch(tensor, dtype):
    import torch

    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if dtype.type.__module__ != ml_dtypes.__name__:
        return tensor.numpy()
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    return tensor.view(bits).numpy().view(dtype)


def _to_torch(array):
    import torch

    if array.dtype.type.__module__ != ml_dtypes.__name__:
        return torch.from_numpy(array)
    bits = array.view({1: np.uint8, 2: np.int16}[array.dtype.itemsize])
    return torch.from_numpy(bits).view(getattr(torch, array.dtype.name))


# Files that are read.

_NAMES_IN_SAFETENSORS = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def _safetensors_tensors(path):
    safetensors = _imported("safetensors")
    try:
        # This checks the header, and that the tensors cover the file without a gap.
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        message = f"`source` must be a whole safetensors file, got {str(path)!r}"
        raise ValueError(f"{message}: {error}") from error
    # The package does not read float8 into NumPy.
    file = np.memmap(path, np.uint8, "r")
    start = 8 + int(file[:8].view("<u8")[0])
    header = _json(path, bytes(file[8:start]))
    header.pop("__metadata__", None)

    def tensor(entry):
        first, last = (start + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        name: str = entry["dtype"]
        dtype = _numpy_dtype(_NAMES_IN_SAFETENSORS.get(name, name))
        return Tensor(shape, dtype, lambda: file[first:last].view(dtype).reshape(shape))

    return {name: tensor(entry) for name, entry in header.items()}


def _index_tensors(path):
    """The tensors of the files beside an index."""
    where, files = _shards(path)
    return {name: files[file][name] for name, file in where.items()}


def _shards(path):
    """The file of each tensor, according to an index, and the tensors of each file."""
    index = _json(path, path.read_bytes())
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict):
        raise _not_an_index(path, "it has no weight_map")
    files = {}
    for file in where.values():
        # Nothing outside of the folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise _not_an_index(path, f"{file!r} is not the name of a file beside it")
        if file not in files:
            files[file] = _file_tensors(path.parent / file)
    for name, file in where.items():
        if name not in files[file]:
            raise _not_an_index(path, f"{file} has no tensor {name!r}")
    return where, files


def _not_an_index(path, why):
    return ValueError(f"`source` must be an index of files beside it, {path}: {why}")


def _json(path, text) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        message = f"`source` must hold JSON that can be read, {path}: {error}"
        raise ValueError(message) from error


def _without_duplicates(pairs):
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name occurs twice")
    return unique


def _pickled_tensors(path):
    torch = _imported("torch")
    path.open("rb").close()  # From here on an error is about the file's content.
    options = {"map_location": "cpu", "weights_only": True}
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
            state = torch.load(path, mmap=True, **options)
        else:
            # From before PyTorch 1.6. In memory a wrong length cannot read too much.
            state = torch.load(io.BytesIO(path.read_bytes()), **options)
    except Exception as error:  # PyTorch raises whatever the bytes lead it to.
        message = (
            f"`source` must be a state dict that PyTorch can load, {path}: {error}"
        )
        raise ValueError(message) from error
    if path.suffix == ".ckpt" and isinstance(state, Mapping):
        state = state.get("state_dict", state)  # Lightning's files have more.
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise ValueError(f"`source` must hold a state dict, got {kind} in {path}")
    return tensors_of(state)


def _check_archive(path):
    """Refuse an archive with other bytes than were written: PyTorch does not check."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            if entry.CRC:  # PyTorch can be told not to write it.
                with archive.open(entry) as file:
                    while file.read(1 << 20):
                        pass


def _imported(package):
    """A package that reads and writes files, or an error that says how to get it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        message = f"this file needs {package}: pip install {package}"
        raise ModuleNotFoundError(message, name=error.name) from error


# Files that are written. Each is complete or missing: it is written beside the file
# that it replaces, and renamed when it is on the disk.


def write(path, arrays: Mapping[str, Any]):
    """Write arrays by name. An array on devices is fetched when it is written.

    Every error of the file is an OSError that names the path.
    """
    _check_ending("path", path, _WRITTEN)
    named, path = path, Path(os.path.realpath(path))  # A link stays one.
    _check_dtypes(path, arrays)
    write_file = _write_pickled if path.suffix in PICKLED else _write_safetensors
    try:
        if path.exists() and not path.is_file():
            # Else a device would be replaced, and a folder fail only at the very end.
            kind = errno.EISDIR if path.is_dir() else errno.EINVAL
            raise OSError(kind, os.strerror(kind))
        if path.name.endswith(INDEX):
            _write_shards(path, arrays)
        else:
            _replace(path, lambda file: write_file(file, arrays))
    except OSError as error:
        if error.errno is None:
            message = f"`path` must be a file that can be written, {named}: {error}"
            raise OSError(message) from error
        # What failed may be the file beside it.
        raise OSError(error.errno, error.strerror, str(named)) from error


def _check_dtypes(path, arrays):
    known = set(_NAMES_IN_SAFETENSORS.values())
    if path.suffix in PICKLED:
        _imported("torch")
        known.add("complex128")
    else:
        _imported("safetensors")
    for name, array in arrays.items():
        if str(array.dtype) not in known:
            raise ValueError(
                f"`source` must have dtypes that the file can have, got {array.dtype}"
                f" at {name!r}"
            )


def _fetched(arrays):
    """The arrays on the host, a tied one once."""
    hosts = {id(array): np.asarray(array, order="C") for array in arrays.values()}
    return {name: hosts[id(array)] for name, array in arrays.items()}


def _write_safetensors(file, arrays):
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    hosts = _fetched(arrays)
    try:
        # Other readers ask for the format.
        save_file(hosts, file, metadata={"format": "pt"})
    except SafetensorError as error:  # The dtypes have been checked.
        raise OSError(str(error)) from error


def _write_pickled(file, arrays):
    torch = _imported("torch")
    state = {name: _to_torch(a.copy()) for name, a in _fetched(arrays).items()}
    with open(file, "wb", buffering=0) as opened:
        try:
            torch.save(state, opened)
        except RuntimeError as error:
            # PyTorch raises an error of its own for that of the disk.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OSError(str(error)) from error


def _write_shards(index, arrays):
    """Write files of at most 5 GB or one tensor, and then the index that names them."""
    shards, size = [{}], 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    # The names are new: the files of the old index stay until it is replaced.
    stem, token = index.name.removesuffix(INDEX), secrets.token_hex(4)
    end = f"of-{len(shards):05}.safetensors"
    files = {
        index.with_name(f"{stem}-{token}-{number:05}-{end}"): shard
        for number, shard in enumerate(shards, start=1)
    }
    where = {}
    for file, shard in files.items():
        where |= dict.fromkeys(shard, file.name)
    total = sum(array.nbytes for array in arrays.values())
    content = {"metadata": {"total_size": total}, "weight_map": where}
    old = _files_in(index)
    try:
        for file, shard in files.items():
            _replace(file, functools.partial(_write_safetensors, arrays=shard))
        _replace(index, lambda file: file.write_text(json.dumps(content, indent=2)))
    except BaseException:
        _remove(files)
        raise
    _remove(old)


def _files_in(index):
    """The files that an index names, if it is one."""
    try:
        return [index.with_name(name) for name in _shards(index)[1]]
    except (ValueError, OSError):
        return []


def _remove(files):
    for file in files:
        file.unlink(missing_ok=True)


def _replace(path, write):
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    # The mode of the old file, or the default of a new one, whatever the writer sets.
    mode = path.stat().st_mode if path.exists() else None
    with open(temporary, "xb") as file:
        mode = mode or os.fstat(file.fileno()).st_mode
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            temporary.chmod(stat.S_IMODE(mode))
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # A folder can be opened, and its new entry flushed.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
