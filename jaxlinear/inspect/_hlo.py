"""What the text of an XLA program says about its products and its collectives."""

import dataclasses
import re
from functools import cached_property

# ROOT %name = bf16[8,4]{1,0} dot(%a, %b), …, metadata={op_name="jit(f)/forward/dot"}
_INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$", re.MULTILINE
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", re.M | re.S)
_ARRAY = re.compile(r"\b(pred|[a-z]+(?=\d))(\d*)(\w*)\[([\d,]*)\]")
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)', re.IGNORECASE)
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-[a-z]+)"
    r"(-start)?"
)
_LONG_NAMES = {"bf": "bfloat", "f": "float", "c": "complex", "s": "int", "u": "uint"}
_LONG_NAMES["pred"] = "bool"


@dataclasses.dataclass(eq=False)
class Instruction:
    """One operation: a line of the text, and what can be read from it.

    Attributes:
      operands: the text in its brackets: names, or a number.
      read: the instructions among them.
    """

    type: str
    opcode: str
    operands: str
    attributes: str
    read: tuple["Instruction", ...] = dataclasses.field(repr=False)
    op_name: str

    @cached_property
    def results(self):
        """The arrays that it returns: the dtype and the shape of each."""
        return tuple(
            (_long_name(*dtype), tuple(int(n) for n in shape.split(",") if n))
            for *dtype, shape in _ARRAY.findall(self.type)
        )

    @property
    def operand_dtypes(self):
        return tuple(r[0] for operand in self.read for r in operand.results[:1])

    @property
    def is_product(self):
        is_library = self.opcode == "custom-call" and _LIBRARY.search(self.attributes)
        return self.opcode in ("dot", "convolution") or bool(is_library)

    @property
    def runs_as(self):
        library = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return library[1] if library else self.opcode

    @property
    def precision(self):
        """The algorithm, or the precision of the operands, as XLA calls them."""
        algorithm = re.search(r"algorithm\W+(?:ALG_)?(dot_\w+)", self.attributes, re.I)
        if algorithm:
            return algorithm[1].lower()
        words = re.search(r"operand_precision\W+(\w+)\W+(\w+)", self.attributes)
        return "/".join(dict.fromkeys(words.groups())).lower() if words else "default"

    @property
    def collective(self):
        """The kind of collective, or None. Of a start and a done, the start is one."""
        found = _COLLECTIVE.fullmatch(self.opcode)
        return found and found[1]

    @property
    def channel(self):
        """The number of a collective, which XLA repeats where it makes it async."""
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return found and found[1]

    @property
    def received(self):
        """The arrays that a collective returns on each device."""
        # An asynchronous start may return its operands first, or counters at the end.
        # Whether an all-reduce does so depends on the version of XLA.
        has_operands = self.opcode in ("all-gather-start", "reduce-scatter-start") or (
            self.opcode == "all-reduce-start"
            and len(self.results) == 2 * len(self.operand_dtypes)
        )
        if has_operands:
            return self.results[len(self.results) // 2 :]
        is_permute = self.opcode == "collective-permute-start"
        return self.results[1:2] if is_permute else self.results


def computations(text):
    """The instructions of each computation, by its name, and the name of the entry."""
    found, known, entry = {}, {}, ""
    for is_entry, name, body in _COMPUTATION.findall(text):
        found[name] = list(_parsed(body, known))
        entry = name if is_entry else entry
    return found, entry


def instructions(text):
    """The instructions of a program, in the order of its text."""
    found, readers = list(_parsed(text, {})), {}
    for instruction in found:
        for operand in instruction.read:
            readers.setdefault(operand, instruction.op_name)
    # An instruction that XLA made may have no origin: it gets its reader's.
    for instruction in found:
        instruction.op_name = instruction.op_name or readers.get(instruction, "")
    return found


def _parsed(text, known):
    """Yield the instructions of the text, and put them into ``known`` by name."""
    for name, type_, opcode, operands, attributes in _INSTRUCTION.findall(text):
        names = re.findall(r"([\w.-]+)(?=,|$)", operands)
        read = tuple(known[n] for n in names if n in known)
        origin = re.search(r'op_name="([^"]*)"', attributes)
        op_name = origin[1] if origin else ""
        known[name] = Instruction(type_, opcode, operands, attributes, read, op_name)
        yield known[name]


def collectives(program):
    """The collectives of a program, each once: XLA repeats one that it makes async."""
    channels = {}
    for position, instruction in enumerate(program):
        if instruction.collective:
            channels.setdefault(instruction.channel or -position, instruction)
    return list(channels.values())


def _long_name(letters, size, rest):
    """``bfloat16`` for ``bf16`` and ``float8_e5m2`` for ``f8e5m2``, as JAX has it."""
    return "_".join(filter(None, (_LONG_NAMES[letters] + size, rest)))


def bits(dtype):
    """The bits of an element, of a dtype with its long name."""
    size = re.search(r"\d+", dtype)
    return int(size[0]) if size else 8
