"""The text of a kernel in PTX as a list of instructions, each with the line of the source it comes from."""

from __future__ import annotations

import re
from typing import NamedTuple

ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*\.reqntid\s+(\d+)\s*\{", re.DOTALL)
PARAMETER = re.compile(r"\.param\b[^,)]*?([\w$]+)\s*(?:,|$)")
SOURCE = re.compile(r"([\w.]+:\d+):\d+\b")  # in Triton's comment after .loc: file, line and column
TOKEN = re.compile(
    r"\s*(?:(?P<loc>\.loc[^\n]*)|//[^\n]*|(?P<label>[\w$]+)\s*:(?!:)|\.branchtargets(?P<targets>[^;]*);|\.[a-z][^;\n]*;?|"
    r"(?P<scope>[{}])|(?:@(?P<negated>!?)(?P<predicate>%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)(?P<operands>[^;]*);)"
)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


class Address(NamedTuple):
    """Where an instruction reads or writes: `[register + bytes]`."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


class Instruction(NamedTuple):
    opcode: str
    operands: tuple[Operand, ...]
    predicate: str  # the register that says which threads take part; empty: all
    negated: bool
    source: str  # `info_nce.py:68`


class Program(NamedTuple):
    name: str
    threads: int  # of a block
    parameters: list[str]
    code: list[Instruction]
    labels: dict[str, int]  # numbers of instructions
    tables: dict[str, list[str]]  # of labels, for `brx.idx`


def parse(ptx: str) -> Program:
    """The one kernel in `ptx`, which must say how many threads a block has; `ValueError` where it is no such text."""
    entry = ENTRY.search(ptx)
    if entry is None:
        raise ValueError("no .entry with .reqntid in this PTX")
    parameters = PARAMETER.findall(" ".join(entry[2].split()))
    program = Program(entry[1], int(entry[3]), parameters, [], {}, {})
    depth, source, label, at = 1, "", "", entry.end()
    while depth:
        found = TOKEN.match(ptx, at)
        if found is None:
            raise ValueError(f"not an instruction: {ptx[at:].partition(';')[0].strip()!r} ({source})")
        at = found.end()
        if found["loc"] and (lines := SOURCE.findall(found["loc"])):
            source = " in ".join(dict.fromkeys((lines[0], lines[-1])))  # of an inlined function, and where it is called
        elif found["label"]:
            label = found["label"]
            program.labels[label] = len(program.code)
        elif found["targets"]:
            program.tables[label] = re.findall(r"[\w$]+", found["targets"])
        elif found["scope"]:  # inline assembly may open and close some
            depth += 1 if found["scope"] == "{" else -1
        elif found["opcode"]:
            operands = tuple(_operand(each.strip()) for each in OPERAND.findall(found["operands"]))
            negated, predicate = bool(found["negated"]), found["predicate"] or ""
            program.code.append(Instruction(found["opcode"], operands, predicate, negated, source))
    return program


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(each.strip() for each in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text
