"""The text of a kernel in PTX as a list of instructions, each with the line of the source it comes from."""

from __future__ import annotations

import re
from typing import NamedTuple

ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*\.reqntid\s+(\d+)\s*\{", re.DOTALL)
PARAMETER = re.compile(r"\.param\b[^,)]*?([\w$]+)\s*(?:,|$)")
SOURCE = re.compile(r"([\w.]+:\d+):\d+\b")  # in Triton's comment after .loc: file, line and column
LABEL = re.compile(r"([\w$]+)\s*:(?!:)\s*")
STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
IGNORED = (".loc", ".file", ".section", ".pragma", ".reg")


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
    depth, source, pending = 1, "", ""
    for line in ptx[entry.end() :].splitlines():
        if line.lstrip().startswith(".loc") and (lines := SOURCE.findall(line)):
            source = " in ".join(dict.fromkeys((lines[0], lines[-1])))  # of an inlined function, and where it is called
        text = line.partition("//")[0].strip()
        if text.startswith(IGNORED):
            continue
        depth += text.count("{") - text.count("}")
        if depth == 0:
            break
        pending += f" {text}"
        while ";" in pending:
            statement, _, pending = pending.partition(";")
            _add(program, statement, source)
    return program


def _add(program: Program, statement: str, source: str) -> None:
    statement = statement.strip().lstrip(" {}")  # scopes that inline assembly may open and close
    while label := LABEL.match(statement):
        statement = statement[label.end() :].lstrip(" {}")
        if statement.startswith(".branchtargets"):
            program.tables[label[1]] = re.findall(r"[\w$]+", statement.removeprefix(".branchtargets"))
            return
        program.labels[label[1]] = len(program.code)
    if not statement:
        return
    found = STATEMENT.fullmatch(statement)
    if found is None:
        raise ValueError(f"not an instruction: {statement!r} ({source})")
    negated, predicate, opcode, rest = found.groups()
    operands = tuple(_operand(each.strip()) for each in OPERAND.findall(rest))
    program.code.append(Instruction(opcode, operands, predicate or "", bool(negated), source))


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(each.strip() for each in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text
