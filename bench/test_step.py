"""One whole training step on views that are already there: ours beside the other ways of `baselines.py`.

On a GPU: ResNet-50 at 224 px, each way on its own, CUDA events around every step. Without one: ResNet-18 up to layer3
at 112 px, the ways in turn, one step each, so that whatever else the machine does hits all alike; ways that compile
only with FASTCR_BENCH_COMPILE=1. FASTCR_BENCH_BATCH (16) and FASTCR_BENCH_ROUNDS (3) are the CPU's.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import timing
from bench.baselines import PAPER, WAYS, Setting, Way
from bench.same_maths import Trajectory, agrees, follow, make_batches
from fastcr.data.views import Batch
from fastcr.encoders.backbone import build_backbone, freeze_stages

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BATCHES = (256, 128, 512) if GPU else (int(os.environ.get("FASTCR_BENCH_BATCH", 16)),)
ROUNDS = 30 if GPU else int(os.environ.get("FASTCR_BENCH_ROUNDS", 3))
CHECKED = 6 if GPU else 3  # steps compared with the plain maths; a CUDA graph is captured in the fourth
ROTATED = 4  # batches of images


def setting(batch: int) -> Setting:
    """What is trained here."""
    return Setting("resnet50", "layer4", 224, batch, 4096) if GPU else Setting("resnet18", "layer3", 112, batch, 4096)


def name(way: str) -> str:
    """The way's id: whatever compiles says so."""
    return way + "-compiled" * WAYS[way].compiled(DEVICE)


def reason_to_skip(way: str) -> str | None:
    """Why a way cannot run here, if so."""
    if WAYS[way].needs_cuda and not GPU:
        return "needs CUDA"
    if way.startswith("lightly") and not find_spec("lightly"):
        return "lightly is not installed: pip install 'fastcr[peers]'"
    if WAYS[way].compiled(DEVICE) and not GPU and os.environ.get("FASTCR_BENCH_COMPILE") != "1":
        return "compiling takes minutes on a CPU: FASTCR_BENCH_COMPILE=1 does it"
    return None


class Measured:
    """A way that was built and checked, and the seconds of its steps."""

    def __init__(self, way: Way, batch: int, plain: Trajectory) -> None:
        torch.compiler.reset()
        self.graph = bool(way.options.get("cuda_graph"))
        self.built = way.build(setting(batch), DEVICE, **way.options)
        batches = make_batches(setting(batch), DEVICE, self.built, ROTATED)
        self.spare_bytes = (ROTATED - 1) * sum(
            each.nbytes for each in batches[0].tensors()
        )  # for the rotation's sake only
        self.batches: Iterator[Batch] = itertools.cycle(batches)
        self.correct = agrees(follow(self.built, batches, CHECKED), plain)
        self.samples: list[float] = []
        self.loss: torch.Tensor

    def __call__(self) -> None:
        """One step on the next batch."""
        self.loss = self.built.step(next(self.batches))


def plain_run(way: Way, batch: int, known: dict[str, Trajectory]) -> Trajectory:
    """Where the same maths in eager fp32 goes; run once for several ways."""
    key = f"{way.plain.__name__} {way.plain_options} {batch}"
    if key not in known:
        built = way.plain(setting(batch), DEVICE, **way.plain_options)
        known[key] = follow(built, make_batches(setting(batch), DEVICE, built, ROTATED), CHECKED)
    return known[key]


def encoder_flops(way: Way, batch: int) -> int:
    """FLOP of the encoders' convolutions in one step: both forward passes, and the backward of what is trained."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        recipe = way.options.get("recipe", PAPER)
        encoder, _ = build_backbone(setting(batch).backbone, setting(batch).last_stage)
        freeze_stages(encoder, recipe.model.frozen_stages)
        features = encoder(torch.empty(1, 3, setting(batch).image_size, setting(batch).image_size))
        forward = counter.get_total_flops()
        features.sum().backward()
    of_keys = forward * float(recipe.views.key_scale) ** 2
    return round((counter.get_total_flops() + of_keys) * batch)


def free_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


def time_on_gpu(measured: Measured) -> int:
    """Seconds between events around each step, into `samples`; returns the most bytes held at once, with one batch."""
    free_memory()
    for _ in range(3):  # cuDNN chose its algorithms before, in the checked steps
        measured()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        measured()
        mark.record()
    torch.cuda.synchronize()
    measured.samples = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    # what a graph works in counts as reserved only
    peak = torch.cuda.max_memory_reserved() if measured.graph else torch.cuda.max_memory_allocated()
    return peak - measured.spare_bytes


def time_in_turn(ways: Sequence[Measured], rounds: int) -> None:
    """Seconds of each step by the wall clock, into `samples`: the ways take turns, in an order that rotates."""
    for i in range(rounds + 1):
        for measured in [*ways[i % len(ways) :], *ways[: i % len(ways)]]:
            start = time.perf_counter()
            measured()
            if i:  # the first round warms up
                measured.samples.append(time.perf_counter() - start)


@pytest.fixture(scope="session")
def plain_runs() -> dict[str, Trajectory]:
    """What `plain_run` found so far."""
    return {}


@pytest.fixture(scope="session")
def in_turn(request: pytest.FixtureRequest, plain_runs: dict[str, Trajectory]) -> dict[str, Measured]:
    """On the CPU: every way the session asks for, built, checked and timed in turn with the others."""
    asked = [item.callspec.params["way"] for item in request.session.items if hasattr(item, "callspec")
             and "way" in item.callspec.params and item.callspec.params["way"] in WAYS]  # fmt: skip
    ways = {
        way: Measured(WAYS[way], BATCHES[0], plain_run(WAYS[way], BATCHES[0], plain_runs))
        for way in dict.fromkeys(asked)
        if not reason_to_skip(way)
    }
    time_in_turn(list(ways.values()), 1 if request.config.option.benchmark_disable else ROUNDS)
    return ways


@pytest.fixture
def autotuned() -> Iterator[None]:
    """Let cuDNN choose its fastest algorithms, for all ways alike, and leave the GPU's memory empty."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before
    free_memory()


@pytest.mark.usefixtures("autotuned")
@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize("batch", BATCHES, ids="B{}".format)  # every way at the first one before the others
def test_step(benchmark: Any, request: pytest.FixtureRequest, copy_rate: float | None, way: str, batch: int) -> None:
    """The figures are in the report's extra_info; red where a way does not follow the plain maths."""
    if reason := reason_to_skip(way):
        pytest.skip(reason)
    measured: Measured | None
    peak = None
    if GPU:
        try:
            measured = Measured(WAYS[way], batch, plain_run(WAYS[way], batch, request.getfixturevalue("plain_runs")))
            peak = time_on_gpu(measured)
        except torch.cuda.OutOfMemoryError:
            measured = None  # and not skipped here: the exception would hold on to what filled the memory
        if measured is None:
            pytest.skip(f"{way} at batch {batch}: out of GPU memory")
    else:
        measured = request.getfixturevalue("in_turn")[way]
    benchmark.pedantic(measured, rounds=1)  # the harness records nothing without a run of its own
    loss = measured.loss.item()
    seconds = timing.summary(measured.samples, "events" if GPU else "wall")
    benchmark.extra_info |= {
        "step": way,
        "setting": setting(batch)._asdict(),
        "compiled": WAYS[way].compiled(DEVICE),
        "correct": measured.correct,
        "rounds": len(measured.samples),
        "seconds": seconds._asdict(),
        "images_per_second": batch / seconds.median,
        "peak_bytes": peak,
        "flops": encoder_flops(WAYS[way], batch),
        "matmul_flops_per_second": request.getfixturevalue("product_rate"),
        "copy_bytes_per_second": copy_rate,
        "loss": loss,
    }
    assert torch.isfinite(measured.loss)
    assert measured.correct, "its losses or its weights are not those of the same maths in eager fp32"
