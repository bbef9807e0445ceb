"""Kernels compile for every target without spills, within its shared memory, on tensor cores where it multiplies.

Compilation needs no GPU but a process in which Triton is not the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import resources

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # most one block may take
MULTIPLYING = {"attend_kernel", "_pool_kernel", "_fit_kernel", "_spread_kernel", "_spread_kernel (features)"}
OTHERS = {"_combine_kernel", "_attention_gradient_kernel", "_common_kernel"}
OTHERS |= {"_cut_kernel", "_colour_kernel", "_blur_kernel"}
RESOURCES = """
import json, sys
from bench.resources import resources
print(json.dumps([row._asdict() for row in resources([int(sys.argv[1])], every=sys.argv[2] == "every")]))
"""


def python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        pytest.param(target, sizes, id=f"{target} {sizes}{' sample' * (target == 90 and sizes == 'common')}")
        for target in SHARED_KB
        for sizes in ("common", "every")
    ],
)
def test_kernels_fit_the_target(target: int, sizes: str) -> None:
    if VERSION < (3, 8) and target not in (80, 90):
        pytest.skip("this Triton crashes on some layouts for this target")
    if VERSION < (3, 9) and sizes == "every":
        pytest.skip("with this Triton one or two of the rarer sizes spill 8 bytes")
    done = python("-c", RESOURCES, str(target), sizes)
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == MULTIPLYING | OTHERS
    dtypes = {row["shape"].split(", ")[-1] for row in rows}
    assert dtypes == ({"bf16"} if sizes == "common" else {"bf16", "fp16", "fp32"})
    most = 8 if VERSION < (3, 8) else 0  # `info_nce` at the usual size, on 8.0, with one stage
    spilled = {(row["kernel"], row["shape"]): row["spills"] for row in rows if row["spills"] > most}
    too_big = {(row["kernel"], row["shape"]): row["shared"] for row in rows if row["shared"] > SHARED_KB[target] << 10}
    scalar = {
        (row["kernel"], row["shape"])
        for row in rows
        if row["kernel"] in MULTIPLYING and not row["shape"].endswith("fp32") and not row["tensor_core"]
    }
    assert (spilled, too_big, scalar) == ({}, {}, set())
    assert all(0 < row["occupancy"] <= 1 for row in rows)


@pytest.mark.slow
def test_the_command_prints_the_table() -> None:
    done = python("bench/resources.py", "--target", "80")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(name.split()[0] in done.stdout for name in MULTIPLYING | OTHERS)
    assert all(word in done.stdout for word in ("registers", "spilled", "shared KB", "tensor ops", "occupancy"))


@pytest.mark.parametrize(
    ("args", "interpreted", "message"),
    [
        (["--target", "90", "70"], False, "--target 70: this Triton's are 80, "),
        (["--targets", "90"], False, "Unrecognized options: --targets"),
        ([], True, "TRITON_INTERPRET=1 takes the place of Triton's compiler: unset it"),
    ],
)
def test_a_mistake_is_one_line(
    args: list[str],
    interpreted: bool,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastcr.kernels.launch.INTERPRET", interpreted)
    with pytest.raises(SystemExit) as stop:
        resources.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"bench/resources.py: error: {message}")
    assert error.count("\n") == 1


def test_occupancy_of_known_cases() -> None:
    assert resources.occupancy(80, 4, 32, 0) == 1.0  # 16 blocks of 4 warps
    assert resources.occupancy(80, 8, 255, 0) == 0.125  # 8192 registers a warp: 8 warps
    assert resources.occupancy(90, 4, 32, 100 << 10) == 0.125  # two blocks by shared memory
    assert resources.occupancy(86, 4, 32, 100 << 10) == 0.0  # does not fit
