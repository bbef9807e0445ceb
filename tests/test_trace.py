"""A trace names every phase, its times add up, kernels belong to the phase that launched them; and the least work."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from bench.budget import IN_PASSING, PASSES, Ceilings, Count, Work, size, step_work
from bench.profiled import kernel_rows, phase_rows, recorded_work, take_apart
from bench.timing import copy_bandwidth, matmul_rate
from bench.workloads import Workload
from fastcr import trace
from fastcr.config import RationaleConfig, ReleasedConfig
from fastcr.method.backbone import build_backbone
from fastcr.presets import cub200, synthetic

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = ["key forward", "query forward", "contrast", "fit", "backward", "optimiser", "EMA", "queue"]
CPU = torch.device("cpu")
TINY = [
    "--data.image_size", "32", "--data.loader", "torch", "--data.workers", "0", "--run.device", "cpu",
    "--optim.batch_size", "8", "--moco.queue_size", "16", "--steps", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of two steps of the synthetic preset: ResNet-18, layer3."""
    folder = tmp_path_factory.mktemp("traces") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "copy_bandwidth", lambda device: 1e10)
        patch.setattr(trace, "matmul_rate", lambda device, dtype: 1e11)
        trace.main([*TINY, "--data.root", str(flat), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "phases.json").read_text())


def test_every_phase_is_there_and_they_add_up(facts: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in facts["phases"]}
    assert list(rows) == ["waiting", *PHASES, "between", "whole step"]
    whole = rows.pop("whole step")
    assert all(row["host_ms"] > 0 and row["device_ms"] > 0 for row in rows.values())
    assert sum(row["host_ms"] for row in rows.values()) == pytest.approx(whole["host_ms"])
    assert sum(row["device_ms"] for row in rows.values()) == pytest.approx(whole["device_ms"])
    assert whole["device_ms"] < whole["host_ms"] == facts["recorded_step_ms"]
    assert sum(row["share"] for row in rows.values()) == pytest.approx(whole["share"]) == pytest.approx(1)
    assert {name for name in PHASES if rows[name]["work"]["bytes"] > 0} == set(PHASES)
    for name in PHASES:
        work = rows[name]["work"]
        least = max(work["bytes"] / 1e10, work["flops"] / 1e11) * 1e3
        assert rows[name]["floor_ms"] == pytest.approx(least)
        assert rows[name]["times_floor"] == pytest.approx(rows[name]["device_ms"] / least)
    assert facts["settings"]["optim"]["batch_size"] == 8


def test_the_kernels_are_the_whole_device_time(facts: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in facts["kernels"]}
    whole = facts["phases"][-1]["device_ms"]
    assert sum(row["device_ms"] for row in rows.values()) == pytest.approx(whole)
    assert rows["aten::convolution_backward"]["calls"] == 15


def test_recorded_convolutions_have_the_work_of_the_budget(folder: Path, facts: dict[str, Any]) -> None:
    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    calls = [event for event in events if event["name"] == "aten::convolution_backward"]
    phases = {row["name"]: row for row in facts["phases"]}
    forward = phases["key forward"]["work"]["flops"] - 2 * 8 * (256 * 256 + 256 * 128)  # without the head
    stem = 2 * 8 * (3 * 7 * 7 * 64) * (16 * 16)  # its images need no gradient
    total = Work.total(recorded_work(call["name"], call["args"]) or Work() for call in calls)
    assert total.flops == 2 * (2 * forward - stem)  # two steps


def test_the_trace_opens_and_names_the_phases(folder: Path) -> None:
    with gzip.open(folder / "trace.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in ("waiting", *PHASES)} == dict.fromkeys(("waiting", *PHASES), 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--nvtx", "--run.device", "cpu"], "--nvtx needs CUDA, and this run is on cpu"),
        (["--target", "90"], "--every and --target go with --resources"),
        (["cub201"], "no preset 'cub201' (did you mean cub200?)"),
        (["cub200"], "preset cub200 needs --data.root, the folder of its images"),
        (["--optim.batch_size", "1"], "--optim.batch_size must be at least 2 (batch normalisation)"),
        (["--resume", "runs/a"], "Unrecognized "),
    ],
)
def test_a_mistake_is_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        trace.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"fastcr.trace: error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_trace_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "phases.json").read_bytes()
    with pytest.raises(SystemExit):
        trace.main([*TINY, "--out", str(folder)])
    assert "already holds a trace.json.gz: name another --out" in capsys.readouterr().err
    assert (folder / "phases.json").read_bytes() == before


MAIN, AUTOGRAD, LOADER, STREAM = 1, 2, 3, 7


def event(cat: str, name: str, tid: int, start: float, end: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": start, "dur": end - start, "args": args}


def tensors(*shapes: list[int]) -> dict[str, Any]:
    strides = [torch.empty(shape).stride() for shape in shapes]
    kinds = ["float"] * len(shapes)
    return {"Input Dims": shapes, "Input Strides": strides, "Input type": kinds, "Concrete Inputs": [""] * len(shapes)}


# one step of a GPU, as PyTorch's profiler writes it: kernels run long after their launches
ON_CUDA = [
    event("user_annotation", "ProfilerStep#1", MAIN, 0, 1000),
    event("user_annotation", "waiting", MAIN, 0, 50),
    event("user_annotation", "query forward", MAIN, 100, 300),
    event("cpu_op", "aten::mm", MAIN, 110, 150, **tensors([64, 32], [32, 16])),
    event("cuda_runtime", "cudaLaunchKernel", MAIN, 120, 125, correlation=1),
    event("cpu_op", "triton_poi_fused_relu_0", MAIN, 160, 180, **tensors([64, 16], [64, 16])),
    event("cuda_driver", "cuLaunchKernelEx", MAIN, 165, 170, correlation=2),
    event("user_annotation", "backward", MAIN, 400, 700),
    event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", AUTOGRAD, 450, 500),
    event("cpu_op", "aten::mm", AUTOGRAD, 455, 490, **tensors([32, 64], [64, 16])),
    event("cuda_runtime", "cudaLaunchKernel", AUTOGRAD, 460, 465, correlation=3),
    event("cuda_runtime", "cudaLaunchKernel", LOADER, 470, 475, correlation=4),
    event("cuda_runtime", "cudaLaunchKernel", MAIN, 800, 805, correlation=5),
    event("kernel", "gemm", STREAM, 500, 510, correlation=1),
    event("kernel", "relu", STREAM, 510, 514, correlation=2),
    event("kernel", "gemm", STREAM, 600, 630, correlation=3),
    event("kernel", "_cut_kernel", STREAM + 1, 600, 700, correlation=4),
    event("gpu_memset", "Memset", STREAM, 810, 811, correlation=5),
    event("gpu_user_annotation", "query forward", STREAM, 500, 514),
]


def test_kernels_belong_to_the_phase_that_launched_them() -> None:
    recorded = take_apart(ON_CUDA, ["waiting", "query forward", "backward"])
    work = {"query forward": Work(2000, 10), "backward": Work(4000, 60000), "": Work(1, 0)}
    rows = {row.name: row for row in phase_rows(recorded, work, graph=False)}
    host = {name: row.host_ms for name, row in rows.items()}
    assert host == {
        "waiting": 0.05,
        "query forward": 0.2,
        "backward": 0.3,
        "load": None,
        "between": 0.45,
        "whole step": 1,
    }
    device = {name: round(row.device_ms, 9) for name, row in rows.items()}
    assert device == {
        "waiting": 0, "query forward": 0.014, "backward": 0.03, "load": 0.1, "between": 0.001, "whole step": 0.145
    }  # fmt: skip
    assert rows["backward"].share == 0.03
    assert [rows[name].floor_ms(Ceilings(1e9, 1e10)) for name in ("query forward", "backward")] == [2e-3, 6e-3]
    assert rows["whole step"].work == Work(6001, 60010)
    assert rows["between"].work is None


def test_in_a_replayed_graph_there_are_no_phases() -> None:
    recorded = take_apart(
        [e for e in ON_CUDA if e["name"] not in ("query forward", "backward")], ["waiting", "backward"]
    )
    rows = {row.name: row for row in phase_rows(recorded, {"backward": Work(4000, 60000)}, graph=True)}
    assert list(rows) == ["waiting", "load", "CUDA graph", "whole step"]
    assert rows["CUDA graph"].work == Work(4000, 60000)


def test_work_of_kernels_is_that_of_their_operators() -> None:
    rows = {row.name: row for row in kernel_rows(take_apart(ON_CUDA, ["query forward", "backward"]))}
    assert list(rows) == ["_cut_kernel", "gemm", "relu", "Memset"]
    assert rows["gemm"].calls == 2
    elements = (64 * 32 + 32 * 16 + 64 * 16) + (32 * 64 + 64 * 16 + 32 * 16)
    assert rows["gemm"].work == Work(4 * elements, 2 * 2 * 64 * 32 * 16)
    assert rows["relu"].work == Work(2 * 4 * 64 * 16)
    assert rows["_cut_kernel"].work is rows["Memset"].work is None


def test_no_rate_is_told_of_work_that_is_not_known() -> None:
    events = [dict(e) for e in ON_CUDA]
    events[9] = event("cpu_op", "aten::_foreach_mul_", AUTOGRAD, 455, 490, **{"Input type": ["TensorList"]})
    rows = {row.name: row for row in kernel_rows(take_apart(events, ["query forward", "backward"]))}
    assert rows["gemm"].work is None  # known for a quarter of its time


def test_recorded_calls_are_counted_on_shapes() -> None:
    pair = tensors([6, 5], [6, 5])
    scalar = {"Input Dims": [], "Input Strides": [], "Input type": "Scalar", "Concrete Inputs": "1"}
    with_alpha = {key: [*values, scalar[key]] for key, values in pair.items()}
    assert recorded_work("aten::add", with_alpha) == Work(3 * 4 * 30)
    expanded = {**tensors([6, 5]), "Input Strides": [[0, 1]]}
    assert recorded_work("aten::relu", expanded) == Work(4 * (5 + 30))
    assert recorded_work("aten::add", {}) is None
    assert recorded_work("aten::no_such_operator", pair) is None


def test_the_budget_of_one_convolution_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).to("meta")
    images, by_output = torch.empty(2, 3, 10, 10, device="meta"), torch.empty(2, 8, 8, 8, device="meta")
    with Count(PASSES | IN_PASSING) as count:
        with record_function("forward"):
            output = net(images)
        with record_function("backward"):
            output.backward(by_output)
    x, w, y, flops = 4 * 2 * 3 * 10 * 10, 4 * 8 * 3 * 9, 4 * 2 * 8 * 8 * 8, 2 * 27 * 2 * 8 * 8 * 8
    assert Work.total(count.phases["forward"]) == Work((x + w + y) + 3 * y, flops)
    assert Work.total(count.phases["backward"]) == Work(5 * y + (y + x + w), flops)  # the images need no gradient


def test_the_budget_of_resnet_50() -> None:
    config = cub200()
    pairs, work = config.optim.batch_size, step_work(config, torch.bfloat16)
    assert [*work] == ["", *PHASES]
    for phase in ("key forward", "query forward"):
        assert work[phase].flops / pairs == pytest.approx(2 * 4.1e9, rel=0.03)
    assert sum(each.flops for each in work.values()) / pairs == pytest.approx(33e9, rel=0.03)
    features = Workload("fit", "forward", pairs, 49, 2048).floor_bytes
    assert features < work["fit"].bytes - 2 * pairs * 49 * 2048 * 2 < 1.3 * features  # common weights: two more reads
    own = step_work(replace(config, rationale=replace(config.rationale, cam_weights="own")), torch.bfloat16)
    assert features < own["fit"].bytes < 1.1 * features
    trained = 23.508e6 + 2048 * 2049 + 2048 * 257 + 256
    assert work["EMA"].bytes == pytest.approx(3 * 4 * trained, rel=1e-3)
    assert work["optimiser"].bytes == pytest.approx(5 * 4 * (trained + 32 * 2049), rel=1e-3)

    written: list[int] = []
    rules = {**PASSES, "aten.convolution": lambda args, out: written.append(size(out)) or 0}
    with Count(rules), torch.no_grad():
        build_backbone("resnet50")[0].to("meta", torch.bfloat16)(torch.empty(1, 3, 224, 224, device="meta").bfloat16())
    assert sum(written) == pytest.approx(2 * 11.1e6, rel=0.03)


def test_without_a_branch_there_is_no_fit() -> None:
    config = synthetic()
    work = step_work(replace(config, rationale=RationaleConfig(enabled=False)), torch.float32)
    assert [*work] == ["", *(phase for phase in PHASES if phase != "fit")]


def test_the_budget_of_parts_and_of_the_released_step() -> None:
    config = synthetic()
    whole = step_work(config, torch.float32)
    halves = step_work(replace(config, optim=replace(config.optim, accumulate=2)), torch.float32)
    assert halves["query forward"].flops == whole["query forward"].flops
    assert [*step_work(replace(config, released=ReleasedConfig(enabled=True)), torch.float16)] == ["", *PHASES]


def test_the_ceilings_are_measured_on_the_cpu_too() -> None:
    assert 1e8 < copy_bandwidth(CPU) < 1e13
    assert 1e8 < matmul_rate(CPU, torch.float32) < 1e14
