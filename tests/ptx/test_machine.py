"""The executor of compiled kernels, on small programs in PTX: what it computes, and what it finds wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.ptx.machine import ExecutionError, UnknownOpcodeError
from tests.ptx.parse import parse
from tests.ptx.programs import HEAD, OWN, launched

RANDOM = np.random.default_rng(0)


def computed(instructions: str, a: Any, b: Any, dtype: Any) -> np.ndarray:
    """What instructions make of `%a` and `%b`, 8 bytes of each thread, in `%c`."""
    pairs = np.stack([a, b], axis=1)
    size = pairs.dtype.itemsize
    bits = f"b{size * 8}"
    body = f"""
        mul.wide.u32 %rd4, %t, {2 * size}; add.s64 %rd2, %rd0, %rd4;
        mul.wide.u32 %rd4, %t, {np.dtype(dtype).itemsize}; add.s64 %rd3, %rd1, %rd4;
        ld.global.{bits} %a, [%rd2]; ld.global.{bits} %b, [%rd2+{size}];
        {instructions}
        st.global.b{np.dtype(dtype).itemsize * 8} [%rd3], %c;"""
    result, out = launched(body, pairs, 32 * np.dtype(dtype).itemsize)
    assert not result.findings
    return np.frombuffer(out, dtype)


I32 = RANDOM.integers(-(2**31), 2**31, (2, 32), dtype=np.int32)
I64 = RANDOM.integers(-(2**62), 2**62, (2, 32), dtype=np.int64)
SHIFT = np.stack([I32[0], np.arange(32, dtype=np.int32) * 2])  # by 32 and more, too
F32 = (RANDOM.standard_normal((2, 32)) * 10).astype(np.float32)
ODD = F32.copy()
ODD[:, :5] = [[np.nan, 1, np.inf, 1e-39, 3e9], [1, np.nan, -np.inf, 1, -3e9]]
LONG, UINT, FLOAT = np.int64, np.uint32, np.float32


@pytest.mark.parametrize(
    ("code", "inputs", "dtype", "expected"),
    [
        ("add.s32 %c, %a, %b;", I32, np.int32, lambda a, b: a + b),
        ("sub.s32 %c, %a, 5;", I32, np.int32, lambda a, b: a - 5),
        ("mul.lo.s32 %c, %a, %b;", I32, np.int32, lambda a, b: a * b),
        ("mul.hi.s32 %c, %a, %b;", I32, np.int32, lambda a, b: (a.astype(LONG) * b >> 32).astype(np.int32)),
        ("mul.wide.s32 %c, %a, %b;", I32, LONG, lambda a, b: a.astype(LONG) * b),
        ("mad.wide.u32 %c, %a, %b, 7;", I32, np.uint64,
         lambda a, b: a.view(UINT).astype(np.uint64) * b.view(UINT) + np.uint64(7)),
        ("mad.lo.s32 %c, %a, %b, %a;", I32, np.int32, lambda a, b: a * b + a),
        ("div.s32 %c, %a, %b;", I32, np.int32, lambda a, b: np.trunc(a / b).astype(np.int32)),
        ("rem.s32 %c, %a, %b;", I32, np.int32, np.fmod),
        ("div.u32 %c, %a, %b;", I32, UINT, lambda a, b: a.view(UINT) // b.view(UINT)),
        ("min.s32 %c, %a, %b;", I32, np.int32, np.minimum),
        ("max.u32 %c, %a, %b;", I32, UINT, lambda a, b: np.maximum(a.view(UINT), b.view(UINT))),
        ("add.s64 %c, %a, %b;", I64, LONG, lambda a, b: a + b),
        ("mad.lo.s64 %c, %a, %b, %a;", I64, LONG, lambda a, b: a * b + a),
        ("neg.s32 %c, %a;", I32, np.int32, lambda a, b: -a),
        ("abs.s32 %c, %a;", I32, np.int32, lambda a, b: np.abs(a)),
        ("xor.b32 %c, %a, %b;", I32, np.int32, np.bitwise_xor),
        ("not.b32 %c, %a;", I32, np.int32, lambda a, b: ~a),
        ("shl.b32 %c, %a, %b;", SHIFT, np.int32,
         lambda a, b: np.where(b < 32, a.astype(LONG) << b, 0).astype(np.int32)),
        ("shr.s32 %c, %a, %b;", SHIFT, np.int32, lambda a, b: (a.astype(LONG) >> b).astype(np.int32)),
        ("shr.u32 %c, %a, %b;", SHIFT, UINT, lambda a, b: (a.view(UINT).astype(LONG) >> b).astype(UINT)),
        ("bfe.u32 %c, %a, 5, 9;", I32, UINT, lambda a, b: a.view(UINT) >> 5 & 511),
        ("bfe.s32 %c, %a, 5, 1;", I32, np.int32, lambda a, b: -(a >> 5 & 1)),
        ("popc.b32 %c, %a;", I32, UINT, lambda a, b: [bin(each).count("1") for each in a.view(UINT)]),
        ("cvt.s64.s32 %c, %a;", I32, LONG, lambda a, b: a.astype(LONG)),
        ("cvt.u64.u32 %c, %a;", I32, LONG, lambda a, b: a.view(UINT).astype(LONG)),
        ("cvt.u32.u64 %c, %a;", I64, UINT, lambda a, b: a.astype(UINT)),
        ("setp.lt.s32 %p, %a, %b; selp.b32 %c, %a, %b, %p;", I32, np.int32, np.minimum),
        ("setp.lt.u32 %p, %a, %b; not.pred %q, %p; @!%q mov.b32 %b, %a; mov.b32 %c, %b;", I32, UINT,
         lambda a, b: np.minimum(a.view(UINT), b.view(UINT))),
        ("mov.b32 {%x, %y}, %a; mov.b32 %c, {%y, %x};", I32, UINT,
         lambda a, b: a.view(UINT) << 16 | a.view(UINT) >> 16),
        ("cvt.rn.f32.s32 %c, %a;", I32, FLOAT, lambda a, b: a.astype(FLOAT)),
        ("add.f32 %c, %a, %b;", ODD, FLOAT, np.add),
        ("add.f32 %c, %a, 0f3FC00000;", ODD, FLOAT, lambda a, b: a + FLOAT(1.5)),
        ("mul.ftz.f32 %c, %a, %b;", ODD, FLOAT, lambda a, b: np.where(np.abs(a) < 1e-38, FLOAT(0), a) * b),
        ("div.full.f32 %c, %a, %b;", ODD, FLOAT, np.divide),
        ("max.f32 %c, %a, %b;", ODD, FLOAT, np.fmax),
        ("max.NaN.f32 %c, %a, %b;", ODD, FLOAT, np.maximum),
        ("fma.rn.f32 %c, %a, %b, %a;", F32, FLOAT,
         lambda a, b: (a.astype(float) * b + a).astype(FLOAT)),
        ("ex2.approx.f32 %c, %a;", F32, FLOAT, lambda a, b: np.exp2(a.astype(float)).astype(FLOAT)),
        ("setp.nan.f32 %p, %a, %b; selp.b32 %c, 1, 0, %p;", ODD, UINT, lambda a, b: np.isnan(a) | np.isnan(b)),
        ("setp.neu.f32 %p, %a, %b; selp.b32 %c, 1, 0, %p;", ODD, UINT, lambda a, b: a != b),
        ("setp.ne.f32 %p, %a, %b; selp.b32 %c, 1, 0, %p;", ODD, UINT, lambda a, b: (a < b) | (a > b)),
        ("cvt.rzi.s32.f32 %c, %a;", ODD, np.int32,
         lambda a, b: [0 if x != x else int(min(max(x, -(2.0**31)), 2.0**31 - 1)) for x in a.astype(float)]),
        ("cvt.rmi.f32.f32 %c, %a;", ODD, FLOAT, lambda a, b: np.floor(a)),
        ("cvt.rn.f16.f32 %x, %a; cvt.f32.f16 %c, %x;", ODD, FLOAT, lambda a, b: a.astype(np.float16).astype(FLOAT)),
        ("cvt.rn.f16x2.f32 %c, %a, %b;", F32, UINT,
         lambda a, b: np.stack([b, a], 1).astype(np.float16).view(UINT)[:, 0]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_instructions_compute_what_numpy_does(
    code: str, inputs: np.ndarray, dtype: Any, expected: Callable[..., Any]
) -> None:
    with np.errstate(all="ignore"):
        exact = np.asarray(expected(*inputs)).astype(dtype)
    np.testing.assert_array_equal(computed(code, *inputs, dtype), exact)


def test_bf16_is_rounded_to_nearest_even_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    numbers = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.4e38, np.inf, np.nan, 0, 1e-40] * 4, FLOAT)
    got = computed("cvt.rn.bf16.f32 %x, %a; cvt.f32.bf16 %c, %x;", numbers, numbers, FLOAT)
    np.testing.assert_array_equal(got, torch.from_numpy(numbers).bfloat16().float().numpy())


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.bfly.b32 %c, %a, 5, 31, -1;", lambda a: a[np.arange(32) ^ 5]),
        ("shfl.sync.idx.b32 %c, %a, 3, 31, -1;", lambda a: a[[3] * 32]),
        ("shfl.sync.up.b32 %c, %a, 2, 0, -1;", lambda a: a[[0, 1, *range(30)]]),
        ("shfl.sync.down.b32 %c, %a, 2, 31, -1;", lambda a: a[[*range(2, 32), 30, 31]]),
        ("redux.sync.add.s32 %c, %a, -1;", lambda a: np.full(32, a.sum(dtype=np.int32))),
        ("redux.sync.max.s32 %c, %a, -1;", lambda a: np.full(32, a.max())),
        ("setp.lt.s32 %p, %a, 0; vote.sync.ballot.b32 %c, %p, -1;",
         lambda a: np.full(32, sum(1 << i for i in range(32) if a[i] < 0)).astype(UINT).view(np.int32)),
        ("setp.lt.s32 %p, %t, 1; vote.sync.any.pred %q, %p, -1; selp.b32 %c, 1, 0, %q;", lambda a: np.ones(32)),
    ],
)  # fmt: skip
def test_threads_of_a_warp_exchange_values(code: str, expected: Callable[[np.ndarray], np.ndarray]) -> None:
    np.testing.assert_array_equal(computed(code, I32[0], I32[1], np.int32), expected(I32[0]))


def test_a_parameter_is_chosen_by_its_address() -> None:
    body = f"""
        {OWN}
        mov.b64 %a, f_param_1; mov.b64 %b, f_param_2; setp.lt.u32 %p, %t, 7; selp.b64 %c, %a, %b, %p;
        ld.param.b32 %d, [%c]; mov.b32 %e, 5; selp.b32 %d, %e, %d, %p; cvt.u64.u32 %f, %d; st.global.b64 [%rd3], %f;
    """
    found, written = launched(body, I64[0], 256, number=1234)
    assert not found.findings
    np.testing.assert_array_equal(np.frombuffer(written, LONG), np.where(np.arange(32) < 7, 5, 1234))


def test_loops_tables_and_the_grid() -> None:
    body = f"""{OWN}
        mov.b32 %sum, 0; mov.b32 %i, 0;
    $loop:
        add.s32 %sum, %sum, %i; add.s32 %i, %i, 1;
        setp.lt.s32 %p, %i, %n;
        @%p bra $loop;
        $table: .branchtargets
            $ten,
            $twenty;
        mov.u32 %x, %ctaid.x;
        brx.idx %x, $table;
    $twenty: {{ add.s32 %sum, %sum, 10; }}
    $ten: add.s32 %sum, %sum, 10;
        mov.u32 %y, %ctaid.y;
        mul.wide.u32 %rd5, %x, 4; add.s64 %rd3, %rd3, %rd5;
        mul.wide.u32 %rd5, %y, 256; add.s64 %rd3, %rd3, %rd5;
        st.global.b32 [%rd3], %sum;"""
    result, out = launched(body, I64[0], 3 * 256, grid=(2, 3), number=5)
    assert (result.blocks, sum(result.findings.values())) == (6, 0)
    np.testing.assert_array_equal(np.frombuffer(out, np.int32).reshape(3, 32, 2), np.tile([20, 30], (3, 32, 1)))


def test_an_unknown_opcode_is_named_even_where_it_is_not_reached() -> None:
    for opcode in ("tanh.approx.f32", "add.sat.s32", "atom.global.add.f32", "cp.async.bulk.commit_group"):
        with pytest.raises(UnknownOpcodeError, match=opcode):
            launched(f"ret; {opcode} %c, %a;", I32, 4)


def test_the_parser_names_the_line_of_the_source() -> None:
    text = HEAD.format(threads=32, body="""
        .loc 1 9 5, function_name $L, inlined_at 1 12 3 // standard.py:9:5 @[ two.py:12:3 ]
        add.s32 %c, %t, 1;""")  # fmt: skip
    program = parse(text)
    assert [step.source for step in program.code] == ["kernel.py:7"] * 4 + ["standard.py:9 in two.py:12"] * 2
    assert program.parameters == ["f_param_0", "f_param_1", "f_param_2"]
    with pytest.raises(ValueError, match=r"no \.entry"):
        parse("nothing")
    with pytest.raises(ValueError, match=r"not an instruction: '\?!' \(kernel.py:7\)"):
        parse(HEAD.format(threads=32, body="?!;"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.lt.s32 %p, %t, 5; @%p bra $a; $a: add.s32 %c, %t, 1;", "threads of a block part ways"),
        ("$a: bra $a;", "has not ended"),
        ("add.s32 %c, %t, %nothing;", "%nothing was never written"),
        ("bar.sync 1;", "barriers of some warps"),
        ("shfl.sync.bfly.b32 %c, %t, 1, 7199, -1;", "whole warps"),
    ],
)
def test_what_cannot_be_executed_ends_with_an_error(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ptx.machine.MOST", 1000)
    with pytest.raises(ExecutionError, match=message):
        launched(body, I32, 4)
