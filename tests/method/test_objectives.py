"""What queries are trained to be: values against plain loops in fp64, gradients, and a whole step with each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RationaleConfig
from fastcr.data.views import Batch
from fastcr.encoders.backbone import mean_pool
from fastcr.kernels.relational import relational
from fastcr.method import objectives
from fastcr.method.build import Training, build
from fastcr.method.objectives import Keys, build_objective
from fastcr.runs.context import Context

OBJECTIVES = ("infonce", "relational")
SMALL = Config(
    data=DataConfig(image_size=32),
    model=ModelConfig(backbone="resnet18", last_stage="layer3", weights="none", batchnorm="frozen"),
    optim=OptimConfig(batch_size=8, lr=0.01),
    moco=MocoConfig(queue_size=24, embedding_dim=8),
    rationale=RationaleConfig(detectors=3),
)


def unit(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=-1)


def prepared(objective: Any, **sections: Any) -> Training:
    moco = replace(SMALL.moco, objective=objective, **sections.pop("moco", {}))
    return build(replace(SMALL, moco=moco, **sections), Context())


def batch_of(seed: int = 0, images: range | None = range(8)) -> Batch:
    views = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Batch(*views, None if images is None else torch.tensor(images))


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def test_relational_is_the_op_with_the_temperatures_and_images_of_the_settings() -> None:
    query, own, queue, images = unit(4, 6), unit(4, 6, seed=1), unit(10, 6, seed=2), torch.arange(4)
    settings = MocoConfig(objective="relational", temperature=0.3, key_temperature=0.05)
    found = build_objective(settings)(query, Keys(own, own, queue, 0, images, torch.arange(10)))
    expected = relational(
        query, own, queue, temperature=0.3, key_temperature=0.05, images=images, queue_images=torch.arange(10)
    )
    torch.testing.assert_close(tuple(found), tuple(expected))


def test_infonce_compares_with_all_processes_keys_where_there_is_no_queue() -> None:
    query, everyones = unit(3, 6), unit(9, 6, seed=1)
    keys = Keys(everyones[3:6], everyones, torch.empty(0, 6, dtype=torch.float64), first=3)
    found = build_objective(MocoConfig(temperature=0.5))(query, keys)
    for row in range(3):
        probabilities = softmax([float(query[row] @ key) / 0.5 for key in everyones])
        assert float(found.loss[row]) == pytest.approx(-math.log(probabilities[3 + row]), rel=1e-9)
    assert found.positive is keys.own


@pytest.mark.parametrize("cam_of", ["similarity", "loss"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_trains_every_part_and_gradcam_is_of_what_the_table_says(objective: Any, cam_of: Any) -> None:
    rationale = replace(SMALL.rationale, cam_of=cam_of, cam_weights="own")
    training = prepared(objective, rationale=rationale)
    moco, branch, batch = training.moco, training.encoder.branch, batch_of(images=None)
    assert branch is not None

    with torch.no_grad():
        pooled = mean_pool(moco.backbone(batch.first))
        keys = moco.keys(moco.key(batch.second, torch.autocast("cpu", enabled=False)))
    pooled.requires_grad_()
    projected = moco.head(pooled)
    compared = build_objective(replace(SMALL.moco, objective=objective))(F.normalize(projected, dim=1), keys)
    of = compared.loss if cam_of == "loss" else -(projected * compared.positive).sum(1)
    (gradient,) = torch.autograd.grad(of.sum(), pooled)
    features = moco.backbone(batch.first).detach()
    expected = branch.fit(features, gradient).divergence.mean()  # type: ignore[operator,union-attr]

    before = {name: value.clone() for name, value in training.model.named_parameters()}
    _, losses = training.step(batch)
    torch.testing.assert_close(losses.fit, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.contrast, compared.loss.mean().detach(), rtol=1e-4, atol=1e-5)
    for part in ("moco.backbone.", "moco.head.", "branch."):
        assert any((value != before[name]).any() for name, value in training.model.named_parameters()
                   if name.startswith(part)), part  # fmt: skip


@pytest.mark.parametrize(("objective", "op"), [("infonce", "info_nce"), ("relational", "relational_op.relational")])
def test_queries_and_keys_meet_a_queue_of_16_bits_in_16_bits(
    objective: Any, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the kernels would multiply in fp32, without tensor cores."""
    place, name = (objectives.relational_op, "relational") if "." in op else (objectives, op)
    original, seen = getattr(place, name), list[torch.dtype]()

    def watched(query: Tensor, key: Tensor, queue: Tensor, **options: Any) -> Any:
        seen.extend(each.dtype for each in (query, key, queue))
        return original(query, key, queue, **options)

    monkeypatch.setattr(place, name, watched)
    moco = replace(SMALL.moco, objective=objective)
    training = build(replace(SMALL, moco=moco), Context(dtype=torch.bfloat16))
    loss, _ = training.step(batch_of())
    assert loss.isfinite()
    assert set(seen) == {torch.bfloat16}


def test_the_queue_keeps_images_with_their_keys_until_they_leave_it() -> None:
    training = prepared("relational")
    training.moco.enqueue(F.normalize(torch.randn(24, training.moco.queue.shape[1]), dim=1), torch.arange(100, 124))
    training.step(batch_of())
    training.step(batch_of(images=None))
    assert training.moco.queue_images.tolist() == [*range(8), *[-1] * 8, *range(116, 124)]


def test_adamw_takes_the_steps_of_torchs_own() -> None:
    rates = OptimConfig(batch_size=8, optimizer="adamw", lr=1e-3, backbone_lr=1e-4, weight_decay=0.1)
    training = prepared("infonce", optim=rates, rationale=replace(SMALL.rationale, lr=1e-1))
    assert training.rates == [1e-4, 1e-3, 1e-1]
    parts = [training.moco.backbone, training.moco.head, training.encoder.branch]
    copies = [[p.detach().clone().requires_grad_() for p in part.parameters()] for part in parts if part]
    groups = [{"params": copy, "lr": rate} for copy, rate in zip(copies, training.rates, strict=True)]
    oracle = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.1)
    for seed in range(3):
        training.step(batch_of(seed=seed))
        for part, copy in zip(parts, copies, strict=True):
            assert part is not None
            for own, theirs in zip(part.parameters(), copy, strict=True):
                theirs.grad = own.grad
        oracle.step()
        for part, copy in zip(parts, copies, strict=True):
            assert part is not None
            torch.testing.assert_close(list(part.parameters()), copy, rtol=1e-5, atol=1e-6)
