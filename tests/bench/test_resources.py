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

from bench import predict, resources
from fastcr.kernels import settings

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # most one block may take
MULTIPLYING = {"attend_kernel", "_nearest_kernel", "_pool_kernel", "_fit_kernel", "_pairs_kernel"}
MULTIPLYING |= {"_spread_kernel", "_spread_kernel (features)"}
OTHERS = {"_combine_kernel", "_attention_gradient_kernel", "_common_kernel", "_split_kernel"}
OTHERS |= {"_cut_kernel", "_colour_kernel", "_blur_kernel"}
if not settings.FENCED:  # with this Triton a program does one image
    MULTIPLYING -= {"_pairs_kernel"}
    OTHERS -= {"_split_kernel"}
QUEUED = ("info_nce", "relational", "neighbour")
RESOURCES = """
import json, sys
from bench.resources import resources
print(json.dumps([row._asdict() for row in resources([int(sys.argv[1])], every=sys.argv[2] == "every")]))
"""


def python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        pytest.param(target, sizes, marks=[] if target in (80, 90) and sizes == "common" else [pytest.mark.slow])
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
    predicted = {row["kernel"] for row in rows if row["copy"]}
    assert predicted == (MULTIPLYING | {"_attention_gradient_kernel", "_common_kernel"} if target == 90 else set())
    assert all(0 < share <= 1 for row in rows for share in row["copy"].values())


def test_every_row_of_the_launch_settings_is_compiled() -> None:
    maps = {
        f"{kernel}: {settings.map_class(sizes.dtype, None if kernel == 'attention_gradient' else sizes.detectors)}"
        for sizes in resources.EVERY
        if isinstance(sizes, resources.Maps)
        for kernel in settings.TABLE
        if kernel not in (*QUEUED, "common_weights")
        and (kernel != "fit_pairs" or (sizes.positions <= 64 and sizes.dtype.itemsize == 2))
    }
    weights = {
        f"common_weights: {settings.channels_class(sizes.dtype, sizes.channels)}"
        for sizes in resources.EVERY
        if isinstance(sizes, resources.Weights)
    }
    queued = {
        f"{kernel}: {settings.contrast_class(sizes.dtype, rows, sizes.dim)}"
        for sizes in resources.EVERY
        if isinstance(sizes, resources.Contrast)
        for kernel, rows in zip(QUEUED, (sizes.batch, 2 * sizes.batch, sizes.batch), strict=True)
    }
    rows = maps | weights | queued
    assert rows == {f"{kernel}: {row}" for kernel, table in settings.TABLE.items() for row in table}


def test_the_command_prints_the_table() -> None:
    done = python("bench/resources.py", "--target", "80")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(name.split()[0] in done.stdout for name in MULTIPLYING | OTHERS)
    assert all(word in done.stdout for word in ("registers", "spilled", "shared KB", "tensor ops", "occupancy"))


def test_under_the_interpreter_it_is_one_line() -> None:
    done = python("bench/resources.py", TRITON_INTERPRET="1")
    message = "bench/resources.py: error: TRITON_INTERPRET=1 takes the place of Triton's compiler: unset it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "90", "70"], "--target 70: this Triton's are 80, "),
        (["--targets", "90"], "Unrecognized options: --targets"),
    ],
)
def test_a_mistake_is_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastcr.kernels.launch.INTERPRET", False)
    with pytest.raises(SystemExit) as stop:
        resources.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"bench/resources.py: error: {message}")
    assert error.count("\n") == 1


SASS = """
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E R6, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/               @P1 BRA 0x50 ;
        /*0070*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0080*/                   BRA.U UP0, 0x10 ;
        /*0090*/                   BRA 0xb0 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
"""


def test_innermost_loops_of_machine_code() -> None:
    assert predict.loops_of(SASS) == [predict.Loop(3, 64 * 32 * 16 // 4, True), predict.Loop(2, 16 * 8 * 16, False)]


@pytest.mark.parametrize(
    ("loop", "resident", "stages", "share"),
    [
        (predict.Loop(10, 0, True), 8, 9, 1.0),
        (predict.Loop(500, 0, True), 8, 9, 1000 / 5000),  # 10 trips of 4 warps, 4 instructions a cycle
        (predict.Loop(10, 2048 * 50, True), 8, 9, 1000 / 2000),  # 10 trips of 4 warps
        (predict.Loop(10, 0, False), 1, 3, 1000 / 8000),  # 10 waits
        (predict.Loop(10, 0, True), 1, 3, 1000 / 4000),  # two trips ahead
    ],
)
def test_the_longest_of_bytes_instructions_products_and_waits_decides(
    loop: predict.Loop, resident: int, stages: int, share: float
) -> None:
    work = predict.Work(round(predict.COPY["H100"] / predict.CLOCK * 1000), predict.MULTIPROCESSORS, 10)
    found = predict.share_of_a_copy(work, [loop], 4, resident, stages)
    assert found["H100"] == pytest.approx(share, rel=1e-4)
    assert found["H200"] <= found["H100"]


def test_blocks_side_by_side_share_a_wait() -> None:
    work = predict.Work(round(predict.COPY["H100"] / predict.CLOCK * 1000), 4 * predict.MULTIPROCESSORS, 10)
    shares = [predict.share_of_a_copy(work, [predict.Loop(1, 0, False)], 4, fit, 1)["H100"] for fit in (1, 2, 4, 8)]
    assert shares == pytest.approx([1000 / 32000, 1000 / 16000, 1000 / 8000, 1000 / 8000], rel=1e-4)


def test_occupancy_of_known_cases() -> None:
    assert resources.occupancy(80, 4, 32, 0) == 1.0  # 16 blocks of 4 warps
    assert resources.occupancy(80, 8, 255, 0) == 0.125  # 8192 registers a warp: 8 warps
    assert resources.occupancy(90, 4, 32, 100 << 10) == 0.125  # two blocks by shared memory
    assert resources.occupancy(86, 4, 32, 100 << 10) == 0.0  # does not fit
