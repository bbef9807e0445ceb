"""A training step with BatchNorm's statistics as loaded: folded into the convolutions, and in passes of its own.

On a GPU compiled at 224 px, by the clock on the wall. Without one at 112 px, by the CPU time of one thread, so that
what else the machine does counts little. Both take turns, a step each. FASTCR_BENCH_BATCH (16; EfficientNet-Lite0 has
twice as many) and FASTCR_BENCH_ROUNDS (3) are the CPU's.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench import timing
from bench.baselines import LR, SEED, Built, Setting
from bench.same_maths import agrees, follow, make_batches
from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RunConfig
from fastcr.encoders.folding import unfold_norms
from fastcr.method.build import build
from fastcr.runs.machine import pick_dtype

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BATCH = 128 if GPU else int(os.environ.get("FASTCR_BENCH_BATCH", 16))
ROUNDS = 30 if GPU else int(os.environ.get("FASTCR_BENCH_ROUNDS", 3))
SIDE = 224 if GPU else 112
RESNET = Setting("resnet50", "layer4", SIDE, BATCH, 4096) if GPU else Setting("resnet18", "layer3", SIDE, BATCH, 4096)
LITE = Setting("timm:tf_efficientnet_lite0", "layer4", SIDE, 2 * BATCH, 4096)
FROZEN_STAGES: dict[Setting, Any] = {RESNET: 0, LITE: "half"}


class Measured(NamedTuple):
    """One way: whether it does what the other does, seconds of its steps, bytes kept for the backward pass."""

    correct: bool
    samples: list[float]
    kept_bytes: int | None  # None where the encoder is compiled
    loss: Tensor


def built(setting: Setting, precision: Any, folded: bool) -> Built:
    """The step of `fastcr.train` with frozen BatchNorm."""
    frozen_stages, last_stage = FROZEN_STAGES[setting], setting.last_stage
    config = Config(
        run=RunConfig(seed=SEED, precision=precision),
        data=DataConfig(image_size=setting.image_size),
        model=ModelConfig(
            setting.backbone,
            last_stage,  # type: ignore[arg-type]
            weights="none",
            batchnorm="frozen",
            frozen_stages=frozen_stages,
        ),
        optim=OptimConfig(batch_size=setting.batch, lr=LR),
        moco=MocoConfig(queue_size=setting.queue_size),
    )
    training = build(config, DEVICE, Console(file=io.StringIO()))
    moco, dtype = training.moco, pick_dtype(precision, DEVICE)
    if not folded:
        unfold_norms(moco)
    step = lambda batch: training.step(batch)[0]  # noqa: E731
    return Built(step, moco.backbone, moco.key_backbone, moco.queue, dtype, torch.channels_last)


def kept_bytes(way: Built, images: Tensor) -> int:
    """Of the query encoder's pass, for its backward pass; its parameters, which are there anyway, left out."""
    own = {each.untyped_storage().data_ptr() for each in way.encoder.parameters()}
    kept = dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast(DEVICE.type, dtype=way.dtype, enabled=way.dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = way.encoder(images)
    total = sum(size for place, size in kept.items() if place not in own)
    del features
    return total


def seconds() -> float:
    """The clock that steps are timed by."""
    if GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turn(setting: Setting, precision: str, rounds: int) -> dict[bool, Measured]:
    """Both ways, by whether they fold, built, checked against each other, and timed in turn."""
    ways = {folded: built(setting, precision, folded) for folded in (False, True)}
    batches = make_batches(setting, DEVICE, ways[True], 2)
    paths = {folded: follow(way, batches, 3) for folded, way in ways.items()}
    samples: dict[bool, list[float]] = {folded: [] for folded in ways}
    losses: dict[bool, Tensor] = {}
    for i in range(rounds + 1):
        for folded in (False, True) if i % 2 else (True, False):
            start = seconds()
            losses[folded] = ways[folded].step(batches[i % 2])
            if i:  # the first round warms up
                samples[folded].append(seconds() - start)
    kept = {folded: None if GPU else kept_bytes(way, batches[0].first) for folded, way in ways.items()}
    correct = agrees(paths[True], paths[False])
    return {folded: Measured(correct, samples[folded], kept[folded], losses[folded]) for folded in ways}


@pytest.fixture(scope="module")
def known() -> Iterator[dict[Any, dict[bool, Measured]]]:
    """What `in_turn` found so far; all of it with one thread on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if GPU else 1)
    yield {}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("folded", [False, True], ids=["norms", "folded"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("setting", [RESNET, LITE], ids=["resnet", "lite"])
def test_frozen_step(
    benchmark: Any, request: pytest.FixtureRequest, known: Any, setting: Setting, precision: str, folded: bool
) -> None:
    """The figures are in the report's extra_info."""
    if setting is LITE:
        pytest.importorskip("timm")
    torch.compiler.reset()
    rounds = 1 if request.config.option.benchmark_disable else ROUNDS
    if (setting, precision) not in known:
        known[setting, precision] = in_turn(setting, precision, rounds)
    measured: Measured = known[setting, precision][folded]
    benchmark.pedantic(lambda: None, rounds=1)  # the harness records nothing without a run of its own
    ratios = [a / b for a, b in zip(*(known[setting, precision][each].samples for each in (False, True)), strict=True)]
    benchmark.extra_info |= {
        "frozen_step": "folded" if folded else "norms",
        "setting": setting._asdict() | {"frozen_stages": FROZEN_STAGES[setting], "precision": precision},
        "correct": measured.correct,
        "rounds": len(measured.samples),
        "seconds": timing.summary(measured.samples, "wall" if GPU else "cpu")._asdict(),
        "norms_over_folded": timing.summary(ratios, "wall" if GPU else "cpu")._asdict(),
        "kept_bytes": measured.kept_bytes,
        "loss": measured.loss.item(),
    }
    assert torch.isfinite(measured.loss)
    assert measured.correct, "folded and not, its losses or weights differ"
