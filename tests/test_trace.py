"""A trace names every phase, its times add up, and kernels belong to the phase that launched them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from fastcr import trace
from tests.shared import TINY

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = ["key forward", "query forward", "contrast", "fit", "backward", "optimiser", "EMA", "queue"]


@pytest.fixture(scope="module")
def folder(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of two steps of a ResNet-18 up to layer3."""
    folder = tmp_path_factory.mktemp("traces") / "tiny"
    trace.main([*TINY, "--steps", "2", "--data.root", str(flat), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "phases.json").read_text())


def test_every_phase_is_there_and_part_of_the_step(facts: dict[str, Any]) -> None:
    rows = {row["name"]: row["host_ms"] for row in facts["phases"]}
    assert list(rows) == ["waiting for data", *PHASES, "whole step"]
    assert all(each > 0 for each in rows.values())
    assert sum(rows.values()) < 2 * rows["whole step"]
    assert facts["settings"]["optim"]["batch_size"] == 8


def test_the_trace_opens_and_names_the_phases(folder: Path) -> None:
    with gzip.open(folder / "trace.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in ("waiting for data", *PHASES)} == dict.fromkeys(
        ("waiting for data", *PHASES), 2
    )


def test_a_mistake_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert "preset cub200 needs --data.root, the folder of its images" in refused(trace.main, "cub200")
    assert not list(tmp_path.iterdir())


def test_a_trace_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "phases.json").read_bytes()
    with pytest.raises(SystemExit):
        trace.main([*TINY, "--out", str(folder)])
    assert "already holds a trace.json.gz: name another --out" in capsys.readouterr().err
    assert (folder / "phases.json").read_bytes() == before


MAIN, AUTOGRAD = 1, 2
DEFAULTS: dict[str, Any] = {"is_user_annotation": False, "use_device": "cuda", "stack": []}


def on_cpu(name: str, start: float, end: float, thread: int = MAIN, **facts: Any) -> FunctionEvent:
    """What the host did; `kernels` are the microseconds of the kernels that an operator launched."""
    kernels = facts.pop("kernels", [])
    event = FunctionEvent(0, name, thread, start, end, **DEFAULTS | facts)
    for took in kernels:
        event.append_kernel("some kernel", 0, took)
    return event


def span(name: str, start: float, end: float) -> FunctionEvent:
    return on_cpu(name, start, end, is_user_annotation=True)


def kernel(id: int, name: str, start: float, end: float, **facts: Any) -> FunctionEvent:
    return FunctionEvent(id, name, 0, start, end, **DEFAULTS | {"device_type": DeviceType.CUDA} | facts)


# one step of a GPU, as PyTorch's profiler gives it: kernels run long after their launches
ON_CUDA = [
    span("waiting for data", 0, 50),
    span("query forward", 100, 300),
    on_cpu("aten::mm", 110, 150, kernels=[10]),
    on_cpu("cudaLaunchKernel", 120, 125),
    on_cpu("triton_poi_fused_relu_0", 160, 180, kernels=[4]),
    span("backward", 400, 700),
    on_cpu("autograd::engine::evaluate_function: MmBackward0", 450, 500, AUTOGRAD),
    on_cpu("aten::mm", 455, 490, AUTOGRAD, kernels=[30]),
    on_cpu("cudaLaunchKernel", 470, 475, 9),  # the loader's thread, whose operators are not recorded
    on_cpu("aten::zero_", 800, 805, kernels=[1]),
    kernel(1, "gemm", 500, 510),
    kernel(2, "relu", 510, 514),
    kernel(3, "gemm", 600, 630),
    kernel(4, "_cut_kernel", 600, 700),
    kernel(5, "Memset", 810, 811),
    kernel(6, "query forward", 500, 514, is_user_annotation=True),
]


def test_kernels_belong_to_the_phase_that_launched_them() -> None:
    rows = [(row["name"], row["host_ms"], round(row["device_ms"], 9)) for row in trace.phase_rows(ON_CUDA, 1, 1.0)]
    assert rows == [
        ("waiting for data", 0.05, 0),
        ("query forward", 0.2, 0.014),
        ("backward", 0.3, 0.03),
        ("whole step", 1, 0.145),
    ]
