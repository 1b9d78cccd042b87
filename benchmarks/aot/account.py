"""What a compiled program does, from its text: kernels, products, bytes, collectives.

A kernel reads each operand and writes each result once, whenever it starts: in a loop
by its trip count. Of an array that a fusion slices, or updates in place, only the slice
counts. An asynchronous pair is one operation.
"""

import collections
import dataclasses
import math
import re

from jaxlinear.inspect._hlo import bits, collective, is_product, received

# ROOT %name = bf16[8,4]{1,0} dot(%a, %b), …
_INSTRUCTION = re.compile(
    r"^ +(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$", re.MULTILINE
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", re.M | re.S)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_NO_KERNEL |= {"after-all", "opt-barrier", "partition-id", "replica-id"}
_MOVES = {"convert": "converts", "copy": "copies", "transpose": "transposes"}


@dataclasses.dataclass
class Account:
    """Per device.

    Attributes:
      kernels: how many start.
      bytes: what they read and write.
      flops: floating-point operations of the products, two for each term.
      moves: how many converts, copies and transposes there are, alone or in a fusion.
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

    def add(self, other, times=1, with_kernels=True):
        if with_kernels:
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
    computations, entry = {}, None
    for is_entry, name, body in _COMPUTATION.findall(text):
        computations[name] = _INSTRUCTION.findall(body)
        entry = name if is_entry else entry
    partitions = re.search(r"num_partitions=(\d+)", text)
    return _of(computations, entry, int(partitions[1]) if partitions else 1, set())


def _of(computations, name, partitions, channels):
    """That of a computation; ``channels`` are those of collectives that were counted.

    A collective that goes on beside others is in several fusions, with one channel.
    """
    total, types = Account(), {}
    for _, result, type_, opcode, operands, attributes in computations[name]:
        types[result] = type_
        read = [types[o] for o in re.findall(r"%([\w.-]+)", operands) if o in types]
        called = re.findall(r"\b(?:body|to_apply|calls)=%?([\w.-]+)", attributes)
        if opcode == "while":
            inner = _of(computations, called[0], partitions, set())
            total.add(inner, _trips(computations, attributes))
            continue
        if opcode in ("call", "call-start", "async-start"):
            total.add(_of(computations, called[0], partitions, channels))
            continue
        is_fusion = opcode in ("fusion", "fusion-start")
        if is_fusion:
            inner = _of(computations, called[0], partitions, channels)
            if "all-reduce-scatter" in called[0]:
                inner = _scattered(inner, type_)
            total.add(inner, with_kernels=False)
        elif kind := collective(opcode):
            channel = re.search(r"channel_id=(\d+)", attributes)
            if channel and channel[1] in channels:
                continue
            channels.add(channel and channel[1])
            arrays = received(opcode, _ARRAY.findall(type_), len(read))
            size = _group(partitions, attributes)
            _add_received(total, kind, arrays, size)
        elif is_product(opcode, attributes):
            total.flops += _flops(type_, read, attributes)
        elif opcode in _MOVES:
            total.moves[_MOVES[opcode]] += 1
        # The copies into and out of a TPU's fast memory are no kernels: what reads or
        # wrote the array counts them.
        is_prefetch = opcode in ("copy-start", "slice-start") and "S(1)" in type_
        if opcode in _NO_KERNEL or opcode.endswith(("-done", "-update")) or is_prefetch:
            continue
        total.kernels += 1
        if is_fusion:
            total.bytes += _fusion_bytes(computations[called[0]], read)
        else:
            # A library's workspace is bytes: no array of the program.
            is_library = opcode == "custom-call"
            written = re.sub(r"\bs8\[\d+\]", "", type_) if is_library else type_
            total.bytes += sum(map(_bytes, read)) + _bytes(written)
    return total


def _trips(computations, attributes):
    """How often a loop runs: as XLA says, or as its counter and its condition do."""
    known = re.search(r"known_trip_count\W+n\W+(\d+)", attributes)
    if known:
        return int(known[1])
    condition, body = (
        {
            name: rest
            for _, name, *rest in computations[_found(rf"{p}=%?([\w.-]+)", attributes)]
        }
        for p in ("condition", "body")
    )
    [compared] = [rest for rest in condition.values() if rest[1] == "compare"]
    assert "direction=LT" in compared[3], "another kind of loop"
    counter, limit = (condition[o] for o in re.findall(r"%([\w.-]+)", compared[2]))
    # One iteration may be several steps.
    [*_, root] = body.values()
    place = int(_found(r"index=(\d+)", counter[3]))
    name, step = re.findall(r"%([\w.-]+)", root[2])[place], 0
    while body[name][1] != "get-tuple-element":
        assert body[name][1] in ("add", "copy"), "a counter of another kind"
        name, *added = re.findall(r"%([\w.-]+)", body[name][2])
        step += sum(int(body[constant][2]) for constant in added)
    return -(-int(limit[2]) // step)


def _found(pattern, text):
    """What the pattern's group finds, which must be there."""
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text}"
    return found[1]


# Products.


def _flops(type_, read, attributes):
    """Two for each term of the sums that a product has."""
    left, right = (_shapes(operand)[0] for operand in read[:2])
    result = max(_shapes(type_), key=math.prod)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if not labels:
        axes = _found(r"lhs_contracting_dim\w*\W+([\d,\"]*)", attributes)
        contracted = (left[int(axis)] for axis in re.findall(r"\d+", axes))
        return 2 * math.prod(result) * math.prod(contracted)
    left, right, result = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), (left, right, result), strict=True)
    )
    terms = result["b"] * result["f"] * right["i"]
    for axis in (name for name in result if name.isdigit()):
        terms *= _taps(left[axis], result[axis], attributes, int(axis))
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


def _shapes(type_):
    return [
        [int(n) for n in shape.split(",") if n] for _, shape in _ARRAY.findall(type_)
    ]


# Collectives.


def _add_received(total, kind, arrays, size):
    """Add what each of ``size`` devices receives, and what it sends for it."""
    for dtype, shape in arrays:
        found = _bytes(f"{dtype}[{shape}]")
        total.collectives[kind, dtype] += found
        # Each of the others' parts of what is gathered; as much of what is scattered,
        # which is in `size` parts; both for what is reduced everywhere.
        others = (size - 1) / size
        sent = {"all-reduce": 2 * others, "reduce-scatter": size - 1}
        total.wire += found * sent.get(kind, 1 if "permute" in kind else others)


def _scattered(inner, type_):
    """A TPU's fusion of an all-reduce and a slice, which is a reduce-scatter."""
    reduced = Account(flops=inner.flops, moves=inner.moves)
    size = sum(inner.collectives.values()) // _bytes(type_)
    _add_received(reduced, "reduce-scatter", _ARRAY.findall(type_), size)
    return reduced


def _group(partitions, attributes):
    """How many devices take part in one of the groups of a collective."""
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
    return partitions


# Bytes.


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
