"""Choices of the method: learning rates of its parts, what GradCAM explains, common channel weights, the queue."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastcr import train
from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RationaleConfig
from fastcr.data.views import Batch
from fastcr.encoders.backbone import mean_pool
from fastcr.encoders.rationale import RationaleHead, common_cam_weights
from fastcr.kernels.common_weights import common_weights
from fastcr.method.build import Training, build
from fastcr.method.objectives import infonce
from fastcr.method.step import contrast_losses, train_step
from fastcr.runs.context import Context
from tests.shared import SHORT
from tests.shared import TINY as RUN

pytestmark = pytest.mark.usefixtures("one_thread")
INFONCE = partial(infonce, temperature=0.2)
AUTOCAST = torch.autocast("cpu", enabled=False)
TINY = Config(
    data=DataConfig(image_size=32),
    model=ModelConfig(backbone="resnet18", last_stage="layer3", weights="none"),
    optim=OptimConfig(batch_size=8, lr=0.1),
    moco=MocoConfig(queue_size=20, embedding_dim=8),
    rationale=RationaleConfig(detectors=3, cam_of="loss", cam_keeps="match", cam_weights="own"),
)


def batch_of(images: int = 8, seed: int = 0) -> Batch:
    return Batch(*torch.randn(2, images, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


def prepared(**sections: Any) -> Training:
    return build(replace(TINY, **sections), Context())


def moved(training: Training, steps: int = 1) -> dict[str, float]:
    """How far the weights of each part go in some steps."""
    parts = {"backbone": training.moco.backbone, "head": training.moco.head, "branch": training.encoder.branch}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items() if part}
    for seed in range(steps):
        training.step(batch_of(seed=seed))
    return {
        name: max(
            (dict(part.named_parameters())[key] - before[name][key]).abs().max().item()
            for key, _ in part.named_parameters()
        )
        for name, part in parts.items()
        if part
    }


def test_each_part_takes_its_own_learning_rate() -> None:
    plain = moved(prepared())
    tenfold = moved(prepared(rationale=replace(TINY.rationale, lr=1.0)))
    kept = moved(prepared(optim=replace(TINY.optim, backbone_lr=0.0)))
    assert min(plain.values()) > 0
    assert tenfold == pytest.approx({**plain, "branch": 10 * plain["branch"]}, rel=1e-3)
    assert kept == pytest.approx({**plain, "backbone": 0.0}, rel=1e-3)


@pytest.mark.parametrize("variant", ["loss", "plain"])
def test_a_kept_encoder_stays_as_it_was_loaded_and_the_rest_learns_alike(variant: str) -> None:
    kept = replace(TINY, model=replace(TINY.model, batchnorm="frozen"), optim=replace(TINY.optim, backbone_lr=0.0))
    choices = {"enabled": False} if variant == "plain" else {"stop_gradient": False}
    kept = replace(kept, rationale=replace(TINY.rationale, **choices))
    weights = []
    for rate in (0.0, 1e-30):  # the second carries gradients back through the backbone, in vain
        config = replace(kept, optim=replace(kept.optim, backbone_lr=rate, weight_decay=0.0))
        training = build(config, Context())
        before = copy.deepcopy(training.moco.backbone.state_dict())
        moved(training, steps=3)
        torch.testing.assert_close(
            training.moco.backbone.state_dict(), before, rtol=0, atol=1e3 * rate
        )  # biases begin at 0
        assert all((parameter.grad is None) == (rate == 0) for parameter in training.moco.backbone.parameters())
        weights.append(training.model.state_dict())
    torch.testing.assert_close(weights[0], weights[1])


def test_kept_stages_stay_as_they_were_and_cost_no_gradient() -> None:
    training = prepared(model=replace(TINY.model, frozen_stages=1, batchnorm="local"))
    before = copy.deepcopy(training.moco.state_dict())
    moved(training, steps=2)
    for encoder in ("backbone", "key_backbone"):
        for name, value in training.moco.get_submodule(encoder).state_dict().items():
            still = torch.equal(value, before[f"{encoder}.{name}"])
            assert still == (not name.startswith(("layer2", "layer3"))), name
    gradients = {name: each.grad is not None for name, each in training.moco.backbone.named_parameters()}
    assert all(there == name.startswith(("layer2", "layer3")) for name, there in gradients.items())


def test_what_the_head_gets_may_be_pooled_with_the_attention() -> None:
    training = prepared(moco=replace(TINY.moco, pooling="rationale"), rationale=replace(TINY.rationale, lr=1e-9))
    branch, moco = training.encoder.branch, training.moco
    assert isinstance(branch, RationaleHead)
    with torch.no_grad():
        branch.weight.mul_(50)  # far from the mean
    batch = batch_of()
    features = moco.backbone(batch.first)
    pooled, attention = branch.pool(features)
    assert (pooled - mean_pool(features)).abs().max() > 1e-3
    torch.testing.assert_close(training.pool(features), pooled)
    with torch.no_grad():
        expected = F.normalize(moco.key_head(branch.pool(moco.key_backbone(batch.second)).pooled), dim=1)
        torch.testing.assert_close(moco.key(batch.second, AUTOCAST, training.pool), expected)
    # the gradient passes through the features alone, at each position in the share of its attention
    leaf, weight = features.detach().requires_grad_(), torch.randn(features.shape[1])
    (training.pool(leaf) @ weight).sum().backward()
    torch.testing.assert_close(leaf.grad, weight[:, None, None] * attention.detach().view(8, 1, *features.shape[2:]))
    assert branch.weight.grad is None
    assert min(moved(training, steps=2)[part] for part in ("backbone", "head")) > 0


def test_pooling_with_the_attention_needs_a_branch(flat: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = ("--data.root", str(flat), "--run.dir", str(tmp_path / "run"), "--moco.pooling", "rationale")
    assert "needs the rationale branch" in refused(train.main, *folder, "--rationale.enabled", "False")
    assert "cam_weights common" in refused(
        train.main, *folder, "--rationale.cam_of", "loss", "--rationale.cam_weights", "own"
    )


def test_all_rates_fall_along_the_cosine_and_may_change_at_a_resume(flat: Path, tmp_path: Path) -> None:
    folder, own = tmp_path / "run", ["--optim.lr", "0.1", "--optim.backbone_lr", "0.01", "--rationale.lr", "0.5"]
    where = ["--data.root", str(flat), "--run.dir", str(folder)]
    train.main(["synthetic", *RUN, *SHORT, *own, *where, "--optim.epochs", "2", "--run.steps", "9"])

    def settings() -> list[tuple[float, float]]:
        groups = torch.load(folder / "resume.pt", weights_only=True)["optimizer"]["param_groups"]
        return [(group["lr"].item(), group["weight_decay"]) for group in groups]

    factor = (1 + math.cos(math.pi * 8 / 16)) / 2
    assert settings() == [(pytest.approx(rate * factor), 1e-4) for rate in (0.01, 0.1, 0.5)]
    changed = ["--rationale.lr", "0.2", "--optim.backbone_lr", "0.02", "--optim.weight_decay", "0.5"]
    train.main(["--resume", str(folder), "--run.steps", "10", *changed])
    factor = (1 + math.cos(math.pi * 9 / 16)) / 2
    assert settings() == [(pytest.approx(rate * factor), 0.5) for rate in (0.02, 0.1, 0.2)]


@pytest.mark.parametrize("cam_keeps", ["match", "mismatch"])
def test_common_cam_weights_are_what_all_gradcams_pick(cam_keeps: Any) -> None:
    torch.manual_seed(0)
    features, gradient = torch.rand(6, 10, 3, 4), 1e-9 * torch.randn(6, 10)
    found = common_cam_weights(features, gradient, cam_keeps)
    sign = 1 if cam_keeps == "mismatch" else -1
    expected = sign * common_weights(features, gradient, cam_keeps=cam_keeps)
    torch.testing.assert_close(found, expected.expand(6, 10), rtol=0, atol=0)
    # the fit keeps the places they speak for, of either half
    head = RationaleHead(10, detectors=2, cam_keeps=cam_keeps, cam_weights="common", target="sum")
    slope = (sign * torch.einsum("bchw,c->bhw", features, found[0])).flatten(1).clamp_min(0)
    torch.testing.assert_close(head.fit(features, gradient).target, slope / slope.sum(1, keepdim=True))


def test_without_any_gradcam_the_common_weights_are_nothing_and_the_target_flat() -> None:
    head = RationaleHead(5, detectors=2, cam_keeps="match", cam_weights="common")
    fit = head.fit(torch.rand(3, 5, 2, 2), torch.ones(3, 5))
    torch.testing.assert_close(fit.target, torch.full((3, 4), 0.25))
    assert fit.divergence.isfinite().all()


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("nobody asked for it")


@pytest.mark.parametrize(
    ("cam_of", "cam_weights", "pooling"),
    [
        ("loss", "own", "mean"),
        ("similarity", "common", "rationale"),
    ],
)
def test_a_branch_that_is_not_fitted_costs_no_gradcam_and_changes_no_gradient(
    cam_of: Any, cam_weights: Any, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = {"fit_weight": 0.0, "cam_of": cam_of, "cam_weights": cam_weights}
    sections = {"rationale": replace(TINY.rationale, **choices), "moco": replace(TINY.moco, pooling=pooling)}
    gradients, losses = [], []
    for computed in (True, False):
        training = prepared(**sections)
        branch, parameters = training.encoder.branch, dict(training.model.named_parameters())
        assert isinstance(branch, RationaleHead)
        before = copy.deepcopy(branch.state_dict())
        if computed:  # with no weight
            branch.requires_grad_(True)
            loss, _ = train_step(
                training.moco,
                partial(contrast_losses, branch=branch, objective=INFONCE, cam_of=cam_of, pool=training.pool),
                training.optimizer,
                batch_of(),
                fit_weight=0.0,
                key_momentum=0.9,
                autocast=AUTOCAST,
            )
            assert branch.weight.grad is not None
        else:
            for name in ("mismatch_gradient", "RationaleHead.fit"):
                monkeypatch.setattr(f"fastcr.method.step.{name}", refuse)
            loss, parts = training.step(batch_of())
            assert (parts.fit, parts.attention) == (None, None)
            torch.testing.assert_close(branch.state_dict(), before, rtol=0, atol=0)  # no weight decay
        losses.append(loss)
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()})
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert gradients[1]["moco.backbone.conv1.weight"].any()


def test_without_a_queue_the_negatives_are_the_other_keys_of_the_batch() -> None:
    training = prepared(moco=replace(TINY.moco, queue_size=0))
    moco, batch = training.moco, batch_of()
    before = copy.deepcopy(moco)
    _, losses = training.step(batch)
    query = before.query(mean_pool(before.backbone(batch.first)))
    key = F.normalize(before.key_head(mean_pool(before.key_backbone(batch.second))), dim=1)
    expected = F.cross_entropy(query @ key.T / 0.2, torch.arange(len(query)))
    torch.testing.assert_close(losses.contrast, expected)
    assert moco.queue.shape == (0, 8)
    assert moco.queue_position == 0
    training.step(batch)  # and goes on
    images = F.normalize(torch.rand(12, 8), dim=1)
    assert infonce(images[4:8], moco.keys(images[4:8]), temperature=1e-3).loss.max() < 1e-3
