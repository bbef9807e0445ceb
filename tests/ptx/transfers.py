"""Instructions that move data: parameters, global and shared memory, copies from one to the other, barriers."""

from __future__ import annotations

import numpy as np

from tests.ptx.machine import TYPES, Block, ExecutionError, opcode
from tests.ptx.parse import Address, Operand

SPACE = r"(?P<space>global|shared)(?:::cta)?(?:\.(?:nc|ca|cg|cs|lu|wb|wt|L1::\w+))*"
TYPE = r"(?P<type>[bsu](?:8|16|32|64)|f32|f64)"


@opcode(rf"ld\.param\.{TYPE}")
def parameter(block: Block, to: Operand, address: Address, type: str) -> None:
    names, arguments = block.program.parameters, np.array([each % 2**64 for each in block.arguments], np.uint64)
    if address.offset:
        raise ExecutionError("a part of a parameter")
    if address.base in names:
        values = np.full(block.threads, arguments[names.index(address.base)])
    else:  # an address that `move` has made
        values = arguments[block.read(address.base, "u64")]
    block.write(to, values.astype(f"u{TYPES[type].itemsize}").view(TYPES[type]), type)


@opcode(rf"ld\.{SPACE}(?:\.v(?P<count>[24]))?\.{TYPE}")
def load(block: Block, to: Operand, address: Address, space: str, count: str | None, type: str) -> None:
    registers, size = to if isinstance(to, tuple) else (to,), TYPES[type].itemsize
    if len(registers) != int(count or 1):
        raise ExecutionError(f"{len(registers)} registers")
    active, memory = block.active, block.shared if space == "shared" else block.memory
    found = np.zeros((block.threads, size * len(registers)), np.uint8)
    found[active] = memory.load(block.address(address, space)[active], found.shape[1], block.warp[active])
    values = found.view(TYPES[type])
    for i, register in enumerate(registers):
        block.write(register, values[:, i], type)


@opcode(rf"st\.{SPACE}(?:\.v(?P<count>[24]))?\.{TYPE}")
def store(block: Block, address: Address, value: Operand, space: str, count: str | None, type: str) -> None:
    registers = value if isinstance(value, tuple) else (value,)
    if len(registers) != int(count or 1):
        raise ExecutionError(f"{len(registers)} registers")
    active, memory = block.active, block.shared if space == "shared" else block.memory
    values = np.stack([block.read(register, type) for register in registers], axis=1).view(np.uint8)
    memory.store(block.address(address, space)[active], values[active], block.warp[active])


@opcode(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)?")
def copy(block: Block, to: Address, source: Address, size: str, *taken: Operand) -> None:
    """`size` bytes, of which `taken` come from global memory and the rest are 0."""
    width, active = int(size, 0), block.active
    count = block.read(taken[0], "u32") if taken else np.full(block.threads, width)
    if not np.isin(count[active], (0, width)).all():
        raise ExecutionError("cp.async is served for all or none of its bytes alone")
    full = active & (count > 0)
    values = np.zeros((block.threads, width), np.uint8)
    values[full] = block.memory.load(block.address(source, "global")[full], width, block.warp[full])
    block.shared.copy(block.address(to, "shared")[active], values[active], block.warp[active])


@opcode(r"cp\.async\.commit_group")
def commit(block: Block) -> None:
    block.together()
    block.shared.commit()


@opcode(r"cp\.async\.wait_group")
def wait(block: Block, groups: str) -> None:
    block.together()
    block.shared.wait(int(groups))


@opcode(r"bar\.sync|barrier\.sync\.aligned")
def barrier(block: Block, number: str) -> None:
    block.together()
    if number != "0":
        raise ExecutionError("barriers of some warps are not served")
    block.shared.epoch += 1
    block.memory.epoch += 1


@opcode(r"fence\.proxy\.async(?:\.shared::cta)?")
def fence(block: Block) -> None:
    block.together()
    block.shared.fence()
