"""The ways that stand beside ours in the benchmarks do what they say, on pictures of 32 px."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench import same_maths
from bench.baselines import EAGER, LR, PAPER, WAYS, Built, Released, Setting, ours
from bench.same_maths import agrees, follow
from fastcr.config import Config, MocoConfig, ModelConfig, OptimConfig, RunConfig
from fastcr.data.views import Batch
from fastcr.method.build import build
from fastcr.runs.context import Context

CPU = torch.device("cpu")
TINY = Setting("resnet18", "layer2", 32, 4, 16)
RUN_HERE = [way for way in WAYS if not WAYS[way].needs_cuda and not WAYS[way].compiled(CPU)]
pytestmark = pytest.mark.usefixtures("one_thread")


def built(way: str) -> Built:
    if way.startswith("lightly"):
        pytest.importorskip("lightly", reason="lightly is not installed")
    return WAYS[way].build(TINY, CPU, **WAYS[way].options)


def plain(way: str) -> Built:
    return WAYS[way].plain(TINY, CPU, **WAYS[way].plain_options)


def batches(of: Built, count: int = 2) -> list[Batch]:
    return same_maths.make_batches(TINY, CPU, of, count)


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


@pytest.mark.parametrize("way", RUN_HERE)
def test_a_way_goes_where_the_same_maths_in_eager_fp32_goes(way: str) -> None:
    """Ours is the plain maths of lightly's way too: both begin with the same weights and queue."""
    mine, reference = built(way), plain(way)
    got, expected = follow(mine, batches(mine), 4), follow(reference, batches(reference), 4)
    assert got.losses == pytest.approx(expected.losses, rel=1e-4)
    assert F.cosine_similarity(got.moved, expected.moved, dim=0) > 0.999
    assert agrees(got, expected)


@pytest.mark.parametrize("way", RUN_HERE)
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


def test_the_released_way_runs_its_branch_three_times_and_trains_no_masked_head() -> None:
    model = Released(TINY)
    model.losses(Batch(*torch.randn(2, 4, 3, 32, 32))).backward()
    assert model.norm.num_batches_tracked == 3
    assert model.conv.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.masked_head.parameters())
    assert not torch.equal(model.masked_queue[:4], model.queue[:4])


def test_ours_is_the_step_that_training_prepares() -> None:
    mine = ours(TINY, CPU, **EAGER)
    batch = batches(mine)[0]
    config = Config(
        run=RunConfig(**EAGER),
        model=ModelConfig("resnet18", TINY.last_stage, weights="none"),
        optim=OptimConfig(batch_size=4, lr=LR),
        moco=MocoConfig(queue_size=16, embedding_dim=256),
    )
    step = build(config, Context(console=Console(quiet=True))).step
    for _ in range(2):
        assert mine.step(batch) == step(batch)[0]


@pytest.mark.parametrize("wrong", ["keys of other pictures", "views exchanged", "the first batch again and again"])
def test_a_way_that_does_something_else_is_found_out(wrong: str) -> None:
    reference, mine = plain("ours"), built("ours")
    expected = follow(reference, batches(reference), 4)
    first = batches(mine)[0]
    changed = {
        "keys of other pictures": lambda batch: Batch(batch.first, batch.second.flip(0)),
        "views exchanged": lambda batch: Batch(batch.second, batch.first),
        "the first batch again and again": lambda batch: first,
    }[wrong]
    got = follow(mine._replace(step=lambda batch: mine.step(changed(batch))), batches(mine), 4)
    assert not agrees(got, expected)
