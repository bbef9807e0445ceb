"""One whole training step (both encoders, losses, backward, SGD, EMA, queue) on views that are already there."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fastcr.backbone import build_backbone
from fastcr.config import RationaleConfig
from fastcr.moco import MoCo
from fastcr.rationale import Rationale
from fastcr.step import contrast_losses, train_step
from fastcr.views import Batch


@pytest.mark.parametrize("rationale", [False, True], ids=["moco", "rationale"])
def test_step(benchmark: Any, finished: Any, device: torch.device, rationale: bool) -> None:
    """Images (pairs) a second are in the report's extra_info."""
    gpu = device.type == "cuda"
    batch, size, name, stage = (256, 224, "resnet50", "layer4") if gpu else (16, 64, "resnet18", "layer3")
    torch.manual_seed(0)
    backbone, channels = build_backbone(name, stage)
    moco = MoCo(backbone, channels, embedding_dim=256, queue_size=4096)
    moco.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    branch = Rationale(channels, RationaleConfig()).to(device) if rationale else None
    if gpu:
        moco.backbone.compile()
        moco.key_backbone.compile()
    trained = [p for p in moco.parameters() if p.requires_grad] + (list(branch.parameters()) if branch else [])
    views = torch.randn(2, batch, 3, size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    first, second = (view.to(memory_format=torch.channels_last) for view in views)
    step = partial(
        train_step,
        moco,
        partial(contrast_losses, branch=branch, temperature=0.2),
        torch.optim.SGD(trained, lr=0.03, momentum=0.9, fused=gpu),
        Batch(first, second),
        fit_weight=1.0,
        key_momentum=0.999,
        autocast=torch.autocast(device.type, dtype=torch.bfloat16, enabled=gpu),
    )
    step()
    benchmark(finished(step))
    if benchmark.stats:
        benchmark.extra_info["images_per_second"] = batch / benchmark.stats.stats.median
