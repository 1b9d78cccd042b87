"""The kernels that a compiled program starts, and the bytes that they read and write.

Each operand is read and each result written once, by every start of the kernel: in a
loop by its trip count. Of an array that a fusion slices, or updates in place, only the
slice counts.
"""

import re

from jaxlinear.inspect._hlo import bits

# ROOT %name = bf16[8,4]{1,0} dot(%a, %b), …
_INSTRUCTION = re.compile(
    r"^ +(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$", re.MULTILINE
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", re.M | re.S)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_NO_KERNEL |= {"after-all", "opt-barrier", "partition-id", "replica-id"}


def kernels(text):
    """How many kernels the program starts, and their bytes."""
    computations, entry = {}, None
    for is_entry, name, body in _COMPUTATION.findall(text):
        computations[name] = _INSTRUCTION.findall(body)
        entry = name if is_entry else entry
    return _cost(computations, entry)


def _cost(computations, name):
    total, size, types = 0, 0, {}
    for _, result, type_, opcode, operands, attributes in computations[name]:
        types[result] = type_
        read = [types[o] for o in re.findall(r"%([\w.-]+)", operands) if o in types]
        # An asynchronous pair is one kernel; the copies into and out of a TPU's fast
        # memory are none: what reads or wrote the array counts them.
        is_prefetch = opcode in ("copy-start", "slice-start") and "S(1)" in type_
        if opcode in _NO_KERNEL or opcode.endswith(("-done", "-update")) or is_prefetch:
            continue
        called = re.search(r"\b(?:body|to_apply|calls)=%?([\w.-]+)", attributes)
        if opcode in ("while", "call", "async-start"):
            count, inner = _cost(computations, called[1])
            trips = re.search(r"known_trip_count\W+n\W+(\d+)", attributes)
            assert opcode != "while" or trips, f"a loop of unknown length: {result}"
            repeats = int(trips[1]) if opcode == "while" else 1
            total, size = total + repeats * count, size + repeats * inner
            continue
        total += 1
        if opcode in ("fusion", "fusion-start"):
            size += _fusion_bytes(computations[called[1]], read)
        else:
            # A library's workspace is bytes: no array of the program.
            is_library = opcode == "custom-call"
            written = re.sub(r"\bs8\[\d+\]", "", type_) if is_library else type_
            size += sum(map(_bytes, read)) + _bytes(written)
    return total, size


def _fusion_bytes(body, read):
    size = sum(_bytes(type_) for is_root, _, type_, *_ in body if is_root)
    types = {name: type_ for _, name, type_, *_ in body}
    users = {}
    for _, name, _, opcode, operands, _ in body:
        names = re.findall(r"%([\w.-]+)", operands)
        for position, operand in enumerate(names):
            users.setdefault(operand, []).append((opcode, position, name))
        if opcode == "dynamic-update-slice":
            size -= _bytes(types[name]) - _bytes(types[names[1]])
    for _, name, _, opcode, number, _ in body:
        if opcode != "parameter":
            continue
        full, used = _bytes(read[int(number)]), 0
        for user, position, result in _through_bitcasts(users, name):
            if user == "dynamic-slice" and position == 0:
                used += _bytes(types[result])
            elif user != "dynamic-update-slice" or position:
                used = full
                break
        size += min(full, used)
    return size


def _through_bitcasts(users, name):
    for opcode, position, result in users.get(name, []):
        if opcode == "bitcast":
            yield from _through_bitcasts(users, result)
        else:
            yield opcode, position, result


def _bytes(type_):
    size = 0
    for dtype, shape in _ARRAY.findall(type_):
        elements = 1
        for n in filter(None, shape.split(",")):
            elements *= int(n)
        size += elements * bits(dtype) // 8
    return size
