"""Every kernel as compiled for capabilities 8.0 and 9.0: right against fp64, and nothing found on the way.

The compiler needs a process in which Triton is not the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcr.kernels import settings
from tests.ptx.cases import CASES

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TARGETS = (80, 90)
QUICK = ("fit fp16 K5 odd", "pool bf16 K1 one position", "contrast bf16 B70 D64", "views bf16")
SAMPLE = ("fit bf16 K20 tiles", "contrast bf16 B70 D256")


def python(*args: str) -> str:
    """What Python prints, without the interpreter and without a GPU."""
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def executed(target: int, *names: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in python("-m", "tests.ptx.cases", str(target), *names).splitlines()]


def assert_nothing_found(target: int, *names: str) -> None:
    for case in executed(target, *names):
        assert case["error"] == "", case["case"]
        assert case["rows"] == sorted(CASES[case["case"]].rows)
        assert {each["kernel"]: each["findings"] for each in case["launches"] if each["findings"]} == {}, case["case"]
        assert all(each["instructions"] > 0 for each in case["launches"])


def test_kernels_do_as_compiled_what_they_should() -> None:
    assert_nothing_found(90, *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name} sample" * (name in SAMPLE) or name) for name in CASES])
def test_every_case_does_as_compiled_what_it_should(name: str, target: int) -> None:
    assert_nothing_found(target, name)


def test_every_row_of_the_launch_settings_has_a_case() -> None:
    used = {kernel: table for kernel, table in settings.TABLE.items() if settings.FENCED or kernel != "fit_pairs"}
    rows = {f"{kernel}: {row}" for kernel, table in used.items() for row in table}
    assert set().union(*(case.rows for case in CASES.values())) == rows


PRODUCT = """
import sys, torch, triton, triton.language as tl
from tests.ptx.run import executed

@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TA: tl.constexpr, TB: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.trans(tl.load(a + k[:, None] * M + m[None, :])) if TA else tl.load(a + m[:, None] * K + k[None, :])
    y = tl.trans(tl.load(b + n[:, None] * K + k[None, :])) if TB else tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y))

for M, N, K, warps, dtype in (
    (64, 16, 16, 4, torch.bfloat16), (64, 32, 32, 4, torch.float16), (128, 64, 64, 8, torch.bfloat16),
    (64, 128, 128, 4, torch.float16), (16, 16, 32, 4, torch.bfloat16), (64, 64, 64, 8, torch.float16),
):
    for TA in (False, True):
        for TB in (False, True):
            a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
            c = torch.empty(M, N)
            with executed(int(sys.argv[1])) as launches:
                product[(1,)](a.T.contiguous() if TA else a, b.T.contiguous() if TB else b, c, M, N, K, TA, TB,
                              num_warps=warps)
            torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-4)
            assert not launches[0].findings, (M, N, K, TA, TB, launches[0].findings)
            print(*{name.partition(".")[0] for name in launches[0].executed})
"""


@pytest.mark.parametrize(("target", "instructions"), [(80, {"mma", "ldmatrix"}), (90, {"mma", "wgmma", "fence"})])
def test_products_of_all_layouts_are_numpys(target: int, instructions: set[str], tmp_path: Path) -> None:
    script = tmp_path / "product.py"  # Triton reads the source of its kernels from a file
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PRODUCT}")
    out = python(str(script), str(target)).splitlines()
    assert len(out) == 24
    assert instructions <= {name for line in out for name in line.split()}


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "compiled-code.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    findings, counts = python(str(script)).splitlines()
    assert findings == "Counter()"
    assert int(counts.split()[1]) > 4


CHANGED = """
import json, re
from tests.kernels.test_kernels import contrast, draw_contrast, fit, draw
from tests.ptx.run import executed
import torch

bf16 = torch.bfloat16
calls = [lambda: contrast(**draw_contrast(17, 64, 300, dtype=bf16), impl="triton"),
         lambda: fit(**draw(1, 192, 10, 9, 32, dtype=bf16), impl="triton")]

def without(number):
    count = iter(range(10**6))
    return lambda ptx: re.sub(r"bar\\.sync[^;]*;", lambda found: "" if next(count) == number else found[0], ptx)

def found(change):
    with executed(90, change) as launches:
        call()
    return sorted({name.partition(" (")[0] for name in launches[0].findings})

for call in calls:
    texts = []
    assert found(lambda ptx: texts.append(ptx) or ptx) == []
    for number in range(texts[0].count("bar.sync")):
        print(json.dumps(["barrier", found(without(number))]))
    print(json.dumps(["fence", found(lambda ptx: re.sub(r"fence\\.proxy\\.async[^;]*;", "", ptx))]))
"""


@pytest.mark.slow
def test_most_barriers_and_the_fences_of_the_kernels_are_missed_when_taken_out() -> None:
    found = [json.loads(line) for line in python("-c", CHANGED).splitlines()]
    barriers, fences = ([texts for name, texts in found if name == which] for which in ("barrier", "fence"))
    assert len(barriers) >= 15
    assert sum(bool(texts) for texts in barriers) >= 0.7 * len(barriers)  # some stand where another serves as well
    assert fences == [["wgmma reads what threads wrote, without fence.proxy.async"]] * 2
