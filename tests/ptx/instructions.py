"""Instructions on registers: arithmetic, conversions, comparisons, exchange within a warp, branches."""

from __future__ import annotations

import numpy as np

from tests.ptx.machine import TYPES, Block, ExecutionError, Values, opcode
from tests.ptx.parse import Operand

INTEGER = r"[su](?:16|32|64)"
BITS = r"b(?:16|32|64)"
FLOAT = r"(?:\.(?:rn|full|approx))?(?P<ftz>\.ftz)?"


@opcode(r"bra(?:\.uni)?")
def branch(block: Block, label: str) -> None:
    block.together()
    block.next = block.program.labels[label]


@opcode(r"brx\.idx(?:\.uni)?")
def branch_by_table(block: Block, index: Operand, table: str) -> None:
    block.together()
    values = np.unique(block.read(index, "u32"))
    if len(values) > 1:
        raise ExecutionError("threads of a block part ways here, which tests/ptx cannot follow")
    block.next = block.program.labels[block.program.tables[table][int(values[0])]]


@opcode(r"ret")
def end(block: Block) -> None:
    block.together()
    block.next = len(block.program.code)


@opcode(rf"mov\.(?P<type>pred|f32|f64|{BITS}|{INTEGER})")
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
    elif value in block.program.parameters:  # as an address that only ld.param reads: its number
        block.write(to, np.full(block.threads, block.program.parameters.index(value)), type)
    else:
        block.write(to, block.read(value, type), type)


@opcode(rf"selp\.(?P<type>f32|f64|{BITS}|{INTEGER})")
def select(block: Block, to: Operand, yes: Operand, no: Operand, condition: Operand, type: str) -> None:
    block.write(to, np.where(block.read(condition, "pred"), block.read(yes, type), block.read(no, type)), type)


COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
           "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
           "hs": np.greater_equal}  # fmt: skip


@opcode(rf"setp\.(?P<how>{'|'.join(COMPARE)})\.(?P<type>{BITS}|{INTEGER})")
def compare(block: Block, to: Operand, a: Operand, b: Operand, how: str, type: str) -> None:
    block.write(to, COMPARE[how](block.read(a, type), block.read(b, type)), "pred")


@opcode(r"setp\.(?P<how>eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)(?:\.ftz)?\.(?P<type>f32|f64)")
def compare_floats(block: Block, to: Operand, a: Operand, b: Operand, how: str, type: str) -> None:
    x, y = block.read(a, type), block.read(b, type)
    nan = np.isnan(x) | np.isnan(y)
    if how in ("num", "nan"):
        result = nan if how == "nan" else ~nan
    elif how.endswith("u"):  # true where they cannot be compared
        result = nan | COMPARE[how[:-1]](x, y)
    else:
        result = ~nan & COMPARE[how](x, y)
    block.write(to, result, "pred")


BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@opcode(rf"(?P<op>and|or|xor)\.(?P<type>pred|{BITS})")
def bitwise(block: Block, to: Operand, a: Operand, b: Operand, op: str, type: str) -> None:
    block.write(to, BITWISE[op](block.read(a, type), block.read(b, type)), type)


@opcode(rf"not\.(?P<type>pred|{BITS})")
def inverse(block: Block, to: Operand, a: Operand, type: str) -> None:
    block.write(to, np.invert(block.read(a, type)), type)


@opcode(rf"(?P<way>shl|shr)\.(?P<type>{BITS}|{INTEGER})")
def shift(block: Block, to: Operand, a: Operand, by: Operand, way: str, type: str) -> None:
    value, bits = block.read(a, type), TYPES[type].itemsize * 8
    amount = block.read(by, "u32")
    within = np.minimum(amount, bits - 1).astype(value.dtype)
    if way == "shl":
        moved = np.where(amount < bits, value << within, 0)
    else:  # a negative number shifted far is -1, which bits - 1 gives too
        moved = np.where((amount < bits) | (type[0] == "s"), value >> within, 0)
    block.write(to, moved, type)


@opcode(r"bfe\.(?P<type>[su]32)")
def extract_bits(block: Block, to: Operand, a: Operand, first: Operand, count: Operand, type: str) -> None:
    start, length = (int(block.read(each, "u32")[0]) for each in (first, count))
    if not (isinstance(first, str) and first.isdigit() and isinstance(count, str) and count.isdigit()):
        raise ExecutionError("bfe is served for constant positions alone")
    if length < 1 or start + length > 32:
        raise ExecutionError(f"bfe of {length} bits from bit {start} on")
    up = block.read(a, type) << (32 - start - length)
    block.write(to, up >> (32 - length), type)


@opcode(r"popc\.b32")
def count_ones(block: Block, to: Operand, a: Operand) -> None:
    octets = np.ascontiguousarray(block.read(a, "b32")).view(np.uint8).reshape(-1, 4)
    block.write(to, np.unpackbits(octets, axis=1).sum(1), "u32")


def divide(a: Values, b: Values) -> Values:
    b = np.where(b == 0, 1, b)  # what dividing by 0 gives is left open
    return (a - np.fmod(a, b)) // b


INTEGERS = {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
            "div": divide, "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b))}  # fmt: skip


@opcode(rf"(?P<op>add|sub|mul\.lo|min|max|div|rem)\.(?P<type>{INTEGER})")
def integer(block: Block, to: Operand, a: Operand, b: Operand, op: str, type: str) -> None:
    block.write(to, INTEGERS[op](block.read(a, type), block.read(b, type)), type)


@opcode(r"(?P<op>neg|abs)\.(?P<type>s(?:16|32|64))")
def signed(block: Block, to: Operand, a: Operand, op: str, type: str) -> None:
    block.write(to, {"neg": np.negative, "abs": np.abs}[op](block.read(a, type)), type)


@opcode(rf"mad\.lo\.(?P<type>{INTEGER})")
def multiply_add(block: Block, to: Operand, a: Operand, b: Operand, c: Operand, type: str) -> None:
    block.write(to, block.read(a, type) * block.read(b, type) + block.read(c, type), type)


@opcode(r"(?P<op>mul|mad)\.wide\.(?P<sign>[su])(?P<bits>16|32)")
def wide(block: Block, to: Operand, a: Operand, b: Operand, *c: Operand, op: str, sign: str, bits: str) -> None:
    twice = f"{sign}{2 * int(bits)}"
    product = block.read(a, sign + bits).astype(TYPES[twice]) * block.read(b, sign + bits)
    block.write(to, product + block.read(c[0], twice) if op == "mad" else product, twice)


@opcode(r"mul\.hi\.(?P<type>[su]32)")
def multiply_high(block: Block, to: Operand, a: Operand, b: Operand, type: str) -> None:
    product = block.read(a, type).astype(f"{TYPES[type].kind}8") * block.read(b, type)
    block.write(to, product >> 32, type)


def flushed(values: Values, ftz: str | None) -> Values:
    """Denormal numbers of fp32 as zeros, where an instruction has it so."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(0, values), values) if ftz else values


FLOATS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
          "min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum}  # fmt: skip
FUNCTIONS = {"neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal,
             "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x)}  # fmt: skip


@opcode(rf"(?P<op>add|sub|mul|div|min|max){FLOAT}(?P<nan>\.NaN)?\.f32")
def floating(block: Block, to: Operand, a: Operand, b: Operand, op: str, ftz: str | None, nan: str | None) -> None:
    x, y = (flushed(block.read(each, "f32"), ftz) for each in (a, b))
    block.write(to, flushed(FLOATS[op + (nan or "")](x, y), ftz), "f32")


@opcode(rf"(?P<op>neg|abs|ex2|lg2|rcp|sqrt|rsqrt){FLOAT}\.f32")
def function(block: Block, to: Operand, a: Operand, op: str, ftz: str | None) -> None:
    """Exact where the GPU's are approximate."""
    exact = FUNCTIONS[op](flushed(block.read(a, "f32"), ftz).astype(np.float64))
    block.write(to, flushed(exact.astype(np.float32), ftz), "f32")


@opcode(rf"fma{FLOAT}\.f32")
def fused_multiply_add(block: Block, to: Operand, a: Operand, b: Operand, c: Operand, ftz: str | None) -> None:
    x, y, z = (flushed(block.read(each, "f32"), ftz).astype(np.float64) for each in (a, b, c))
    block.write(to, flushed((x * y + z).astype(np.float32), ftz), "f32")  # the product is exact in fp64


@opcode(r"cvt\.(?P<to_type>[su](?:8|16|32|64))\.(?P<of>[su](?:8|16|32|64))")
def between_integers(block: Block, to: Operand, a: Operand, to_type: str, of: str) -> None:
    block.write(to, block.read(a, of).astype(TYPES[to_type]), to_type)


@opcode(rf"cvt\.rn\.f32\.(?P<of>{INTEGER})")
def integer_to_float(block: Block, to: Operand, a: Operand, of: str) -> None:
    block.write(to, block.read(a, of).astype(np.float32), "f32")


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode(r"cvt\.(?P<how>r[nzmp]i)(?P<ftz>\.ftz)?\.f32\.f32")
def to_whole(block: Block, to: Operand, a: Operand, how: str, ftz: str | None) -> None:
    block.write(to, ROUND[how](flushed(block.read(a, "f32"), ftz)), "f32")


@opcode(r"cvt\.(?P<how>r[nzmp]i)(?P<ftz>\.ftz)?\.(?P<type>[su](?:32|64))\.f32")
def float_to_integer(block: Block, to: Operand, a: Operand, how: str, ftz: str | None, type: str) -> None:
    """To the nearest number there is where it is out of range, and NaN to 0."""
    whole = ROUND[how](flushed(block.read(a, "f32"), ftz).astype(np.float64))
    limits = np.iinfo(TYPES[type])
    above, below = whole >= float(limits.max), whole <= float(limits.min)
    inside = np.where(above | below | np.isnan(whole), 0, whole).astype(TYPES[type])
    block.write(to, np.where(above, limits.max, np.where(below, limits.min, inside)), type)


@opcode(r"cvt\.rn\.(?P<type>f16|bf16)\.f32")
def narrow(block: Block, to: Operand, a: Operand, type: str) -> None:
    block.write(to, block.read(a, "f32"), type)


@opcode(r"cvt\.rn\.(?P<type>f16|bf16)x2\.f32")
def narrow_two(block: Block, to: Operand, high: Operand, low: Operand, type: str) -> None:
    for operand, register in ((high, "high of two"), (low, "low of two")):
        block.write(register, block.read(operand, "f32"), type)
    move(block, to, ("low of two", "high of two"), "b32")


@opcode(r"cvt\.f32\.(?P<type>f16|bf16)")
def widen(block: Block, to: Operand, a: Operand, type: str) -> None:
    block.write(to, block.read(a, type), "f32")


@opcode(r"shfl\.sync\.(?P<how>bfly|idx|up|down)\.b32")
def shuffle(block: Block, to: Operand, a: Operand, by: Operand, clamp: str, members: str, how: str) -> None:
    block.together()
    if (clamp, members) != ("0" if how == "up" else "31", "-1"):
        raise ExecutionError("shfl is served for whole warps alone")
    values, amount = block.read(a, "b32").reshape(-1, 32), block.read(by, "u32").astype(int)
    lane = block.lane
    source = {"bfly": lane ^ amount, "idx": amount, "up": lane - amount, "down": lane + amount}[how]
    source = np.where((source < 0) | (source > 31), lane, source)  # from nowhere: its own
    block.write(to, values[block.warp, source], "b32")


REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, **BITWISE}


@opcode(r"redux\.sync\.(?P<op>add|min|max|and|or|xor)\.(?P<type>[sub]32)")
def reduce(block: Block, to: Operand, a: Operand, members: Operand, op: str, type: str) -> None:
    block.together()
    result = REDUCE[op].reduce(block.read(a, type).reshape(-1, 32), axis=1, dtype=TYPES[type])
    block.write(to, np.repeat(result, 32), type)


@opcode(r"vote\.sync\.(?P<how>any|all)\.pred")
def vote(block: Block, to: Operand, a: Operand, members: Operand, how: str) -> None:
    block.together()
    votes = block.read(a, "pred").reshape(-1, 32)
    block.write(to, np.repeat(votes.any(1) if how == "any" else votes.all(1), 32), "pred")


@opcode(r"vote\.sync\.ballot\.b32")
def ballot(block: Block, to: Operand, a: Operand, members: Operand) -> None:
    block.together()
    octets = np.packbits(block.read(a, "pred").reshape(-1, 32), axis=1, bitorder="little")
    block.write(to, np.repeat(octets.view(np.uint32)[:, 0], 32), "b32")
