"""Machine code of NVIDIA GPUs: its loops, and how many instructions of each class they have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_FUNCTION = re.compile(r"Function : (\S+)")

# By the first name that matches. What is not listed is an ALU instruction.
_CLASSES = (
    ("fp32", ("FADD", "FMUL", "FFMA", "FADD32I", "FMUL32I", "FFMA32I", "HADD2", "HMUL2", "HFMA2")),
    ("imad", ("IMAD", "IDP")),
    ("mufu", ("MUFU", "F2I", "I2F", "I2FP", "F2F", "FRND", "POPC", "FLO", "BREV")),
    ("memory", ("LD", "ST", "LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL", "LDC", "ATOM", "ATOMS", "ATOMG", "RED",
                "SHFL", "LDSM", "CCTL")),
    ("branch", ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "YIELD", "NANOSLEEP",
                "BMOV", "KILL", "NOP", "BAR", "UCGABAR", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "FENCE")),
)  # fmt: skip
_BY_NAME = {name: kind for kind, names in _CLASSES for name in names}
CLASSES = ("fp32", "imad", "alu", "mufu", "memory", "branch", "uniform")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers: "LDG.E.128.CONSTANT"
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def kind(self) -> str:
        """One of CLASSES. "uniform" instructions run on a pipe of their own."""
        if self.opcode in _BY_NAME:
            return _BY_NAME[self.opcode]
        return "uniform" if re.match(r"U[A-Z]|R2UR", self.opcode) else "alu"

    @property
    def bytes(self) -> int:
        """Bytes that a thread moves, for loads and stores."""
        width = re.search(r"\.(128|64|U?16|S16|U?8|S8)\b", self.name)
        return 4 if width is None else int(width[1].lstrip("US")) // 8

    @property
    def target(self) -> int | None:
        """Address of a branch's target."""
        found = re.search(r"\b0x([0-9a-f]+)\b", self.operands) if self.opcode == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Loop:
    """A loop without another one inside: the instructions of one iteration."""

    instructions: tuple[Instruction, ...]

    def moved(self, *opcodes: str) -> int:
        """Bytes that a thread moves in an iteration by these instructions."""
        return sum(i.bytes for i in self.instructions if i.opcode in opcodes)

    def count(self, *opcodes: str) -> int:
        return sum(i.opcode in opcodes for i in self.instructions)

    def classes(self) -> Counter[str]:
        return Counter(i.kind for i in self.instructions)


def functions(sass: str) -> dict[str, tuple[Instruction, ...]]:
    """Instructions by function, from the output of `cuobjdump -sass`."""
    _, *parts = _FUNCTION.split(sass)
    return {
        name: tuple(Instruction(int(at, 16), op, rest) for at, _, op, rest in _INSTRUCTION.findall(code))
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def loops(code: tuple[Instruction, ...]) -> list[Loop]:
    """Innermost loops: from the target of a backward branch to the branch."""
    spans = {(i.target, i.address) for i in code if i.target is not None and i.target <= i.address}
    # The branch to itself behind the last instruction is padding.
    spans = {(first, last) for first, last in spans if first < last}
    return [Loop(tuple(_between(code, *span))) for span in sorted(spans) if _innermost(span, spans)]


def _innermost(span: tuple[int, int], spans: set[tuple[int, int]]) -> bool:
    return not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)


def _between(code: tuple[Instruction, ...], first: int, last: int) -> Iterator[Instruction]:
    return (i for i in code if first <= i.address <= last)
