"""One training step, top to bottom: contrast loss, its GradCAM, the fit to it, and the updates."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastcr.kernels.info_nce import info_nce
from fastcr.kernels.launch import Impl
from fastcr.moco import MoCo, mean_pool
from fastcr.rationale import Rationale
from fastcr.views import Batch


class Losses(NamedTuple):
    """What one batch gives; `attention` and `features` are for the log only."""

    contrast: Tensor  # scalar, nats
    fit: Tensor | None  # scalar, nats, unweighted; None without a branch
    attention: Tensor | None  # [B,S]
    features: Tensor  # [B,C,H,W]
    key: Tensor  # [B,D]


class LossFunction(Protocol):
    """`contrast_losses`, or `released.released_losses`, with the branch bound."""

    def __call__(self, moco: MoCo, batch: Batch, autocast: torch.autocast) -> Losses:
        """Losses of one batch."""
        ...


def contrast_losses(
    moco: MoCo,
    batch: Batch,
    autocast: torch.autocast,
    *,
    branch: Rationale | None,
    temperature: float,
    impl: Impl = "auto",
) -> Losses:
    """Contrast loss of a batch and the branch's fit to its GradCAM; without a branch, plain MoCo v2."""
    with autocast:
        features = moco.backbone(batch.first)
    key = moco.key(batch.second, autocast)
    if branch is None:
        contrast = info_nce(moco.query(mean_pool(features)), key, moco.queue, temperature=temperature, impl=impl)
        return Losses(contrast.mean(), None, None, features.detach(), key)

    # the fit hands the pooling gradient to the features in its own pass, so pooling is cut off from them here
    pooled = mean_pool(features.detach()).requires_grad_()
    contrast = info_nce(moco.query(pooled), key, moco.queue, temperature=temperature, impl=impl)
    (gradient,) = torch.autograd.grad(contrast.sum(), pooled, retain_graph=True)
    fit = branch.fit(features, gradient, pool_weight=1 / len(pooled))
    return Losses(contrast.mean(), fit.divergence.mean(), fit.attention, features.detach(), key)


def train_step(
    moco: MoCo,
    loss_function: LossFunction,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    fit_weight: float,
    key_momentum: float,
    autocast: torch.autocast,
) -> tuple[Tensor, Losses]:
    """Losses, backward, SGD, EMA of the key encoder, enqueue; returns the weighted loss. Never waits for the device."""
    losses = loss_function(moco, batch, autocast)
    loss = losses.contrast if losses.fit is None else losses.contrast + fit_weight * losses.fit
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    moco.update_key_encoder(key_momentum)
    moco.enqueue(losses.key)
    return loss.detach(), losses


def cosine_lr(base: float, step: int, total: int) -> float:
    """Learning rate of `step` (from 0) of `total`: from `base` down to 0 along half a cosine."""
    return 0.5 * base * (1 + math.cos(math.pi * min(step / total, 1)))
