"""The benchmarks' statistics and their report, on made-up figures; the workloads under the interpreter."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench import report, timing
from bench.report_tables import keep, tables
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
        "| fit-forward-B256-S49 | op | 20.0 | 18.0 to 30.0 | 50.0 |  | 12.5 | 62% | 4.50 | 2.50 | 1.5 | CUDA graph |"
    )
    assert eager.split(" | ")[8:10] == ["", ""]
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
    assert lines[4].split(" | ")[8:10] == ["wrong results"] * 2
    assert not any(figure in line for line in lines for figure in ("4.50", "2.50"))


def test_a_way_that_was_skipped_has_no_ratio(tmp_path: Path) -> None:
    assert printed([entry("op", 20e-6, correct=True)], tmp_path)[4].split(" | ")[8:10] == ["", ""]


def test_figures_of_a_cpu_are_named_so(tmp_path: Path) -> None:
    machine = MACHINE | {"fastcr": MACHINE["fastcr"] | {"gpu": None}}
    rest = {"name": "test_loader[torch]", "stats": {"median": 0.5, "iqr": 0.1}, "extra_info": {"images_per_second": 88}}
    figures = entry("op", 1e-3, correct=True, how="wall", copy_bytes_per_second=None, extra_bytes=None)
    lines = printed([figures, rest], tmp_path, machine)
    assert lines[0].startswith("**CPU Some CPU, 2 threads**")
    assert lines[4].split(" | ")[6:10] == ["", "", "", ""]
    assert lines[-1] == "| test_loader[torch] | 500.000 | 100.000 | 88 |"


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
    assert lines[11:] == [
        "- batch 256: the rationale branch adds +25.0% to a step of plain MoCo v2",
        "- batch 256: ours over the fastest peer, lightly-tuned: 2.00 (plain MoCo v2 in both: 2.50)",
    ]


@pytest.mark.parametrize("correct", [False, None])
def test_no_ratio_with_a_step_that_is_wrong_or_unchecked(tmp_path: Path, correct: bool | None) -> None:
    right, wrong = step("released", 0.5), step("lightly", 0.3, correct=correct)
    lines = printed([step("ours", 0.1), right, wrong], tmp_path)
    assert [line.split(" | ")[-1] for line in lines[4:7]] == [" |", "wrong results |", "5.00 |"]
    assert lines[-1] == "- batch 256: ours over the fastest peer, released: 5.00"
    lines = printed([step("ours", 0.1, correct=correct), step("ours-moco", 0.08), right], tmp_path)
    assert [line.split(" | ")[-1] for line in lines[4:7]] == ["wrong results |", " |", "wrong results |"]
    assert lines[-1] == "- batch 256: ours over the fastest peer, released: wrong results"
    assert not any(figure in line for line in lines for figure in ("5.00 |", "adds"))


def test_columns_a_cpu_cannot_fill_are_left_out(tmp_path: Path) -> None:
    nothing = {"peak_bytes": None, "matmul_flops_per_second": None}
    lines = printed([step("ours", 0.1, **nothing), step("released", 0.2, **nothing)], tmp_path)
    assert lines[2] == "| way | batch | pairs/s | median, ms | p20 to p80, ms | TFLOP/s | ours over it |"
    assert lines[3] == "|---|---:|---:|---:|---:|---:|---:|"
    assert lines[5] == "| released | 256 | 1280 | 200.0 | 180.0 to 240.0 | 40.00 | 2.00 |"


def frozen_step(way: str, median: float, *, correct: bool = True, kept: int | None = 2**20) -> dict[str, Any]:
    sizes = {"backbone": "resnet18", "last_stage": "layer3", "image_size": 112, "batch": 32, "queue_size": 4096}
    times = {"median": 1.25, "p20": 1.2, "p80": 1.3, "how": "cpu"}
    info = {
        "frozen_step": way,
        "setting": sizes | {"frozen_stages": 1, "precision": "bf16"},
        "correct": correct,
        "rounds": 7,
        "seconds": {"median": median, "p20": median, "p80": median, "how": "cpu"},
        "norms_over_folded": times,
        "kept_bytes": kept,
    }
    return {"name": f"test_frozen_step[{way}]", "stats": {"median": 1.0, "iqr": 0.5}, "extra_info": info}


def test_folded_steps_stand_beside_those_with_batchnorm(tmp_path: Path) -> None:
    lines = printed([frozen_step("norms", 0.5, kept=3 * 2**20), frozen_step("folded", 0.4)], tmp_path)
    row = "| resnet18 up to layer3, 1 stages kept | 32 x 112 px | bf16 | 500.0 | 400.0 |"
    assert lines[4] == f"{row} 1.250 | 1.200 to 1.300 | 3 | 1 |"
    assert lines[-1] == "Steps in turn, CPU time of a thread, 7 of each; ratios of neighbours."
    lines = printed([frozen_step(way, 0.5, correct=False, kept=None) for way in ("norms", "folded")], tmp_path)
    assert lines[4].endswith("| 500.0 | 500.0 | wrong results |")


def test_loaders_have_a_table_of_their_own(tmp_path: Path) -> None:
    info = {"first_epoch_seconds": 46.31, "second_epoch_seconds": 38.8, "images_per_second": 128.9}
    loader = {"name": "test_loader[torch-host]", "params": {"loader": "torch", "cache": "host"}, "extra_info": info}
    assert printed([loader], tmp_path)[-1] == "| torch | host | 46.3 | 38.8 | 129 |"


def test_views_stand_beside_torchvisions(tmp_path: Path) -> None:
    info = {"views_per_second": 3810.4, "torchvision_views_per_second": 1020.0}
    params = {"kind": "tuned", "height": 128, "width": 170, "size": 112}
    views = {"name": "test_views[tuned-128-170-112]", "params": params, "extra_info": info}
    assert printed([views], tmp_path)[-1] == "| tuned | 170x128 | 112 | 3810 | 1020 | 3.74 |"


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


def test_the_picture_holds_steps_and_ops(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    entries = [entry("op", 20e-6, correct=True), entry("eager", 90e-6), step("ours", 0.1), step("lightly", 0.3)]
    printed(entries, tmp_path)
    report.main([str(tmp_path / "report.json"), "--png", str(tmp_path / "picture.png")])
    both = Image.open(tmp_path / "picture.png").size
    printed(entries[2:], tmp_path)
    report.main([str(tmp_path / "report.json"), "--png", str(tmp_path / "picture.png")])
    assert both[0] == Image.open(tmp_path / "picture.png").size[0] == 1600
    assert both[1] > Image.open(tmp_path / "picture.png").size[1]


def test_mistakes_are_one_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    printed([step("ours", 0.1)], tmp_path)
    (tmp_path / "other.json").write_text("[]")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    good = str(tmp_path / "report.json")
    for args, said in (
        ([good, "--png", "x.png"], "--png needs matplotlib: pip install 'fastcr[report]'"),
        ([str(tmp_path / "other.json")], "is not a report of pytest-benchmark"),
        ([str(tmp_path / "none.json")], "No such file"),
        ([], "files"),
    ):
        with pytest.raises(SystemExit) as stop:
            report.main(args)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert said in error
        assert error.startswith("bench/report.py: error: ")
        assert error.count("\n") == 1


def test_percentiles_of_known_samples() -> None:
    assert timing.summary([float(i) for i in range(11)], "wall") == (5.0, 2.0, 8.0, "wall")
    assert timing.summary([3.0], "graph") == (3.0, 3.0, 3.0, "graph")


def test_inputs_rotate_over_four_times_the_cache_where_memory_allows() -> None:
    assert timing.sets_beyond_cache(bytes_a_set=25, cache=50, free=10_000) == 8
    assert timing.sets_beyond_cache(bytes_a_set=25, cache=50, free=400) == 4
    assert timing.sets_beyond_cache(bytes_a_set=300, cache=50, free=400) == 2


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
