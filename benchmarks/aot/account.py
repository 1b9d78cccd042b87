"""What a compiled program does, from its text: kernels, products, bytes, collectives.

A kernel reads each operand and writes each result once, whenever it starts: in a loop
by its trip count. Of an array that is sliced, or updated in place, in a fusion or not,
only the slice counts. An asynchronous pair is one operation.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

from jaxlinear.inspect._hlo import Instruction, bits, computations

_CALLS = {"call", "call-start", "async-start"}
_FUSIONS = {"fusion", "fusion-start"}
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_NO_KERNEL |= {"after-all", "opt-barrier", "partition-id", "replica-id"}
_NO_KERNEL |= _CALLS | {"while"}
_MOVES = {"convert": "converts", "copy": "copies", "transpose": "transposes"}


class Program(NamedTuple):
    """What XLA compiled."""

    computations: dict[str, list[Instruction]]
    entry: str
    partitions: int


@dataclasses.dataclass
class Account:
    """Per device.

    Attributes:
      kernels: how many start.
      bytes: what they read and write.
      flops: floating-point operations of the products, two for each term.
      moves: how many converts, copies and transposes there are, in a fusion or not.
      collectives: bytes of what each device receives, by kind and dtype.
      wire: bytes that each device sends, where devices pass them on in a ring.
    """

    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    moves: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collectives: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )
    wire: float = 0

    def add(self, other, times=1):
        self.kernels += times * other.kernels
        self.bytes += times * other.bytes
        self.flops += times * other.flops
        self.wire += times * other.wire
        for mine, theirs in (
            (self.moves, other.moves),
            (self.collectives, other.collectives),
        ):
            for key, count in theirs.items():
                mine[key] += times * count


def account(text):
    """The account of a program."""
    partitions = re.search(r"num_partitions=(\d+)", text)
    program = Program(*computations(text), int(partitions[1]) if partitions else 1)
    return _of(program, program.entry, set())


def _of(program, name, channels, is_fused=False):
    """The account of a computation.

    A collective that goes on beside others is in several fusions, with one channel, and
    is counted once: those in ``channels`` were. Outside fusions several collectives may
    have one channel, as in `jax.shard_map`.
    """
    total = Account()
    for instruction in program.computations[name]:
        opcode, kind = instruction.opcode, instruction.collective
        if kind and instruction.channel:
            if is_fused and instruction.channel in channels:
                continue
            channels.add(instruction.channel)
        if opcode == "while":
            inner = _of(program, _called(instruction), set())
            total.add(inner, _trips(program, instruction))
        elif opcode in _CALLS:
            total.add(_of(program, _called(instruction), channels, is_fused))
        elif opcode in _FUSIONS:
            total.add(_fused(program, instruction, channels))
        elif kind:
            size = _group(program, instruction)
            _add_received(total, kind, instruction.received, size)
        elif instruction.is_product:
            total.flops += _flops(instruction)
        elif opcode in _MOVES:
            total.moves[_MOVES[opcode]] += 1
        if _is_kernel(instruction):
            total.kernels += 1
            total.bytes += _kernel_bytes(program, instruction)
    return total


def _called(instruction):
    return _found(r"\b(?:body|to_apply|calls)=%?([\w.-]+)", instruction.attributes)


def _fused(program, fusion, channels):
    """What is inside a fusion, which is one kernel."""
    inner = _of(program, _called(fusion), channels, is_fused=True)
    if "all-reduce-scatter" not in _called(fusion):
        return dataclasses.replace(inner, kernels=0, bytes=0)
    # A TPU's fusion of an all-reduce and a slice, which is a reduce-scatter.
    scattered = Account(flops=inner.flops, moves=inner.moves)
    size = sum(inner.collectives.values()) // _bytes(fusion.results)
    _add_received(scattered, "reduce-scatter", fusion.results, size)
    return scattered


def _is_kernel(instruction):
    # The copies into and out of a TPU's fast memory are not kernels: what reads or
    # wrote the array counts them.
    opcode, is_fast = instruction.opcode, "S(1)" in instruction.type
    is_prefetch = opcode in ("copy-start", "slice-start") and is_fast
    is_end = opcode.endswith(("-done", "-update"))
    return not (opcode in _NO_KERNEL or is_end or is_prefetch)


def _trips(program, loop):
    """How often a loop runs: as XLA says, or as its counter and its condition do."""
    known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
    if known:
        return int(known[1])
    condition, body = (
        program.computations[_found(rf"{part}=%?([\w.-]+)", loop.attributes)]
        for part in ("condition", "body")
    )
    [compared] = (i for i in condition if i.opcode == "compare")
    assert "direction=LT" in compared.attributes, "another kind of loop"
    counter, limit = compared.read
    # One iteration may be several steps.
    place = int(_found(r"index=(\d+)", counter.attributes))
    count, step = body[-1].read[place], 0
    while count.opcode != "get-tuple-element":
        assert count.opcode in ("add", "copy"), "a counter of another kind"
        count, *added = count.read
        step += sum(int(constant.operands) for constant in added)
    return -(-int(limit.operands) // step)


def _found(pattern, text):
    """What the pattern's group finds, which must be there."""
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text}"
    return found[1]


# Products.


def _flops(product):
    """Two for each term of the sums that a product has."""
    left, right = (operand.results[0][1] for operand in product.read[:2])
    result = product.results[0][1]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
    if not labels:
        axes = _found(r"lhs_contracting_dim\w*\W+([\d,\"]*)", product.attributes)
        contracted = (left[int(axis)] for axis in re.findall(r"\d+", axes))
        return 2 * math.prod(result) * math.prod(contracted)
    left, right, result = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), (left, right, result), strict=True)
    )
    terms = result["b"] * result["f"] * right["i"]
    for axis in (name for name in result if name.isdigit()):
        terms *= _taps(left[axis], result[axis], product.attributes, int(axis))
    return 2 * terms


def _taps(size, result, attributes, axis):
    """How often a window falls on an element of the input, along one axis.

    XLA makes a convolution with padding of a product whose result has several axes.
    """

    def window(name, default):
        found = re.search(rf"window=\{{[^}}]*\b{name}=([\dx_-]+)", attributes)
        return found[1].split("x")[axis] if found else default

    taps, stride = int(window("size", 1)), int(window("stride", 1))
    low = int(str(window("pad", "0_0")).split("_")[0])
    inside, between = int(window("lhs_dilate", 1)), int(window("rhs_dilate", 1))
    places = (
        out * stride + tap * between - low
        for out in range(result)
        for tap in range(taps)
    )
    return sum(p % inside == 0 and 0 <= p // inside < size for p in places)


# Collectives.


def _add_received(total, kind, arrays, size):
    """Add what each of ``size`` devices receives, and what it sends for it."""
    for dtype, shape in arrays:
        found = _bytes([(dtype, shape)])
        total.collectives[kind, dtype] += found
        # Each of the others' parts of what is gathered; as much of what is scattered,
        # which is in `size` parts; both for what is reduced everywhere.
        others = (size - 1) / size
        sent = {"all-reduce": 2 * others, "reduce-scatter": size - 1}
        total.wire += found * sent.get(kind, 1 if "permute" in kind else others)


def _group(program, collective):
    """How many devices take part in one of the groups of a collective."""
    attributes = collective.attributes
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return program.partitions


# Bytes.


def _kernel_bytes(program, kernel):
    if kernel.opcode in _FUSIONS:
        return _fusion_bytes(program, kernel)
    if kernel.opcode == "dynamic-slice":
        return 2 * _bytes(kernel.results)
    if kernel.opcode == "dynamic-update-slice":
        return 2 * _bytes(kernel.read[1].results)
    written = kernel.results
    if kernel.opcode == "custom-call":
        # A library's workspace is bytes, and not an array of the program.
        written = [a for a in written if not (a[0] == "int8" and len(a[1]) == 1)]
    return _bytes(written) + sum(_bytes(operand.results) for operand in kernel.read)


def _fusion_bytes(program, fusion):
    size = _bytes(program.computations[_called(fusion)][-1].results)
    size -= _not_written(program, fusion)
    for position, operand in enumerate(fusion.read):
        size += _used(program, fusion, position, _bytes(operand.results))
    return size


def _not_written(program, fusion):
    """What is outside the slices that a fusion updates, also in a fusion inside it."""
    size = 0
    for user in program.computations[_called(fusion)]:
        if user.opcode == "dynamic-update-slice":
            size += _bytes(user.results) - _bytes(user.read[1].results)
        elif user.opcode in _FUSIONS:
            size += _not_written(program, user)
    return size


def _used(program, fusion, place, full):
    """The bytes of a fusion's operand that it reads, of as many as it has."""
    body, users = program.computations[_called(fusion)], collections.defaultdict(list)
    for user in body:
        for position, operand in enumerate(user.read):
            users[operand].append((user, position))
    [parameter] = (
        i for i in body if i.opcode == "parameter" and int(i.operands) == place
    )
    used = 0
    for user, position in _through_bitcasts(users, parameter):
        if user.opcode == "dynamic-slice" and position == 0:
            used += _bytes(user.results)
        elif user.opcode in _FUSIONS:
            used += _used(program, user, position, full)
        elif user.opcode != "dynamic-update-slice" or position:
            return full
    return min(full, used)


def _through_bitcasts(users, array):
    for user, position in users[array]:
        if user.opcode == "bitcast":
            yield from _through_bitcasts(users, user)
        else:
            yield user, position


def _bytes(arrays):
    return sum(math.prod(shape) * bits(dtype) // 8 for dtype, shape in arrays)
