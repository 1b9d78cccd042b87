"""What the text of an XLA program says about its products and its collectives."""

import dataclasses
import re

# ROOT %name = bf16[8,4]{1,0} dot(%a, %b), …, metadata={op_name="jit(f)/forward/dot"}
_INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$", re.MULTILINE
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(?=\d))(\d*)(\w*)\[([\d,]*)\]")
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)', re.IGNORECASE)
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-[a-z]+)"
    r"(-start)?"
)
_LONG_NAMES = {"bf": "bfloat", "f": "float", "c": "complex", "s": "int", "u": "uint"}
_LONG_NAMES["pred"] = "bool"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation: the arrays it returns, the dtypes it reads and its origin."""

    opcode: str
    results: tuple[tuple[str, tuple[int, ...]], ...]
    operand_dtypes: tuple[str, ...]
    op_name: str
    attributes: str

    @property
    def is_product(self):
        return is_product(self.opcode, self.attributes)

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
        return collective(self.opcode)

    @property
    def received(self):
        """The arrays that a collective returns on each device."""
        return received(self.opcode, self.results, len(self.operand_dtypes))


def is_product(opcode, attributes):
    is_library = opcode == "custom-call" and _LIBRARY.search(attributes)
    return opcode in ("dot", "convolution") or bool(is_library)


def collective(opcode):
    found = _COLLECTIVE.fullmatch(opcode)
    return found and found[1]


def received(opcode, results, operands):
    """Of the results of a collective with so many operands, those that it received."""
    # An asynchronous start may return its operands first, or counters at the end.
    # Whether that of an all-reduce does depends on the version of XLA.
    has_operands = opcode in ("all-gather-start", "reduce-scatter-start") or (
        opcode == "all-reduce-start" and len(results) == 2 * operands
    )
    if has_operands:
        return results[len(results) // 2 :]
    return results[1:2] if opcode == "collective-permute-start" else results


def instructions(text):
    """The instructions of a program, in the order of its text."""
    found, readers = {}, {}
    for name, type_, opcode, operands, attributes in _INSTRUCTION.findall(text):
        results = tuple(
            (_long_name(*dtype), tuple(int(n) for n in shape.split(",") if n))
            for *dtype, shape in _ARRAY.findall(type_)
        )
        op_name = re.search(r'op_name="([^"]*)"', attributes)
        op_name = op_name[1] if op_name else ""
        read = [n for n in re.findall(r"([\w.-]+)(?=,|$)", operands) if n in found]
        for operand in read:
            readers.setdefault(operand, op_name)
        dtypes = tuple(r[0] for n in read for r in found[n].results[:1])
        found[name] = Instruction(opcode, results, dtypes, op_name, attributes)
    # What XLA made itself may have no origin. It has that of what reads it.
    return [
        instruction
        if instruction.op_name
        else dataclasses.replace(instruction, op_name=readers.get(name, ""))
        for name, instruction in found.items()
    ]


def collectives(program):
    """The collectives of a program, each once: XLA repeats one that it makes async."""
    channels = {}
    for position, instruction in enumerate(program):
        if instruction.collective:
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            channels.setdefault(channel[1] if channel else -position, instruction)
    return list(channels.values())


def _long_name(letters, size, rest):
    """``bfloat16`` for ``bf16`` and ``float8_e5m2`` for ``f8e5m2``, as JAX has it."""
    return "_".join(filter(None, (_LONG_NAMES[letters] + size, rest)))


def bits(dtype):
    """The bits of an element, of a dtype with its long name."""
    size = re.search(r"\d+", dtype)
    return int(size[0]) if size else 8
