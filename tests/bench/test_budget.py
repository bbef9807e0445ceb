"""The least work of a training step, against work counted by hand and the published figures of ResNet-50."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from bench.budget import IN_PASSING, PASSES, Ceilings, Count, Work, floors, size, step_work
from bench.timing import copy_bandwidth, matmul_rate
from bench.workloads import Workload
from fastcr.config import Config, RationaleConfig, ReleasedConfig
from fastcr.encoders.backbone import build_backbone
from fastcr.presets import synthetic

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = ["key forward", "query forward", "contrast", "fit", "backward", "optimiser", "EMA", "queue"]
CPU = torch.device("cpu")


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
    config = Config()  # MoCo v2 with the branch: every layer trained, the head of two layers
    pairs, work = config.optim.batch_size, step_work(config, torch.bfloat16)
    assert [*work] == ["", *PHASES]
    for phase in ("key forward", "query forward"):
        assert work[phase].flops / pairs == pytest.approx(2 * 4.1e9, rel=0.03)
    assert sum(each.flops for each in work.values()) / pairs == pytest.approx(33e9, rel=0.03)
    features = Workload("fit", "forward", pairs, 49, 2048).floor_bytes
    assert features < work["fit"].bytes - features < 1.2 * features  # common weights: one more read
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


def test_a_floor_is_the_longer_of_bytes_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.budget.copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("bench.budget.matmul_rate", lambda device, dtype: 1e10)
    assert [Work(2000, 10).floor(Ceilings(1e9, 1e10)), Work(4000, 60000).floor(Ceilings(1e9, 1e10))] == [2e-6, 6e-6]
    work = step_work(synthetic(), torch.float32)
    rates, found = floors(synthetic(), CPU, torch.float32)
    assert [*rates.values()] == [1e9, 1e10]
    assert [*found] == [*PHASES, "whole step"]
    assert found["fit"]["floor_ms"] == pytest.approx(work["fit"].floor(Ceilings(1e9, 1e10)) * 1e3)
    whole = Work.total(work.values())
    assert (found["whole step"]["GB"], found["whole step"]["GFLOP"]) == (whole.bytes / 1e9, whole.flops / 1e9)
