"""One block of threads that goes through a program in step: registers, predicates, branches, findings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.ptx.memory import GlobalMemory, SharedMemory
from tests.ptx.parse import Address, Instruction, Operand, Program

Values = NDArray[Any]
# of a value, by the last part of an opcode; a register holds its bits as an unsigned number
TYPES = {f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
         for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
         for bits in (8, 16, 32, 64) if (kind, bits) != ("f", 8)}  # fmt: skip
TYPES["pred"] = np.dtype(bool)
MOST = 20_000_000  # instructions of a block: a loop that never ends is found
Handler = Callable[..., None]
HANDLERS: list[tuple[re.Pattern[str], Handler]] = []


class UnknownOpcodeError(NotImplementedError):
    """Nothing here knows what this instruction does."""


class ExecutionError(RuntimeError):
    """The program cannot go on."""


def opcode(pattern: str) -> Callable[[Handler], Handler]:
    """Let a function serve all opcodes of this pattern; it gets the block, the operands and the named groups."""

    def register(handler: Handler) -> Handler:
        HANDLERS.append((re.compile(pattern), handler))
        return handler

    return register


@lru_cache(None)
def handler_of(name: str) -> tuple[Handler, dict[str, str | None]]:
    """What serves an opcode, and the parts of it that make a difference."""
    for pattern, handler in HANDLERS:
        if found := pattern.fullmatch(name):
            return handler, found.groupdict()
    raise UnknownOpcodeError(f"{name}: no function in tests/ptx serves this opcode")


def narrowed(values: Values) -> NDArray[np.uint16]:
    """fp32 to the bits of bf16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def widened(bits: Values) -> NDArray[np.float32]:
    """The bits of bf16 to fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Place(NamedTuple):
    """Where in the grid a block is."""

    block: tuple[int, int, int]
    grid: tuple[int, int, int]


class Block:
    """Threads of one block. All warps run in step; what they do between two barriers counts as unordered."""

    def __init__(
        self, program: Program, arguments: Sequence[int], place: Place, memory: GlobalMemory, shared: int
    ) -> None:
        self.program, self.arguments, self.memory, self.shared = program, arguments, memory, SharedMemory(shared)
        self.threads, thread = program.threads, np.arange(program.threads)
        self.warp, self.lane = thread // 32, thread % 32
        self.findings: Counter[str] = Counter()
        self.executed: Counter[str] = Counter()
        self.memory.report = self.shared.report = self.report
        self.registers: dict[str, Values] = {
            "%tid.x": thread.astype(np.uint32),
            "%tid.y": np.zeros(self.threads, np.uint32),
            "%tid.z": np.zeros(self.threads, np.uint32),
            "%ntid.x": np.full(self.threads, self.threads, np.uint32),
            "global_smem": np.zeros(self.threads, np.uint32),
        }
        for axis, number, count in zip("xyz", *place, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(self.threads, number, np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(self.threads, count, np.uint32)
        self.constants: dict[tuple[str, str], Values] = {}
        self.running: dict[str, Values] = {}  # what wgmma will have put into registers
        self.products: list[list[tuple[tuple[str, ...], list[Any]]]] = [[]]  # groups of wgmma; the last is open
        self.step: Instruction
        self.mask: NDArray[np.bool_] | None = None  # threads that take part; None: all
        self.next = 0

    def report(self, finding: str) -> None:
        """Count a finding at the instruction that runs."""
        self.findings[f"{finding} ({self.step.opcode}, {self.step.source or f'instruction {self.next - 1}'})"] += 1

    def run(self) -> None:
        """Execute the program from its start to its end."""
        handlers = [handler_of(step.opcode) for step in self.program.code]
        self.memory.epoch += 1
        for _ in range(MOST):
            if self.next >= len(handlers):
                return
            self.step = self.program.code[self.next]
            handler, parts = handlers[self.next]
            self.next += 1
            try:
                if not self.masked():
                    continue
                self.executed[self.step.opcode] += 1
                handler(self, *self.step.operands, **parts)
            except Exception as error:
                where = f"{self.program.name}, {self.step.source or f'instruction {self.next - 1}'}"
                raise ExecutionError(f"{self.step.opcode} in {where}: {error!r}") from error
        raise ExecutionError(f"{self.program.name} has not ended after {MOST} instructions")

    def masked(self) -> bool:
        """Whether any thread takes part in this step."""
        self.mask = None
        if self.step.predicate:
            taken = self.registers[self.step.predicate] ^ self.step.negated
            if not taken.any():
                return False
            self.mask = None if taken.all() else taken
        return True

    @property
    def active(self) -> NDArray[np.bool_]:
        """Threads that take part in this step."""
        return np.ones(self.threads, bool) if self.mask is None else self.mask

    def together(self) -> None:
        """An error unless all threads take part, as some instructions want it."""
        if self.mask is not None:
            raise ExecutionError("threads of a block part ways here, which tests/ptx cannot follow")

    def read(self, operand: Operand, kind: str) -> Values:
        """A value of each thread: of a register, or a constant; bf16 as fp32."""
        if self.running and operand in self.running:
            self.report("read of a register that a wgmma may still write")
        if kind == "bf16":
            return widened(self.read(operand, "b16"))
        dtype = TYPES[kind]
        bits = self.registers.get(operand)  # type: ignore[arg-type]
        if bits is None:
            key = str(operand), kind
            if key not in self.constants:
                self.constants[key] = np.full(self.threads, constant(key[0], dtype))
            return self.constants[key]
        if bits.itemsize != dtype.itemsize:
            bits = bits.astype(f"u{dtype.itemsize}")
        return bits.view(dtype)

    def write(self, register: Operand, values: Values, kind: str) -> None:
        """Put a value of this type into a register of the threads that take part; bf16 is given as fp32."""
        name = str(register)
        if kind == "bf16":
            bits = narrowed(values)
        elif kind == "pred":
            bits = np.asarray(values, bool)
        else:
            dtype = TYPES[kind]
            bits = np.ascontiguousarray(values, dtype).view(f"u{dtype.itemsize}")
        if self.mask is not None:
            bits = np.where(self.mask, bits, self.registers.get(name, np.zeros_like(bits)))
        self.registers[name] = bits

    def address(self, operand: Address, space: str) -> NDArray[np.int64]:
        """Where each thread reads or writes."""
        return self.read(operand.base, "u32" if space == "shared" else "u64").astype(np.int64) + operand.offset


def constant(text: str, dtype: np.dtype[Any]) -> Any:
    """A number as PTX writes it."""
    if not re.fullmatch(r"0[fd][0-9A-F]+|-?(0x)?[0-9a-fA-F]+", text):
        raise ExecutionError(f"{text} was never written")
    if dtype.kind == "b":
        return int(text, 0) != 0
    bits = int(text[2:], 16) if text.startswith(("0f", "0d")) else int(text, 0)
    return np.array(bits % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)
