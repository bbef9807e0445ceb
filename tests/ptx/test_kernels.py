"""The project's kernels as compiled for capabilities 8.0 and 9.0, and the command; Triton's compiler takes a process
in which Triton is not the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from fastcr.kernels import queue, settings
from tests.ptx.cases import CASES

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
QUICK = (
    "rationale_fit float16 B2 C70 S90 K5",
    "rationale_pool bfloat16 B3",
    "info_nce bfloat16 B70 D64",
    "two_views b",
)
SAMPLE = "rationale_fit bfloat16 B2 C192 S90 K20"


def python(*args: str, status: int = 0) -> str:
    """What Python prints, without the interpreter and without a GPU."""
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_nothing_is_wrong_with_small_cases() -> None:
    out = python("-m", "tests.ptx", *QUICK)
    assert out.count(" right ") >= 2 * 2 * len(QUICK)


OPS = sorted({name.partition(" ")[0] for name in CASES})


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "90"])
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_wrong_with_any_case(op: str, target: str) -> None:
    python("-m", "tests.ptx", "--target", target, "--", op)


def test_every_row_of_the_launch_settings_has_a_case() -> None:
    rows, used = {f"{kernel}: {row}" for kernel, table in settings.TABLE.items() for row in table}, set[str]()
    for target in (80, 90):
        with mock.patch.object(queue, "has_wgmma", return_value=target == 90):
            used.update(*(wanted() for _, wanted in CASES.values()))
    assert used == rows


SCRIPT = """
@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TA: tl.constexpr, TB: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.trans(tl.load(a + k[:, None] * M + m[None, :])) if TA else tl.load(a + m[:, None] * K + k[None, :])
    y = tl.trans(tl.load(b + n[:, None] * K + k[None, :])) if TB else tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y))

for target in (80, 90):
    for M, N, K, warps, dtype, TA, TB in (
        (64, 16, 16, 4, torch.bfloat16, True, False),
        (128, 64, 64, 8, torch.bfloat16, True, True),
        (64, 128, 128, 4, torch.float16, False, False),
        (16, 16, 32, 4, torch.bfloat16, False, True),
    ):
        a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.empty(M, N)
        with executed(target) as launches:
            product[(1,)](a.T.contiguous() if TA else a, b.T.contiguous() if TB else b, c, M, N, K, TA, TB,
                          num_warps=warps)
        torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-4)
        assert not launches[0].findings, (M, N, K, TA, TB, launches[0].findings)
        print(target, *{name.partition(".")[0] for name in launches[0].executed})

@triton.jit
def operations(x, y, i, j, f, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b, k, m = tl.load(x + at), tl.load(y + at), tl.load(i + at), tl.load(j + at)
    order = tl.sum((k > 0).to(tl.int32))
    tl.store(f + at, tl.exp2(a) / b - tl.sqrt(tl.abs(b)) + tl.maximum(a, b) * tl.where(a < b, a, -b))
    tl.store(f + BLOCK + at, tl.floor(b * 9) + tl.ceil(a * 9) + (a * 99).to(tl.int32) + tl.minimum(a, k * 2.0**-30))
    tl.store(f + 2 * BLOCK + at, (a * b).to(tl.bfloat16).to(tl.float32) + (a + b).to(tl.float16).to(tl.float32))
    tl.store(f + 3 * BLOCK + at, tl.sum(a) + tl.max(b) + tl.where(a != a, 0.0, 1.0))
    tl.store(n + at, (k << 3) + (k >> 2) + (m // (at + 3)) * k - m % (at + 3) + (k & m) - (k | m) + (k ^ m) + ~k)
    tl.store(n + BLOCK + at, tl.minimum(k, m) * order + tl.abs(k) + (k.to(tl.uint32) >> 5).to(tl.int32))
    tl.store(n + 2 * BLOCK + at, ((k.to(tl.int64) * m + k.to(tl.uint32) * 3) >> 9).to(tl.int32))

for target in (80, 90):
    a, b = torch.randn(2, 128)
    k, m = torch.randint(-(2**30), 2**30, (2, 128), dtype=torch.int32)
    with executed(target) as launches:
        f, n = torch.empty(4, 128), torch.empty(3, 128, dtype=torch.int32)
        operations[(1,)](a, b, k, m, f, n, BLOCK=128)
    assert not launches[0].findings, launches[0].findings
    by = torch.arange(128, dtype=torch.int32) + 3
    quotient, wide, unsigned = torch.div(m, by, rounding_mode="trunc"), k.long(), k.long() % 2**32
    torch.testing.assert_close(f, torch.stack([
        torch.exp2(a) / b - b.abs().sqrt() + torch.maximum(a, b) * torch.where(a < b, a, -b),
        (b * 9).floor() + (a * 9).ceil() + (a * 99).int() + torch.minimum(a, k * 2.0**-30),
        (a * b).bfloat16().float() + (a + b).half().float(),
        (a.sum() + b.max() + 1).expand(128),
    ]))
    assert torch.equal(n, torch.stack([
        (k << 3) + (k >> 2) + quotient * k - (m - by * quotient) + (k & m) - (k | m) + (k ^ m) + ~k,
        torch.minimum(k, m) * (k > 0).sum().int() + k.abs() + (unsigned >> 5).int(),
        ((wide * m + unsigned * 3 % 2**32) >> 9).int(),
    ]))

import sys, types

def check(name):
    y = torch.empty(1000)
    scale[(4,)](x, y, int(name), BLOCK=256)
    assert torch.equal(y, 2 * x), "y is not 2 x"

x = torch.randn(1000)
sys.modules["tests.ptx.cases"] = types.SimpleNamespace(CASES={"999": None, "1000": None, "1001": None}, check=check)
from tests.ptx.__main__ import main

print(*[main(["--target", "90", "--", name]) for name in ("999", "1000", "1001")])
assert not any(name.startswith("fastcr") for name in sys.modules), "the tool is to work without the project"
"""


def test_the_example_of_the_page_products_of_several_layouts_and_faults_that_the_command_finds(tmp_path: Path) -> None:
    page = (Path(__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "example.py"  # Triton reads the source of its kernels from a file
    script.write_text(code + SCRIPT)
    out = python(str(script))
    count, *lines, statuses = out.splitlines()
    assert int(count) > 4
    used = {target: " ".join(line for line in lines if line.startswith(target)).split() for target in ("80 ", "90 ")}
    assert {"mma", "ldmatrix"} <= set(used["80 "])
    assert {"mma", "wgmma", "fence"} <= set(used["90 "])
    assert statuses == "1 0 1"
    rows = [line.split() for line in lines if "scale" in line]
    assert [row[-2:] for row in rows] == [["wrong", "none"], ["right", "none"], ["right", "2"]]
    assert "AssertionError: y is not 2 x" in out
    assert re.search(r"1 x write out of bounds \(st\.global\.\S+, example\.py:8\)", out)


CHANGED = """
import json, re, sys
from tests.ptx import cases
from tests.ptx.run import executed

def found(change):
    with executed(90, change) as launches:
        try:
            cases.check(sys.argv[1])
        except AssertionError:
            pass
    return sorted({name.partition(" (")[0] for name in launches[0].findings})

def without(number):
    count = iter(range(10**6))
    return lambda ptx: re.sub(r"bar\\.sync[^;]*;", lambda text: "" if next(count) == number else text[0], ptx)

texts = []
assert found(lambda ptx: texts.append(ptx) or ptx) == []
barriers = [found(without(number)) for number in range(texts[0].count("bar.sync"))]
print(json.dumps([barriers, found(lambda ptx: re.sub(r"fence\\.proxy\\.async[^;]*;", "", ptx))]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(SAMPLE, id="sample"), "info_nce bfloat16 B70 D256 N2000"])
def test_most_barriers_and_the_fences_of_the_kernels_are_missed_when_taken_out(name: str) -> None:
    barriers, fence = json.loads(python("-c", CHANGED, name))
    assert len(barriers) >= 5
    assert sum(map(bool, barriers)) >= 0.7 * len(barriers)  # some stand where another serves as well
    assert fence == ["wgmma reads what threads wrote, without fence.proxy.async"]
