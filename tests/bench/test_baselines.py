"""The ways that stand beside ours in the benchmarks do what they say, on pictures of 32 px."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench import baselines, same_maths
from bench.baselines import PAPER, WAYS, Built, Released, Setting, ours
from bench.same_maths import Trajectory, agrees, fill_residual_scales, follow
from fastcr.config import Config, MocoConfig, ModelConfig, OptimConfig, RunConfig
from fastcr.data.views import Batch
from fastcr.kernels.info_nce import info_nce
from fastcr.method.build import build

CPU = torch.device("cpu")
TINY = Setting("resnet18", "layer2", 32, 4, 16)  # up to layer2
RUN_HERE = [way for way in WAYS if not WAYS[way].needs_cuda and not WAYS[way].compiled(CPU)]
pytestmark = pytest.mark.usefixtures("one_thread")


def built(way: str, **options: object) -> Built:
    if way.startswith("lightly"):
        pytest.importorskip("lightly", reason="lightly is not installed")
    return WAYS[way].build(TINY, CPU, **WAYS[way].options | options)


def plain(way: str) -> Built:
    return WAYS[way].plain(TINY, CPU, **WAYS[way].plain_options)


def batches(of: Built, count: int = 2) -> list[Batch]:
    return same_maths.make_batches(TINY, CPU, of, count)


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


@pytest.mark.parametrize("way", RUN_HERE)
def test_a_way_goes_where_the_same_maths_in_eager_fp32_goes(way: str) -> None:
    """Ours is the plain maths of the peers too: they begin with the same weights and queue."""
    mine, reference = built(way), plain(way)
    got, expected = follow(mine, batches(mine), 4), follow(reference, batches(reference), 4)
    assert got.losses == pytest.approx(expected.losses, rel=1e-4)
    assert F.cosine_similarity(got.moved, expected.moved, dim=0) > 0.999
    assert agrees(got, expected)


@pytest.mark.parametrize("way", RUN_HERE)
def test_losses_of_a_way_are_finite_and_fall_on_the_same_pictures(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "LR", 0.003)
    monkeypatch.setitem(baselines.SGD, "lr", 0.003)
    mine = built(way)
    first = batches(mine, 1)[0]
    queue = None if mine.queue is None else mine.queue.clone()
    losses = []
    for _ in range(12):
        losses.append(mine.step(first).item())
        if mine.queue is not None and queue is not None:
            mine.queue.copy_(queue)  # else the pictures would become their own negatives
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("way", [way for way in RUN_HERE if way != "supervised"])
def test_the_key_encoder_follows_by_the_momentum_and_the_queue_takes_the_keys(way: str) -> None:
    mine = built(way)
    assert mine.key_encoder is not None
    assert mine.queue is not None
    with torch.no_grad():
        for parameter in (each for each in mine.encoder.parameters() if each.requires_grad):
            parameter += 1  # far apart, so that a step of SGD hardly matters
    before, query, queue = flat(mine.key_encoder), flat(mine.encoder), mine.queue.clone()
    mine.step(batches(mine)[0])
    moved = flat(mine.key_encoder) - before
    share = 1 - WAYS[way].options.get("recipe", PAPER).moco.key_momentum
    torch.testing.assert_close(moved, share * (query - before), rtol=0.02, atol=1e-5)
    changed = (mine.queue != queue).any(dim=1)
    assert changed.tolist() == [True] * TINY.batch + [False] * (TINY.queue_size - TINY.batch)
    torch.testing.assert_close(mine.queue.norm(dim=1), torch.ones(TINY.queue_size))


def test_the_released_contrast_is_info_nce() -> None:
    model = Released(TINY)
    query, key, queue = (F.normalize(torch.randn(n, 256), dim=1) for n in (4, 4, 16))
    expected = info_nce(query, key, queue, temperature=0.2).mean()
    torch.testing.assert_close(model.contrast(query, key, queue), expected, rtol=1e-5, atol=1e-5)


def test_the_released_way_runs_its_branch_three_times_and_trains_no_masked_head() -> None:
    model = Released(TINY)
    batch = Batch(*torch.randn(2, 4, 3, 32, 32))
    model.losses(batch).backward()
    assert model.norm.num_batches_tracked == 3
    assert model.conv.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.masked_head.parameters())
    assert not torch.equal(model.masked_queue[:4], model.queue[:4])


def test_ours_is_the_step_that_training_prepares() -> None:
    mine = ours(TINY, CPU, compile=False, kernels="torch", precision="fp32")
    batch = batches(mine)[0]
    config = Config(
        run=RunConfig(compile=False, kernels="torch", precision="fp32"),
        model=replace(ModelConfig(weights="none", backbone="resnet18"), last_stage=TINY.last_stage),
        optim=OptimConfig(batch_size=4, lr=baselines.LR),
        moco=MocoConfig(queue_size=16),
    )
    step = build(config, CPU, Console(file=io.StringIO())).step
    for _ in range(2):
        assert mine.step(batch) == step(batch)[0]


def wrong_ways() -> dict[str, Callable[[Built, Batch], Tensor]]:
    """Steps that are nearly right: keys of other pictures, views exchanged, the first batch again and again."""

    def shuffled(mine: Built, batch: Batch) -> Tensor:
        return mine.step(Batch(batch.first, batch.second.flip(0)))

    def reversed_views(mine: Built, batch: Batch) -> Tensor:
        return mine.step(Batch(batch.second, batch.first))

    def stale(mine: Built, batch: Batch) -> Tensor:  # a graph whose inputs were never written
        return mine.step(batches(mine)[0])

    return {"shuffled": shuffled, "reversed": reversed_views, "stale": stale}


@pytest.mark.parametrize("wrong", wrong_ways())
def test_a_way_that_does_something_else_is_found_out(wrong: str) -> None:
    reference, mine = plain("ours"), built("ours")
    expected = follow(reference, batches(reference), 4)
    step = wrong_ways()[wrong]
    got = follow(mine._replace(step=lambda batch: step(mine, batch)), batches(mine), 4)
    assert not agrees(got, expected)


def test_losses_that_are_no_numbers_agree_with_nothing() -> None:
    moved = torch.ones(3).double()
    assert agrees(Trajectory([1.0], moved), Trajectory([1.01], moved))
    assert not agrees(Trajectory([float("nan")], moved), Trajectory([1.0], moved))
    assert not agrees(Trajectory([1.0], moved), Trajectory([float("nan")], moved))
    assert not agrees(Trajectory([1.0], -moved), Trajectory([1.0], moved))


def test_residual_scales_come_back() -> None:
    mine = built("ours")
    before = flat(mine.encoder)
    follow(mine, batches(mine), 0)
    assert torch.equal(flat(mine.encoder), before)
    fill_residual_scales(mine, 0.0)
    assert not torch.equal(flat(mine.encoder), before)
