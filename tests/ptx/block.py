"""One block of threads that goes through a program in step: registers, predicates, branches, findings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.memory import GlobalMemory, SharedMemory
from tests.ptx.parse import Address, Instruction, Operand, Program

Values = NDArray[Any]
# of a value, by the last part of an opcode; a register holds its bits as an unsigned number
TYPES = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
    for bits in ((16, 32) if kind == "f" else (8, 16, 32, 64))
}
TYPES["pred"] = np.dtype(bool)
MOST = 20_000_000  # instructions of a block: a loop that never ends is found
Handler = Callable[..., None]
HANDLERS: list[tuple[re.Pattern[str], Handler, bool]] = []


class ExecutionError(RuntimeError):
    """The program cannot go on."""


def opcode(pattern: str, together: bool = False) -> Callable[[Handler], Handler]:
    """Let a function serve all opcodes of this pattern; it gets the block, the operands and the named groups.

    Some are for all threads `together`, and where those of a block part ways the program cannot be followed.
    """

    def register(handler: Handler) -> Handler:
        HANDLERS.append((re.compile(pattern), handler, together))
        return handler

    return register


@lru_cache(None)
def handler_of(name: str) -> tuple[Handler, dict[str, str | None], bool]:
    """What serves an opcode, the parts of it that make a difference, and whether it is for all threads together."""
    for pattern, handler, together in HANDLERS:
        if found := pattern.fullmatch(name):
            return handler, found.groupdict(), together
    raise ExecutionError(f"{name}: no function in tests/ptx serves this opcode")


def narrowed(values: Values) -> NDArray[np.uint16]:
    """fp32 to the bits of bf16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def widened(bits: Values) -> NDArray[np.float32]:
    """The bits of bf16 to fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Block:
    """Threads of block `place` of a grid, both `(x, y, z)`; what warps do between two barriers counts as unordered."""

    def __init__(
        self, program: Program, arguments: Sequence[int], place: Sequence[int], grid: Sequence[int],
        memory: GlobalMemory, shared: int,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.shared = program, memory, SharedMemory(shared)
        self.arguments = np.array([each % 2**64 for each in arguments], np.uint64)
        self.memory.begin_block()
        self.memory.report = self.shared.report = self.report
        self.threads, thread = program.threads, np.arange(program.threads)
        self.warp, self.lane = thread // 32, thread % 32
        self.findings: Counter[str] = Counter()
        self.executed: Counter[str] = Counter()
        same = {"%tid.y": 0, "%tid.z": 0, "%ntid.x": self.threads, "global_smem": 0}
        same |= {f"%ctaid.{axis}": number for axis, number in zip("xyz", place, strict=True)}
        same |= {f"%nctaid.{axis}": number for axis, number in zip("xyz", grid, strict=True)}
        same |= {name: i for i, name in enumerate(program.parameters)}  # addresses for ld.param
        self.registers: dict[str, Values] = {name: np.full(self.threads, value, "u4") for name, value in same.items()}
        self.registers["%tid.x"] = thread.astype(np.uint32)
        self.products: list[list[Any]] = [[]]  # of wgmma, by group
        self.running: dict[str, tuple[Values, Any]] = {}  # what the last product of a register will put into it
        self.step: Instruction
        self.mask = self.everyone = np.ones(self.threads, bool)  # threads that take part in a step
        self.some = False  # whether others do not
        self.next = 0

    def report(self, finding: str) -> None:
        """Count a finding at the instruction that runs."""
        self.findings[f"{finding} ({self.step.opcode}, {self.step.source})"] += 1

    def run(self) -> None:
        """Execute the program from its start to its end."""
        handlers = [handler_of(step.opcode) for step in self.program.code]
        for _ in range(MOST):
            if self.next >= len(handlers):
                return
            self.step = self.program.code[self.next]
            handler, parts, together = handlers[self.next]
            self.next += 1
            self.mask, self.some = self.everyone, False
            if self.step.predicate:
                self.mask = self.registers[self.step.predicate] ^ self.step.negated
                self.some = not self.mask.all()
                if not self.mask.any():
                    continue
            self.executed[self.step.opcode] += 1
            try:
                if together and self.some:
                    raise ExecutionError("threads of a block part ways here, which tests/ptx cannot follow")
                handler(self, *self.step.operands, **parts)
            except Exception as error:
                where = f"{self.step.opcode} in {self.program.name}, {self.step.source}"
                raise ExecutionError(f"{where}: {error!r}") from error
        raise ExecutionError(f"{self.program.name} has not ended after {MOST} instructions")

    def read(self, operand: Operand, kind: str) -> Values:
        """A value of each thread: of a register, or a constant; bf16 as fp32."""
        if self.running and operand in self.running:
            self.report("read of a register that a wgmma may still write")
        if kind == "bf16":
            return widened(self.read(operand, "b16"))
        dtype = TYPES[kind]
        bits = self.registers.get(operand)  # type: ignore[arg-type]
        if bits is None:
            return np.full(self.threads, constant(str(operand), dtype))
        if bits.itemsize != dtype.itemsize:
            bits = bits.astype(f"u{dtype.itemsize}")
        return bits.view(dtype)

    def write(self, register: Operand, values: Values, kind: str) -> None:
        """Put values, converted to this type, into a register of the threads that take part; bf16 is given as fp32."""
        name = str(register)
        if kind == "bf16":
            bits = narrowed(values)
        elif kind == "pred":
            bits = np.asarray(values, bool)
        else:
            dtype = TYPES[kind]
            bits = np.ascontiguousarray(values, dtype).view(f"u{dtype.itemsize}")
        if self.some:
            bits = np.where(self.mask, bits, self.registers.get(name, np.zeros_like(bits)))
        self.registers[name] = bits

    def address(self, operand: Address, space: str) -> NDArray[np.int64]:
        """Where each thread reads or writes."""
        return self.read(operand.base, "u32" if space == "shared" else "u64").astype(np.int64) + operand.offset


@lru_cache(None)
def constant(text: str, dtype: np.dtype[Any]) -> Any:
    """A number as PTX writes it."""
    if not re.fullmatch(r"0f[0-9A-F]+|-?(0x)?[0-9a-fA-F]+", text):
        raise ExecutionError(f"{text} was never written")
    if dtype.kind == "b":
        return int(text, 0) != 0
    bits = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
    return np.array(bits % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)
