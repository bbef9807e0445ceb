"""Matrix products: `mma.sync`, `wgmma` with its descriptors of swizzled tiles, and `ldmatrix`, `stmatrix`.

Each thread holds fragments of a matrix: lane `4 g + t` holds columns `2 t` and `2 t + 1` of row `g` in its first
register, and in others what lies 8 rows below or 8 columns to the right (PTX ISA, "Matrix Fragments for
mma.m16n8k16" and "for wgmma").
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tests.ptx.block import Block, ExecutionError, Values, opcode, widened
from tests.ptx.memory import Numbers, ended
from tests.ptx.parse import Address, Operand

HALF = r"(?P<type>bf16|f16)"
SHARED = r"(?P<trans>\.trans)?\.shared(?:::cta)?\.b16"
SWIZZLES = {1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor: bytes of a row, in which 16 bytes change places
LEFT = ((0, 0), (8, 0), (0, 8), (8, 8))  # rows and columns at which the registers of an operand begin
RIGHT = ((0, 0), (0, 8))  # of the transposed right operand


def floats(bits: Values, type: str) -> Values:
    """16 bits as fp32."""
    return widened(bits) if type == "bf16" else bits.view(np.float16).astype(np.float32)


def gathered(block: Block, registers: tuple[str, ...], begin: tuple[tuple[int, int], ...]) -> Values:
    """The matrix of 16-bit values that each warp holds in its registers, `[warps, rows, columns]`."""
    rows, columns = (max(each) + 8 for each in zip(*begin, strict=True))
    matrix = np.zeros((block.threads // 32, rows, columns), np.uint16)
    for register, (row, column) in zip(registers, begin, strict=True):
        pair = block.read(register, "b32")[:, None].view(np.uint16)
        for j in (0, 1):
            matrix[block.warp, block.lane // 4 + row, 2 * (block.lane % 4) + column + j] = pair[:, j]
    return matrix


def place(block: Block, i: int) -> tuple[Numbers, Numbers]:
    """Row and column of the product's number in each thread's register `i`."""
    return block.lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (block.lane % 4) + i % 2


@opcode(rf"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{HALF}\.(?P=type)\.f32", together=True)
def multiply(
    block: Block, to: tuple[str, ...], a: tuple[str, ...], b: tuple[str, ...], c: tuple[str, ...], type: str
) -> None:
    left, right = floats(gathered(block, a, LEFT), type), floats(gathered(block, b, RIGHT), type)
    product = left @ right.swapaxes(1, 2)
    sums = [product[(block.warp, *place(block, i))] + block.read(each, "f32") for i, each in enumerate(c)]
    for register, values in zip(to, sums, strict=True):
        block.write(register, values, "f32")


@opcode(rf"(?P<way>ld|st)matrix\.sync\.aligned\.m8n8\.x[124]{SHARED}", together=True)
def move_matrices(block: Block, first: Operand, second: Operand, way: str, trans: str | None) -> None:
    """Between registers and 8 x 8 matrices in shared memory; lanes `8 i` to `8 i + 7` hold addresses of matrix `i`."""
    operand, address = (first, second) if way == "ld" else (second, first)
    assert isinstance(address, Address)
    at = block.address(address, "shared")
    for i, register in enumerate(operand if isinstance(operand, tuple) else (operand,)):
        named = block.lane // 8 == i
        if way == "ld":
            matrix = block.shared.load(at[named], 16, block.warp[named]).view(np.uint16).reshape(-1, 8, 8)
            matrix = matrix.swapaxes(1, 2) if trans else matrix
            pair = [matrix[block.warp, block.lane // 4, 2 * (block.lane % 4) + j] for j in (0, 1)]
            block.write(register, np.stack(pair, axis=1).view(np.uint32)[:, 0], "b32")
        else:
            matrix = gathered(block, (str(register),), ((0, 0),))
            matrix = np.ascontiguousarray(matrix.swapaxes(1, 2)) if trans else matrix
            block.shared.store(at[named], matrix.view(np.uint8).reshape(-1, 16), block.warp[named])


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
    across, down = (row, column) if transposed else (column, row)
    at = start + down // 8 * stride + down % 8 * width + across % (width // 2) * 2
    if transposed:
        at = at + across // (width // 2) * leading
    return at ^ (at >> 7 & (width // 16 - 1)) << 4


class Product(NamedTuple):
    """A `wgmma` that has not been waited for."""

    registers: tuple[str, ...]
    operands: list[Numbers]  # indices of bytes in shared memory


@opcode(rf"wgmma\.mma_async\.sync\.aligned\.m64n(?P<columns>\d+)k16\.f32\.{HALF}\.(?P=type)", together=True)
def multiply_async(
    block: Block, to: tuple[str, ...], a: Operand, b: str, adds: str, *flags: str, columns: str, type: str
) -> None:
    """Each four warps multiply their `[64,16]` by `[16,columns]`; registers hold the sum once it is waited for."""
    if flags[:2] != ("1", "1"):
        raise ExecutionError("wgmma with a sign is not served")
    *left_transposed, right_transposed = (flag != "0" for flag in flags[2:])
    this = Product(to, [])

    def operand(descriptor: str, group: int, rows: int, transposed: bool) -> Values:
        at = tile(int(block.read(descriptor, "b64")[128 * group]), rows, transposed)
        data, index = block.shared.operand(at.reshape(-1))
        this.operands.append(index)
        return floats(data.view(np.uint16).reshape(rows, 16), type)

    groups = range(block.threads // 128)
    if isinstance(a, tuple):
        left = floats(gathered(block, a, LEFT), type).reshape(-1, 64, 16)
    else:
        left = np.stack([operand(str(a), group, 64, left_transposed[0]) for group in groups])
    right = np.stack([operand(b, group, int(columns), right_transposed) for group in groups])
    product, add = left @ right.swapaxes(1, 2), block.read(adds, "pred").all()
    for i, register in enumerate(to):
        row, column = place(block, i)
        values = product[block.warp // 4, 16 * (block.warp % 4) + row, column]
        if add:
            values = values + (block.running[register][0] if register in block.running else block.read(register, "f32"))
        block.running[register] = values, this
    block.products[-1].append(this)


@opcode(r"wgmma\.(?P<what>fence|commit_group|wait_group)\.sync\.aligned", together=True)
def order_products(block: Block, *groups: str, what: str) -> None:
    if what == "commit_group":
        block.products.append([])
    for product in ended(block.products, int(groups[0])) if what == "wait_group" else ():
        for index in product.operands:
            block.shared.release(index)
        for register in product.registers:
            if block.running[register][1] is product:  # no later product adds to it
                block.write(register, block.running.pop(register)[0], "f32")
