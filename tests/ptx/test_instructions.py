"""What instructions compute, and which programs cannot be executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.ptx.block import ExecutionError
from tests.ptx.programs import kinds, launched


def computed(instructions: str, a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """What instructions make of `%a` and `%b`, 4 bytes of each of 32 threads, in `%c`."""
    width = np.dtype(dtype).itemsize
    body = f"""
        ld.global.v2.b32 {{%a, %b}}, [%rd2];
        {instructions}
        mul.wide.u32 %rd4, %t, {width}; add.s64 %rd3, %rd1, %rd4;
        st.global.b{width * 8} [%rd3], %c;"""
    result, out = launched(body, np.stack([a, b], axis=1), 32 * width, threads=32)
    assert not result.findings
    return out.view(dtype)


RANDOM = np.random.default_rng(0)
I32 = RANDOM.integers(-(2**31), 2**31, (2, 32), dtype=np.int32)
SHIFT = np.stack([I32[0], np.arange(32, dtype=np.int32) * 2])  # by 32 and more, too
F32 = (RANDOM.standard_normal((2, 32)) * 10).astype(np.float32)
F32[:, :5] = [[np.nan, 1, np.inf, 1e-39, 3e9], [1, np.nan, -np.inf, 1, -3e9]]
F32[0, 5:9] = 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.4e38  # bf16: to even down and up, not to even, to -inf
LANE = np.arange(32)
INT, UINT, LONG, FLOAT, HALF = np.int32, np.uint32, np.int64, np.float32, np.float16


@pytest.mark.parametrize(
    ("code", "inputs", "dtype", "expected"),
    [
        ("add.s32 %c, %a, %b; mad.lo.s32 %c, %c, %b, %a; xor.b32 %c, %c, %a; neg.s32 %c, %c; not.b32 %c, %c;",
         I32, INT, lambda a, b: ~-((a + b) * b + a ^ a)),
        ("div.s32 %c, %a, %b; rem.s32 %d, %a, %b; min.s32 %c, %c, %d;", I32, INT,
         lambda a, b: np.minimum(np.trunc(a / b), np.fmod(a, b))),
        ("mul.wide.s32 %d, %a, %b; mad.wide.u32 %c, %a, %b, %d;", I32, np.uint64,
         lambda a, b: a.view(UINT).astype(np.uint64) * b.view(UINT) + (a.astype(LONG) * b).view(np.uint64)),
        ("shl.b32 %c, %a, %b;", SHIFT, INT, lambda a, b: np.where(b < 32, a.astype(LONG) << b, 0)),
        ("shr.s32 %c, %a, %b;", SHIFT, INT, lambda a, b: a.astype(LONG) >> b),
        ("shr.u32 %c, %a, %b;", SHIFT, UINT, lambda a, b: a.view(UINT).astype(LONG) >> b),
        ("bfe.u32 %c, %a, 5, 9; popc.b32 %c, %c;", I32, UINT,
         lambda a, b: [bin(each >> 5 & 511).count("1") for each in a.view(UINT)]),
        ("bfe.s32 %c, %a, 5, 9; cvt.s64.s32 %c, %c;", I32, LONG, lambda a, b: a << 18 >> 23),
        ("setp.lt.u32 %p, %a, %b; not.pred %q, %p; @!%q mov.b32 %b, %a; mov.b32 %c, %b;", I32, UINT,
         lambda a, b: np.minimum(a.view(UINT), b.view(UINT))),
        ("mov.b32 {%x, %y}, %a; mov.b32 %c, {%y, %x};", I32, UINT,
         lambda a, b: a.view(UINT) << 16 | a.view(UINT) >> 16),
        ("prmt.b32 %c, %a, %b, 0x5410U;", I32, UINT, lambda a, b: b.view(UINT) << 16 | a.view(UINT) & 0xFFFF),
        ("shfl.sync.bfly.b32 %c, %a, 5, 31, -1;", I32, INT, lambda a, b: a[LANE ^ 5]),
        ("shfl.sync.idx.b32 %c, %a, 3, 31, -1;", I32, INT, lambda a, b: a[[3] * 32]),
        ("redux.sync.add.s32 %c, %a, -1;", I32, INT, lambda a, b: np.full(32, a.sum(dtype=INT))),
        ("mul.ftz.f32 %c, %a, %b; add.f32 %c, %c, 0f3FC00000;", F32, FLOAT,
         lambda a, b: np.where(np.abs(a) < 1e-38, FLOAT(0), a) * b + FLOAT(1.5)),
        ("div.full.f32 %c, %a, %b; max.f32 %c, %c, %b;", F32, FLOAT, lambda a, b: np.fmax(a / b, b)),
        ("fma.rn.f32 %c, %a, %b, %a;", F32, FLOAT, lambda a, b: a.astype(float) * b + a),
        ("ex2.approx.f32 %c, %a;", F32, FLOAT, lambda a, b: np.exp2(a.astype(float))),
        ("sqrt.approx.ftz.f32 %c, %a;", np.abs(F32), FLOAT, lambda a, b: np.sqrt(np.where(a < 1e-38, 0, a))),
        ("setp.leu.f32 %p, %a, %b; selp.b32 %c, 1, 0, %p;", F32, UINT, lambda a, b: ~(a > b)),
        ("cvt.rzi.s32.f32 %c, %a;", F32, INT,
         lambda a, b: np.clip(np.nan_to_num(a.astype(float)), -(2**31), 2**31 - 1)),
        ("cvt.rmi.ftz.f32.f32 %c, %a; cvt.rzi.s64.f32 %c, %c;", F32, LONG,
         lambda a, b: [0 if x != x else int(min(max(np.floor(x), -(2.0**63)), 2**63 - 1)) for x in a.astype(float)]),
        ("cvt.rn.f16.f32 %x, %a; cvt.f32.f16 %c, %x;", F32, FLOAT, lambda a, b: a.astype(HALF)),
        ("cvt.rn.bf16.f32 %x, %a; cvt.f32.bf16 %c, %x;", F32, FLOAT,
         lambda a, b: torch.from_numpy(a.copy()).bfloat16().float().numpy()),
        ("cvt.rn.f16x2.f32 %c, %a, %b;", F32, UINT, lambda a, b: np.stack([b, a], 1).astype(HALF).view(UINT)[:, 0]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_instructions_compute_what_numpy_does(
    code: str, inputs: np.ndarray, dtype: Any, expected: Callable[..., Any]
) -> None:
    with np.errstate(all="ignore"):
        exact = np.asarray(expected(*inputs)).astype(dtype)
    np.testing.assert_array_equal(computed(code, *inputs, dtype), exact)


def test_loops_tables_parameters_and_the_grid() -> None:
    body = """
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
    $twenty: { add.s32 %sum, %sum, 10; }
    $ten: add.s32 %sum, %sum, 10;
        mov.b64 %a, f_param_2; mov.b64 %b, f_param_1; setp.lt.u32 %p, %t, 7; selp.b64 %c, %a, %b, %p;
        ld.param.b32 %d, [%c];
        @%p add.s32 %sum, %sum, %d;
        mov.u32 %y, %ctaid.y;
        mul.wide.u32 %rd5, %x, 4; add.s64 %rd3, %rd3, %rd5;
        mul.wide.u32 %rd5, %y, 256; add.s64 %rd3, %rd3, %rd5;
        st.global.b32 [%rd3], %sum;"""
    result, out = launched(body, I32, 3 * 256, threads=32, grid=(2, 3), number=5)
    assert kinds(result) == set()
    expected = np.array([20, 30]) + 5 * (LANE < 7)[:, None]
    np.testing.assert_array_equal(out.view(np.int32).reshape(3, 32, 2), np.stack([expected] * 3))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ret; tanh.approx.f32 %c, %a;", "tanh.approx.f32: no function"),  # even where it is not reached
        ("setp.lt.s32 %p, %t, 5; @%p bra $a; $a: add.s32 %c, %t, 1;", "threads of a block part ways"),
        ("$a: bra $a;", "has not ended"),
        ("add.s32 %c, %t, %nothing;", "%nothing was never written"),
        ("bar.sync 1;", "barriers of some warps"),
        ("?!;", r"not an instruction: '\?!' \(kernel.py:7\)"),
    ],
)
def test_what_cannot_be_executed_ends_with_an_error(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ptx.block.MOST", 1000)
    with pytest.raises((ExecutionError, ValueError), match=message):
        launched(body, LANE, 8)
