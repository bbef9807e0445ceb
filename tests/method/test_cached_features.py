"""Training from the features of a kept backbone, which were made once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcr import train
from fastcr.method import cached_features
from tests.shared import PLAIN

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = "--data.image_size 32 --data.workers 0 --run.device cpu --run.precision fp32 --optim.batch_size 12"
KEPT = "--optim.backbone_lr 0 --model.batchnorm frozen --moco.queue_size 20 --moco.embedding_dim 8 --run.log_every 1"
RUN = [*PLAIN, *SIZES.split(), *KEPT.split(), "--rationale.detectors", "3", "--optim.epochs", "3"]


@pytest.fixture
def trained(flat: Path, tmp_path: Path) -> Callable[..., Tensor]:
    """Trains, and returns what was logged of each step: two losses."""

    def run(name: str, *more: str) -> Tensor:
        folder = tmp_path / name
        if "--resume" not in more:
            more = (*RUN, "--data.root", str(flat), "--run.dir", str(folder), *more)
        train.main(["synthetic", *more] if "--resume" not in more else [*more])
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return torch.tensor([[record["contrast_loss"], record["fit_loss"]] for record in records])

    return run


@pytest.mark.parametrize("more", [(), ("--moco.objective", "relational", "--moco.pooling", "rationale")])
@pytest.mark.parametrize("loader", ["fused", "torch"])
def test_with_a_pair_for_each_epoch_the_losses_are_those_without_a_cache(
    loader: str, more: tuple[str, ...], trained: Callable[..., Tensor], tmp_path: Path
) -> None:
    more = ("--data.loader", loader, *more, "--moco.neighbours", "1")
    fresh = trained("fresh", *more)
    # one pair more: the queue of `relational` is filled with views of the epoch after the last
    cached, single = (trained(pairs, *more, "--optim.cached_views", pairs) for pairs in "41")
    assert len(fresh) > 3
    torch.testing.assert_close(cached, fresh, atol=2e-3, rtol=0)
    assert (single - fresh).abs().max() > 0.01
    weights = [torch.load(tmp_path / name / "resume.pt", weights_only=True)["model"] for name in ("fresh", "4")]
    torch.testing.assert_close(weights[0]["moco.backbone.conv1.weight"], weights[1]["moco.backbone.conv1.weight"])


def test_a_resumed_run_makes_the_features_anew(trained: Callable[..., Tensor], tmp_path: Path) -> None:
    whole = trained("whole", "--optim.cached_views", "2")
    trained("parts", "--optim.cached_views", "2", "--run.steps", "4")
    resumed = trained("parts", "--resume", str(tmp_path / "parts"), "--run.steps", str(len(whole)))
    assert torch.equal(resumed, whole)


def test_what_a_cache_of_features_cannot_do(
    flat: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*RUN, "--data.root", str(flat), "--run.dir", str(tmp_path / "run"), "--optim.cached_views", "2"]
    for wrong in (("--optim.backbone_lr", "0.1"), ("--model.batchnorm", "local")):
        assert "needs a backbone that stays as it is" in refused(train.main, "synthetic", *run, *wrong)
    monkeypatch.setattr(cached_features, "free_memory", lambda: 1000)
    assert "GiB of memory, and 0.00 are free" in refused(train.main, "synthetic", *run)
