"""Matrix products: `mma.sync`, `wgmma` with its descriptors of swizzled tiles, and `ldmatrix`, `stmatrix`.

Each thread holds fragments: of lane `4 g + t`, columns (or rows) `2 t` and `2 t + 1` of row (or column) `g`, and what
lies 8 rows below and 8 columns to the right (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "for wgmma").
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tests.ptx.machine import TYPES, Block, ExecutionError, Values, opcode, widened
from tests.ptx.memory import Numbers
from tests.ptx.parse import Address, Operand

HALF = r"(?P<type>bf16|f16)"
SWIZZLES = {1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor: bytes of a row, in which 16 bytes change places


def floats(bits: Values, type: str) -> Values:
    """16 bits as fp32."""
    return widened(bits) if type == "bf16" else bits.view(np.float16).astype(np.float32)


def pairs(block: Block, registers: tuple[str, ...], type: str) -> Values:
    """The two numbers in each register, `[threads, registers, 2]`."""
    words = np.stack([block.read(register, "b32") for register in registers], axis=1)
    return floats(words.view(np.uint16).reshape(*words.shape, 2), type)


def left(block: Block, registers: tuple[str, ...], type: str) -> Values:
    """The left operand of each warp, `[warps, 16, 16]`."""
    numbers, g, t = pairs(block, registers, type), block.lane // 4, block.lane % 4
    matrix = np.zeros((block.threads // 32, 16, 16), np.float32)
    for i, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        for j in (0, 1):
            matrix[block.warp, g + row, 2 * t + column + j] = numbers[:, i, j]
    return matrix


@opcode(rf"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{HALF}\.(?P=type)\.f32")
def multiply(
    block: Block, to: tuple[str, ...], a: tuple[str, ...], b: tuple[str, ...], c: tuple[str, ...], type: str
) -> None:
    block.together()
    numbers, g, t = pairs(block, b, type), block.lane // 4, block.lane % 4
    right = np.zeros((block.threads // 32, 16, 8), np.float32)
    for i in (0, 1):
        for j in (0, 1):
            right[block.warp, 2 * t + 8 * i + j, g] = numbers[:, i, j]
    product = left(block, a, type) @ right
    sums = [product[block.warp, g + 8 * (i // 2), 2 * t + i % 2] + block.read(c[i], "f32") for i in range(4)]
    for register, values in zip(to, sums, strict=True):
        block.write(register, values, "f32")


def rows_of(block: Block, address: Address, number: int) -> tuple[Numbers, Numbers]:
    """Addresses of the 8 rows of each warp's matrix `number`, whose lanes name them, and the warps."""
    chosen = block.lane // 8 == number
    return block.address(address, "shared")[chosen], block.warp[chosen]


@opcode(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16")
def load_matrices(block: Block, to: Operand, address: Address, count: str, trans: str | None) -> None:
    block.together()
    registers = to if isinstance(to, tuple) else (to,)
    g, t = block.lane // 4, block.lane % 4
    for i in range(int(count)):
        at, warp = rows_of(block, address, i)
        matrix = block.shared.load(at, 16, warp).view(np.uint16).reshape(-1, 8, 8)
        matrix = matrix.swapaxes(1, 2) if trans else matrix
        two = np.stack([matrix[block.warp, g, 2 * t], matrix[block.warp, g, 2 * t + 1]], axis=1)
        block.write(registers[i], two.view(np.uint32)[:, 0], "b32")


@opcode(r"stmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16")
def store_matrices(block: Block, address: Address, value: Operand, count: str, trans: str | None) -> None:
    block.together()
    registers = value if isinstance(value, tuple) else (value,)
    g, t = block.lane // 4, block.lane % 4
    for i in range(int(count)):
        matrix = np.zeros((block.threads // 32, 8, 8), np.uint16)
        two = block.read(registers[i], "b32")[:, None].view(np.uint16)
        for j in (0, 1):
            matrix[(block.warp, 2 * t + j, g) if trans else (block.warp, g, 2 * t + j)] = two[:, j]
        at, warp = rows_of(block, address, i)
        block.shared.store(at, matrix.view(np.uint8).reshape(-1, 16), warp)


@lru_cache(512)
def tile(descriptor: int, rows: int, transposed: bool) -> Numbers:
    """Addresses of the `[rows, 16]` numbers of an operand in shared memory.

    PTX ISA, "Strides" and "Matrix Descriptor" of wgmma. Rows of 8 make a core matrix; transposed, the rows of the
    operand lie one after the other in memory.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7 or descriptor >> 62 not in SWIZZLES:
        raise ExecutionError("a wgmma descriptor without swizzle or with a base offset is not served")
    width = SWIZZLES[descriptor >> 62]
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        across, down = row, column
        at = start + across // (width // 2) * leading + down // 8 * stride
    else:
        across, down = column, row
        at = start + down // 8 * stride
    at = at + down % 8 * width + across % (width // 2) * 2
    return at ^ (at >> 7 & (width // 16 - 1)) << 4


@opcode(rf"wgmma\.mma_async\.sync\.aligned\.m64n(?P<columns>\d+)k16\.f32\.{HALF}\.(?P=type)")
def multiply_async(
    block: Block, to: tuple[str, ...], a: Operand, b: str, adds: str, *flags: str, columns: str, type: str
) -> None:
    """Each four warps multiply their `[64,16]` by `[16,columns]`; registers hold the sum once it is waited for."""
    block.together()
    if flags[:2] != ("1", "1"):
        raise ExecutionError("wgmma with a sign is not served")
    *left_transposed, right_transposed = (flag != "0" for flag in flags[2:])
    used: list[Numbers] = []

    def operand(descriptors: Values, first: int, rows: int, transposed: bool) -> Values:
        at = tile(int(descriptors[first]), rows, transposed)
        used.append(block.shared.bytes_at(at.reshape(-1), 2))
        return floats(block.shared.operand(used[-1]).view(np.uint16).reshape(rows, 16), type)

    fragments = left(block, a, type).reshape(-1, 64, 16) if isinstance(a, tuple) else None
    products = []
    for group in range(block.threads // 128):
        if fragments is None:
            matrix = operand(block.read(a, "b64"), 128 * group, 64, left_transposed[0])
        else:
            matrix = fragments[group]
        products.append(matrix @ operand(block.read(b, "b64"), 128 * group, int(columns), right_transposed).T)
    product, (warp, lane), add = np.stack(products), (block.warp, block.lane), block.read(adds, "pred").all()
    for i, register in enumerate(to):
        row, column = 16 * (warp % 4) + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
        values = product[warp // 4, row, column]
        if add:
            before = block.running.get(register)
            values = values + (block.read(register, "f32") if before is None else before)
        block.running[register] = values
    block.products[-1].append((to, used))


@opcode(r"wgmma\.fence\.sync\.aligned")
def order_registers(block: Block) -> None:
    block.together()


@opcode(r"wgmma\.commit_group\.sync\.aligned")
def commit_products(block: Block) -> None:
    block.together()
    block.products.append([])


@opcode(r"wgmma\.wait_group\.sync\.aligned")
def wait_for_products(block: Block, groups: str) -> None:
    block.together()
    done: list[tuple[tuple[str, ...], list[Numbers]]] = []
    while len(block.products) > int(groups) + 1:
        done += block.products.pop(0)
    still = {register for group in block.products for registers, _ in group for register in registers}
    for registers, used in done:
        for index in used:
            block.shared.release(index)
        for register in registers:
            if register in block.running and register not in still:
                block.registers[register] = block.running.pop(register).astype(np.float32).view(TYPES["b32"])
    for group in block.products:
        for _, used in group:
            for index in used:
                block.shared.in_use[index] = True
