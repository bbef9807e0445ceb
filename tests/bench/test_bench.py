"""The benchmarks' statistics and their report, on made-up figures; the workloads under the interpreter."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.report import keep, tables
from bench.workloads import Workload

MACHINE = {
    "cpu": {"brand_raw": "Some CPU"},
    "fastcr": {"gpu": "Some GPU", "driver": "1.2", "torch": "2.15", "triton": "3.9", "commit": "abc", "threads": 2},
}


def entry(
    way: str, median: float, *, correct: bool | None = None, how: str = "graph", **changes: Any
) -> dict[str, Any]:
    info = {
        "work": "fit-forward-B256-S49",
        "way": way,
        "correct": correct,
        "seconds": {"median": median, "p20": median * 0.9, "p80": median * 1.5, "how": how},
        "floor_bytes": 50_000_000,
        "floor_flops": 0,
        "copy_bytes_per_second": 4e12,
        "matmul_flops_per_second": 8e14,
        "extra_bytes": 1_500_000,
    }
    return {"name": f"test_op[{way}]", "stats": {"median": 1.0, "iqr": 0.5}, "extra_info": info | changes}


def printed(entries: list[dict[str, Any]], folder: Path, machine: dict[str, Any] = MACHINE) -> list[str]:
    path = folder / "report.json"
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": entries}))
    return tables(path).splitlines()


def test_the_table_shows_times_rates_and_ratios(tmp_path: Path) -> None:
    entries = [entry("op", 20e-6, correct=True), entry("eager", 90e-6), entry("compiled", 50e-6, how="events")]
    lines = printed(entries, tmp_path)
    assert lines[0] == "**Some GPU, driver 1.2**, torch 2.15, Triton 3.9, commit abc"
    op, eager, compiled = lines[4:7]
    assert op == (
        "| fit-forward-B256-S49 | op | 20.0 | 18.0 to 30.0 | 50.0 | 12.5 | 62% | 4.50 | 2.50 | 1.5 | CUDA graph |"
    )
    assert eager.split(" | ")[7:9] == ["", ""]
    assert compiled.endswith("| events, not capturable |")
    assert lines[-1].endswith("A large copy: 4000 GB/s; a bf16 product: 800 TFLOP/s.")


def test_the_floor_is_the_longer_of_bytes_and_arithmetic(tmp_path: Path) -> None:
    flops = 4 * 256 * 65536 * 256
    work = {"floor_bytes": 2 * 65536 * 256, "floor_flops": flops}
    row = printed([entry("op", 40e-6, correct=True, **work)], tmp_path)[4]
    assert row.split(" | ")[4:8] == ["33.6", "17.18", f"{flops / 8e14 * 1e6:.1f}", "54%"]  # the copy takes 8.4 us
    few = work | {"floor_flops": flops // 16}
    assert printed([entry("op", 40e-6, correct=True, **few)], tmp_path)[4].split(" | ")[4:8] == [
        *("33.6", "1.07", "8.4", "21%"),
    ]


@pytest.mark.parametrize("correct", [False, None])
def test_no_ratio_for_an_op_with_wrong_or_unchecked_results(tmp_path: Path, correct: bool | None) -> None:
    lines = printed([entry("op", 20e-6, correct=correct), entry("eager", 90e-6), entry("compiled", 50e-6)], tmp_path)
    assert lines[4].split(" | ")[7:9] == ["wrong results"] * 2
    assert not any(figure in line for line in lines for figure in ("4.50", "2.50"))


def test_columns_that_a_cpu_cannot_fill_are_left_out(tmp_path: Path) -> None:
    machine = MACHINE | {"fastcr": MACHINE["fastcr"] | {"gpu": None}}
    nothing = {"peak_bytes": None, "matmul_flops_per_second": None}
    lines = printed([step("ours", 0.1, **nothing), step("released", 0.2, **nothing)], tmp_path, machine)
    assert lines[0].startswith("**CPU Some CPU, 2 threads**")
    assert lines[2] == "| way | batch | pairs/s | median, ms | p20 to p80, ms | TFLOP/s | ours over it |"
    assert lines[5] == "| released | 256 | 1280 | 200.0 | 180.0 to 240.0 | 40.00 | 2.00 |"


def step(way: str, median: float, *, batch: int = 256, correct: bool | None = True, **changes: Any) -> dict[str, Any]:
    info = {
        "step": way,
        "setting": {
            "backbone": "resnet50",
            "last_stage": "layer4",
            "image_size": 224,
            "batch": batch,
            "queue_size": 4096,
        },
        "compiled": way == "ours",
        "correct": correct,
        "rounds": 30,
        "seconds": {"median": median, "p20": median * 0.9, "p80": median * 1.2, "how": "events"},
        "peak_bytes": 3 * 2**30,
        "flops": 8_000_000_000_000,
        "matmul_flops_per_second": 8e14,
    }
    return {"name": f"test_step[{way}]", "stats": {"median": 1.0, "iqr": 0.5}, "extra_info": info | changes}


def test_steps_stand_beside_ours_at_the_same_batch_fastest_first(tmp_path: Path) -> None:
    steps = [step("released", 0.5), step("ours", 0.1), step("ours-moco", 0.08), step("lightly-tuned", 0.2)]
    lines = printed([*steps, step("ours", 0.15, batch=512)], tmp_path)
    assert lines[4:9] == [
        "| ours-moco | 256 | 3200 | 80.0 | 72.0 to 96.0 | 3.00 | 100.00 | 12% | 0.80 |",
        "| ours (compiled) | 256 | 2560 | 100.0 | 90.0 to 120.0 | 3.00 | 80.00 | 10% |  |",
        "| lightly-tuned | 256 | 1280 | 200.0 | 180.0 to 240.0 | 3.00 | 40.00 | 5% | 2.00 |",
        "| released | 256 | 512 | 500.0 | 450.0 to 600.0 | 3.00 | 16.00 | 2% | 5.00 |",
        "| ours (compiled) | 512 | 3413 | 150.0 | 135.0 to 180.0 | 3.00 | 53.33 | 7% |  |",
    ]
    assert lines[10].startswith("resnet50 up to layer4, 224 px, queue 4096; events around each step, 30 of each.")


def test_a_kept_report_is_named_after_what_it_holds_and_has_no_raw_samples(tmp_path: Path) -> None:
    entries = [entry("op", 20e-6, correct=True), step("ours", 0.1)]
    entries[0]["stats"]["data"] = [0.1] * 1000
    machine = MACHINE | {"cpu": {"brand_raw": "Some CPU", "flags": ["sse"] * 100}, "node": "name-of-a-machine"}
    path = tmp_path / "raw.json"
    path.write_text(
        json.dumps(
            {
                "machine_info": machine,
                "benchmarks": entries,
                "datetime": "2026-11-23T20:00:00+00:00",
                "commit_info": {"id": "abc", "project": "main"},
            }
        )
    )
    kept = keep(path, tmp_path / "results")
    assert kept == tmp_path / "results" / "ops-step_some-gpu_2.15_2026-11-23.json"
    assert tables(kept) == tables(path)
    text = kept.read_text()
    assert not any(word in text for word in ("data", "flags", "name-of-a-machine"))


MAPS, QUEUE = {"B": 19, "C": 64, "S": 20, "K": 5}, {"B": 19, "D": 24, "N": 300}
WORK = [
    Workload("rationale_fit", MAPS),
    Workload("rationale_fit", MAPS, training=True, options={"pool_weight": 1 / 19}),
    Workload("rationale_pool", MAPS, torch.float32, training=True),
    Workload("common_weights", MAPS),
    Workload("info_nce", QUEUE, training=True),
    Workload("relational", QUEUE, training=True),
]


@pytest.mark.parametrize("work", WORK, ids=str)
def test_a_right_kernel_passes_the_check_of_a_workload_and_a_wrong_one_fails(work: Workload) -> None:
    inputs = work.inputs(torch.device("cpu"))
    exact = work.exact(inputs)
    for function in (work.spec.reference, partial(work.spec.op, impl="triton")):
        assert work.error(work.run(function, inputs), exact) <= work.tolerance
    others: dict[str, dict[str, Any]] = {"common_weights": {"cam_keeps": "match"}, "info_nce": {"temperature": 0.19}}
    other = others.get(work.op, {"temperature": 0.095 if work.op == "relational" else 0.35})
    wrong = work.run(partial(work.spec.reference, **other), inputs)
    assert work.error(wrong, exact) > work.tolerance
    broken = (*exact[:-1], torch.full_like(exact[-1], torch.nan))
    assert work.error(broken, exact) == torch.inf


def test_floors_count_each_pass_over_the_features_once() -> None:
    maps = {"B": 256, "C": 2048, "S": 49, "K": 32}
    once = 2 * 256 * 49 * 2048
    assert Workload("rationale_fit", maps).floor.bytes == once
    assert Workload("rationale_fit", maps, training=True).floor.bytes == 3 * once
    assert Workload("common_weights", maps).floor.bytes == once
    contrast = Workload("info_nce", {"B": 256, "D": 256, "N": 65536}, training=True).floor
    assert contrast == (2 * 65536 * 256, 4 * 256 * 65536 * 256)
