"""What instructions do to registers and memory, except for those of tensor cores: tables of operations by opcode."""

from __future__ import annotations

import numpy as np

from tests.ptx.block import TYPES, Block, ExecutionError, Values, opcode
from tests.ptx.parse import Address, Operand

INTEGER = r"[su](?:8|16|32|64)"
BITS = r"b(?:8|16|32|64)"
FLOAT = r"f16|bf16|f32"
FTZ = r"(?P<ftz>\.ftz)?"
SPACE = r"(?P<space>global|shared)(?:::cta)?(?:\.(?:nc|ca|cg|cs|lu|wb|wt|L1::\w+))*"


# branches


@opcode(r"bra(?:\.uni)?", together=True)
def branch(block: Block, label: str) -> None:
    block.next = block.program.labels[label]


@opcode(r"brx\.idx(?:\.uni)?", together=True)
def branch_by_table(block: Block, index: Operand, table: str) -> None:
    (value,) = set(block.read(index, "u32").tolist())  # of all threads
    block.next = block.program.labels[block.program.tables[table][value]]


@opcode(r"ret", together=True)
def end(block: Block) -> None:
    block.next = len(block.program.code)


# arithmetic


def remainder(a: Values, b: Values) -> Values:
    return np.fmod(a, np.where(b == 0, 1, b))  # what dividing by 0 gives is left open


def count_ones(a: Values) -> Values:
    return np.unpackbits(np.ascontiguousarray(a)[:, None].view(np.uint8), axis=1).sum(1)


INTEGERS = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "mad.lo": lambda a, b, c: a * b + c,
    "neg": np.negative, "abs": np.abs,
    "div": lambda a, b: (a - remainder(a, b)) // np.where(b == 0, 1, b), "rem": remainder, "min": np.minimum,
    "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "popc": count_ones,
}  # fmt: skip
FLOATS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": lambda a, b, c: a * b + c,
    "min": np.fmin, "max": np.fmax, "neg": np.negative, "abs": np.abs, "ex2": np.exp2, "sqrt": np.sqrt,
}  # fmt: skip
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def one_of(names: dict[str, object]) -> str:
    return "|".join(name.replace(".", r"\.") for name in names)


@opcode(rf"(?P<name>{one_of(INTEGERS)})\.(?P<type>pred|{BITS}|{INTEGER})")
def on_integers(block: Block, to: Operand, *operands: Operand, name: str, type: str) -> None:
    block.write(to, INTEGERS[name](*(block.read(each, type) for each in operands)), type)


def flushed(values: Values, ftz: str | None) -> Values:
    """Denormal numbers of fp32 as zeros, where an instruction has it so."""
    return np.where(np.abs(values) < 2.0**-126, np.copysign(0, values), values) if ftz else values


@opcode(rf"(?P<name>{one_of(FLOATS)})(?:\.(?:rn|full|approx))?{FTZ}\.f32")
def on_floats(block: Block, to: Operand, *operands: Operand, name: str, ftz: str | None) -> None:
    """Exact where the GPU's are approximate: in fp64, where the product of an `fma` is exact, and then rounded."""
    values = (flushed(block.read(each, "f32").astype(np.float64), ftz) for each in operands)
    block.write(to, flushed(FLOATS[name](*values).astype(np.float32), ftz), "f32")


@opcode(r"(?P<name>mul|mad)\.wide\.(?P<sign>[su])(?P<bits>16|32)")
def wide(block: Block, to: Operand, a: Operand, b: Operand, *c: Operand, name: str, sign: str, bits: str) -> None:
    twice = f"{sign}{2 * int(bits)}"
    product = block.read(a, sign + bits).astype(TYPES[twice]) * block.read(b, sign + bits)
    block.write(to, product + block.read(c[0], twice) if name == "mad" else product, twice)


@opcode(rf"setp\.(?P<name>{one_of(COMPARISONS)}|num|nan)(?P<or_nan>u)?(?:\.ftz)?\.(?P<type>f32|{BITS}|{INTEGER})")
def compare(block: Block, to: Operand, a: Operand, b: Operand, name: str, or_nan: str | None, type: str) -> None:
    x, y = block.read(a, type), block.read(b, type)
    nan = (x != x) | (y != y)
    if name in ("num", "nan"):
        result = nan if name == "nan" else ~nan
    else:
        result = np.where(nan, bool(or_nan), COMPARISONS[name](x, y))
    block.write(to, result, "pred")


@opcode(rf"selp\.(?P<type>f32|{BITS}|{INTEGER})")
def select(block: Block, to: Operand, yes: Operand, no: Operand, condition: Operand, type: str) -> None:
    block.write(to, np.where(block.read(condition, "pred"), block.read(yes, type), block.read(no, type)), type)


@opcode(rf"(?P<way>shl|shr)\.(?P<type>{BITS}|{INTEGER})")
def shift(block: Block, to: Operand, a: Operand, by: Operand, way: str, type: str) -> None:
    value, amount, bits = block.read(a, type), block.read(by, "u32"), TYPES[type].itemsize * 8
    within = np.minimum(amount, bits - 1).astype(value.dtype)
    moved = value << within if way == "shl" else value >> within
    fills = way == "shr" and type[0] == "s"  # a negative number shifted far is -1, which bits - 1 gives too
    block.write(to, np.where((amount < bits) | fills, moved, 0), type)


@opcode(r"bfe\.(?P<type>[su]32)")
def extract_bits(block: Block, to: Operand, a: Operand, first: str, count: str, type: str) -> None:
    start, length = int(first), int(count)  # Triton gives constants alone
    if length < 1 or start + length > 32:
        raise ExecutionError(f"bfe of {length} bits from bit {start} on")
    block.write(to, block.read(a, type) << (32 - start - length) >> (32 - length), type)


@opcode(r"prmt\.b32")
def permute(block: Block, to: Operand, a: Operand, b: Operand, selector: str) -> None:
    """Four of the eight bytes of two numbers, chosen by the digits of a constant."""
    chosen = [int(selector.rstrip("U"), 16) >> 4 * i & 15 for i in range(4)]
    if max(chosen) > 7:
        raise ExecutionError("prmt that repeats a sign is not served")
    octets = np.stack([block.read(a, "b32"), block.read(b, "b32")], axis=1).view(np.uint8)
    block.write(to, np.ascontiguousarray(octets[:, chosen]).view(np.uint32)[:, 0], "b32")


# moves and conversions


@opcode(rf"mov\.(?P<type>pred|f32|{BITS}|{INTEGER})")
def move(block: Block, to: Operand, value: Operand, type: str) -> None:
    if isinstance(to, tuple):  # the parts of a wider value, lowest first
        part = TYPES[type].itemsize * 8 // len(to)
        whole = block.read(value, type)
        for i, register in enumerate(to):
            block.write(register, (whole >> whole.dtype.type(i * part)).astype(f"u{part // 8}"), f"b{part}")
    elif isinstance(value, tuple):
        part = TYPES[type].itemsize * 8 // len(value)
        parts = [block.read(each, f"b{part}").astype(TYPES[type]) << (i * part) for i, each in enumerate(value)]
        block.write(to, np.bitwise_or.reduce(parts), type)
    else:
        block.write(to, block.read(value, type), type)


@opcode(rf"cvt(?:\.rn)?\.(?P<type>{INTEGER}|{FLOAT})\.(?P<of>{INTEGER}|{FLOAT})")
def convert(block: Block, to: Operand, a: Operand, type: str, of: str) -> None:
    block.write(to, block.read(a, of), type)


@opcode(r"cvt\.rn\.(?P<type>f16|bf16)x2\.f32")
def convert_two(block: Block, to: Operand, high: Operand, low: Operand, type: str) -> None:
    for operand, register in ((high, "high of two"), (low, "low of two")):
        block.write(register, block.read(operand, "f32"), type)
    move(block, to, ("low of two", "high of two"), "b32")


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode(rf"cvt\.(?P<how>{'|'.join(ROUND)}){FTZ}\.(?P<type>f32|[su](?:32|64))\.f32")
def to_whole(block: Block, to: Operand, a: Operand, how: str, ftz: str | None, type: str) -> None:
    """To the nearest number there is where a type does not reach so far, and NaN to 0."""
    whole = ROUND[how](flushed(block.read(a, "f32").astype(np.float64), ftz))
    if type != "f32":  # a long double holds every integer of 64 bits
        limits = np.iinfo(TYPES[type])
        whole = np.clip(np.nan_to_num(whole.astype(np.longdouble)), limits.min, limits.max)
    block.write(to, whole, type)


# exchange within a warp


@opcode(r"shfl\.sync\.(?P<how>bfly|idx)\.b32", together=True)
def shuffle(block: Block, to: Operand, a: Operand, by: Operand, clamp: str, members: str, how: str) -> None:
    if (clamp, members) != ("31", "-1"):
        raise ExecutionError("shfl is served for whole warps alone")
    values, amount = block.read(a, "b32").reshape(-1, 32), block.read(by, "u32") & 31
    block.write(to, values[block.warp, block.lane ^ amount if how == "bfly" else amount], "b32")


@opcode(r"redux\.sync\.(?P<name>add|min|max)\.(?P<type>[su]32)", together=True)
def reduce(block: Block, to: Operand, a: Operand, members: str, name: str, type: str) -> None:
    result = INTEGERS[name].reduce(block.read(a, type).reshape(-1, 32), axis=1, dtype=TYPES[type])
    block.write(to, np.repeat(result, 32), type)


# memory and barriers


@opcode(rf"ld\.param\.(?P<type>{BITS}|{INTEGER}|f32)")
def parameter(block: Block, to: Operand, address: Address, type: str) -> None:
    if address.offset:
        raise ExecutionError("a part of a parameter")
    values = block.arguments[block.read(address.base, "u32")]
    block.write(to, values.astype(f"u{TYPES[type].itemsize}").view(TYPES[type]), type)


@opcode(rf"(?P<way>ld|st)\.{SPACE}(?:\.v[24])?\.(?P<type>{BITS}|{INTEGER}|f32)")
def access(block: Block, first: Operand, second: Operand, way: str, space: str, type: str) -> None:
    operand, address = (first, second) if way == "ld" else (second, first)
    assert isinstance(address, Address)
    registers, active = operand if isinstance(operand, tuple) else (operand,), block.mask
    memory, at, warp = block.memory if space == "global" else block.shared, block.address(address, space), block.warp
    if way == "st":
        values = np.stack([block.read(register, type) for register in registers], axis=1).view(np.uint8)
        memory.store(at[active], values[active], warp[active])
        return
    found = np.zeros((block.threads, TYPES[type].itemsize * len(registers)), np.uint8)
    found[active] = memory.load(at[active], found.shape[1], warp[active])
    for i, register in enumerate(registers):
        block.write(register, found.view(TYPES[type])[:, i], type)


@opcode(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)?")
def copy(block: Block, to: Address, source: Address, size: str, *taken: Operand) -> None:
    """`size` bytes, of which `taken` come from global memory and the rest are 0."""
    width, active = int(size, 0), block.mask
    count = block.read(taken[0], "u32") if taken else np.full(block.threads, width)
    if not np.isin(count[active], (0, width)).all():
        raise ExecutionError("cp.async is served for all or none of its bytes alone")
    full = active & (count > 0)
    values = np.zeros((block.threads, width), np.uint8)
    values[full] = block.memory.load(block.address(source, "global")[full], width, block.warp[full])
    block.shared.copy(block.address(to, "shared")[active], values[active], block.warp[active])


@opcode(r"cp\.async\.commit_group", together=True)
def commit_copies(block: Block) -> None:
    block.shared.copies.append([])


@opcode(r"cp\.async\.wait_group", together=True)
def wait_for_copies(block: Block, groups: str) -> None:
    block.shared.wait_for_copies(int(groups))


@opcode(r"fence\.proxy\.async(?:\.shared::cta)?", together=True)
def fence(block: Block) -> None:
    block.shared.fence()


@opcode(r"bar\.sync|barrier\.sync\.aligned", together=True)
def barrier(block: Block, number: str) -> None:
    if number != "0":
        raise ExecutionError("barriers of some warps are not served")
    block.shared.epoch += 1
    block.memory.epoch += 1
