"""A backbone that is held or kept: it encodes both views, without a graph, and the losses of a whole step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RationaleConfig, ReleasedConfig
from fastcr.data.views import Batch
from fastcr.method.build import Schedule, Training, build

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = Config(
    data=DataConfig(image_size=32),
    model=ModelConfig("resnet18", "layer3", weights="none", batchnorm="frozen"),
    optim=OptimConfig(batch_size=8, lr=0.1),
    moco=MocoConfig(queue_size=20, embedding_dim=8),
    rationale=RationaleConfig(detectors=3),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "similarity": {},
    "loss": {"rationale": replace(TINY.rationale, cam_of="loss", cam_weights="own", stop_gradient=False)},
    "attention": {"moco": replace(TINY.moco, pooling="rationale", objective="relational")},
    "byol": {"moco": replace(TINY.moco, objective="byol")},
    "released": {"released": ReleasedConfig(enabled=True)},
    "plain": {"rationale": replace(TINY.rationale, enabled=False)},
    "in parts": {"optim": replace(TINY.optim, accumulate=2)},
}


def batch_of(seed: int) -> Batch:
    views = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Batch(*views, torch.arange(8))


def built(**sections: Any) -> Training:
    return build(replace(TINY, **sections), CPU, Console(quiet=True))


def rate_zero(training: Training) -> None:
    """Hold the backbone as a whole step does: by its learning rate alone."""
    training.optimizer.param_groups[0]["lr"].fill_(0)


def losses_of(training: Training, steps: int) -> list[Tensor]:
    found = []
    for seed in range(steps):
        loss, losses = training.step(batch_of(seed))
        found += [loss, losses.contrast, losses.contrast if losses.fit is None else losses.fit]
    return found


def calls(module: nn.Module) -> list[bool]:
    """Of each pass from now on, whether it records a graph."""
    seen = list[bool]()
    module.register_forward_hook(lambda module, args, features: seen.append(features.requires_grad))
    return seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_held_backbone_gives_the_losses_of_a_whole_step_from_one_backbone_without_a_graph(variant: str) -> None:
    whole, held = built(**VARIANTS[variant]), built(**VARIANTS[variant])
    rate_zero(whole)
    held.hold(True)
    assert held.moco.alone
    query, key = calls(held.moco.backbone), calls(held.moco.key_backbone)
    torch.testing.assert_close(losses_of(held, 3), losses_of(whole, 3))
    assert query == [False] * 6 * (2 if variant == "in parts" else 1)
    assert key == []
    assert all(each.grad is None for each in held.moco.backbone.parameters())
    torch.testing.assert_close(held.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_kept_backbone_is_one_and_gives_the_losses_of_two(variant: str) -> None:
    sections = VARIANTS[variant]
    kept = replace(sections.get("optim", TINY.optim), backbone_lr=0.0)
    two, one = (built(**sections | {"optim": kept}) for _ in range(2))
    one.hold(False)
    assert one.moco.key_backbone is one.moco.backbone is one.encoder.backbone
    seen = calls(one.moco.backbone)
    torch.testing.assert_close(losses_of(one, 3), losses_of(two, 3))
    assert seen == [False] * 6 * (2 if variant == "in parts" else 1)
    torch.testing.assert_close(one.model.state_dict(), two.model.state_dict())


def test_after_its_warm_up_the_backbone_learns_and_the_key_follows() -> None:
    training, schedule = built(), Schedule(steps_per_epoch=2, total=8, last=8)
    start = training.moco.backbone.state_dict()["conv1.weight"].clone()
    for step in range(1, 5):
        training.set_learning_rates(step, schedule, warmup=1.0)
        training.step(batch_of(step))
        query, key = training.moco.backbone.conv1.weight, training.moco.key_backbone.conv1.weight
        assert training.moco.alone == torch.equal(query, start) == torch.equal(key, start) == (step <= 2)
        assert (query.grad is None) == (step <= 2)


def test_running_statistics_and_two_different_encoders_keep_two_passes() -> None:
    local = built(model=replace(TINY.model, batchnorm="local"))
    local.hold(True)
    assert not local.moco.alone
    passes = calls(local.moco.backbone), calls(local.moco.key_backbone)
    losses_of(local, 1)
    assert passes == ([False], [False])

    parted = built()
    losses_of(parted, 1)
    parted.hold(True)  # as of a run that is resumed with a longer warm-up
    assert not parted.moco.alone
    key = parted.moco.key_backbone.conv1.weight.clone()
    losses_of(parted, 1)
    assert not torch.equal(parted.moco.key_backbone.conv1.weight, key)  # the key still follows


@pytest.mark.parametrize("trained", [False, True])
def test_a_resumed_run_has_one_backbone_only_where_both_are_the_same(trained: bool) -> None:
    before = built(optim=replace(TINY.optim, backbone_lr=0.1 if trained else 0.0))
    before.hold(False)
    losses_of(before, 1)
    resumed = built(optim=replace(TINY.optim, backbone_lr=0.0))
    state = before.state()
    resumed.load_state(state)
    resumed.hold(False)
    assert resumed.moco.alone != trained
    torch.testing.assert_close(resumed.model.state_dict(), state["model"], rtol=0, atol=0)
