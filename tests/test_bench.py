"""The benchmarks' statistics and their report, on made-up figures; the workloads under the interpreter."""

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcr import timing
from fastcr.workloads import OPS, REFERENCES, Workload

spec = importlib.util.spec_from_file_location("report", Path(__file__).parents[1] / "bench" / "report.py")
assert spec is not None
assert spec.loader is not None
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

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
        "copy_bytes_per_second": 4e12,
        "extra_bytes": 1_500_000,
    }
    return {"name": f"test_op[{way}]", "stats": {"median": 1.0, "iqr": 0.5}, "extra_info": info | changes}


def printed(entries: list[dict[str, Any]], folder: Path, machine: dict[str, Any] = MACHINE) -> list[str]:
    path = folder / "report.json"
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": entries}))
    return report.tables(path).splitlines()


def test_the_table_shows_times_rates_and_ratios(tmp_path: Path) -> None:
    entries = [entry("op", 20e-6, correct=True), entry("eager", 90e-6), entry("compiled", 50e-6, how="events")]
    lines = printed(entries, tmp_path)
    assert lines[0] == "**Some GPU, driver 1.2**, torch 2.15, Triton 3.9, commit abc"
    op, eager, compiled = lines[4:7]
    assert op == (
        "| fit-forward-B256-S49 | op | 20.0 | 18.0 to 30.0 | 50.0 | 2500 | 62% | 4.50 | 2.50 | 1.5 | CUDA graph |"
    )
    assert eager.split(" | ")[7:9] == ["", ""]
    assert compiled.endswith("| events, not capturable |")
    assert lines[-1].endswith("A large copy: 4000 GB/s.")


@pytest.mark.parametrize("correct", [False, None])
def test_no_ratio_for_an_op_with_wrong_or_unchecked_results(tmp_path: Path, correct: bool | None) -> None:
    lines = printed([entry("op", 20e-6, correct=correct), entry("eager", 90e-6), entry("compiled", 50e-6)], tmp_path)
    assert lines[4].split(" | ")[7:9] == ["wrong results"] * 2
    assert not any(figure in line for line in lines for figure in ("4.50", "2.50"))


def test_a_way_that_was_skipped_has_no_ratio(tmp_path: Path) -> None:
    assert printed([entry("op", 20e-6, correct=True)], tmp_path)[4].split(" | ")[7:9] == ["", ""]


def test_figures_of_a_cpu_are_named_so(tmp_path: Path) -> None:
    machine = MACHINE | {"fastcr": MACHINE["fastcr"] | {"gpu": None}}
    rest = {"name": "test_loader[torch]", "stats": {"median": 0.5, "iqr": 0.1}, "extra_info": {"images_per_second": 88}}
    figures = entry("op", 1e-3, correct=True, how="wall", copy_bytes_per_second=None, extra_bytes=None)
    lines = printed([figures, rest], tmp_path, machine)
    assert lines[0].startswith("**CPU Some CPU, 2 threads**")
    assert lines[4].split(" | ")[6:10] == ["", "", "", ""]
    assert lines[-1] == "| test_loader[torch] | 500.000 | 100.000 | 88 |"


def test_percentiles_of_known_samples() -> None:
    assert timing.summary([float(i) for i in range(11)], "wall") == (5.0, 2.0, 8.0, "wall")
    assert timing.summary([3.0], "graph") == (3.0, 3.0, 3.0, "graph")


def test_inputs_rotate_over_four_times_the_cache_where_memory_allows() -> None:
    assert timing.sets_beyond_cache(bytes_a_set=25, cache=50, free=10_000) == 8
    assert timing.sets_beyond_cache(bytes_a_set=25, cache=50, free=400) == 4
    assert timing.sets_beyond_cache(bytes_a_set=300, cache=50, free=400) == 2


WORK = [
    Workload("fit", "forward", 19, 20, 64, 5),
    Workload("fit", "training", 19, 20, 64, 5),
    Workload("pool", "training", 19, 20, 64, 5, torch.float32),
    Workload("contrast", "training", 19, 300, 24),
]


@pytest.mark.parametrize("work", WORK, ids=str)
def test_a_right_kernel_passes_the_check_of_a_workload_and_a_wrong_one_fails(work: Workload) -> None:
    inputs = work.inputs(torch.device("cpu"))
    exact = work.exact(inputs)
    for function in (REFERENCES[work.op], partial(OPS[work.op], impl="triton")):
        assert work.error(work.run(function, inputs), exact) <= work.tolerance
    colder = partial(REFERENCES[work.op], temperature=0.35 if work.op != "contrast" else 0.19)
    wrong = work.run(colder, inputs)
    assert work.error(wrong, exact) > work.tolerance
    broken = (*exact[:-1], torch.full_like(exact[-1], torch.nan))
    assert work.error(broken, exact) == torch.inf


def test_floors_count_each_pass_over_the_features_once() -> None:
    sizes = (256, 49, 2048)
    once = 2 * 256 * 49 * 2048
    assert Workload("fit", "forward", *sizes).floor_bytes == once
    assert Workload("fit", "training", *sizes).floor_bytes == 3 * once
    assert Workload("contrast", "training", 256, 65536, 256).floor_bytes == 2 * 65536 * 256
