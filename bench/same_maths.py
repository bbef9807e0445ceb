"""Whether a way of doing a step computes what it should: a few of its steps beside the same maths done plainly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from bench.baselines import SEED, Built, Setting
from fastcr.data.views import Batch


def make_batches(setting: Setting, device: torch.device, built: Built, count: int) -> list[Batch]:
    """Pictures of coarse patches, each pair alike but for noise, in the type and layout that `built` takes."""
    random = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    def view(patches: Tensor, size: int) -> Tensor:
        images = F.interpolate(patches, size=size, mode="bilinear")
        images += 0.3 * normal(*images.shape)
        return images.to(dtype=built.dtype, memory_format=built.memory_format)

    patches, sizes = (normal(setting.batch, 3, 8, 8) for _ in range(count)), (setting.image_size, built.key_size)
    return [Batch(*(view(coarse, size or setting.image_size) for size in sizes)) for coarse in patches]


class Trajectory(NamedTuple):
    """What a few steps did."""

    losses: list[float]
    moved: Tensor  # how far each weight of the trained encoder went, fp64 on the CPU


def follow(built: Built, batches: Sequence[Batch], steps: int) -> Trajectory:
    """Do `steps` steps over `batches`, round and round, with residual branches that begin at zero.

    A random ResNet-50 is chaotic otherwise: two fp32 runs of it part within a step.
    """

    def weights() -> Tensor:
        return torch.cat([parameter.detach().double().flatten() for parameter in built.encoder.parameters()]).cpu()

    fill_residual_scales(built, 0.0)
    before = weights()
    losses = [built.step(batch) for batch in itertools.islice(itertools.cycle(batches), steps)]
    trajectory = Trajectory([loss.item() for loss in losses], weights() - before)
    fill_residual_scales(built, 1.0)  # as they were: zeros would be timed as such
    return trajectory


def fill_residual_scales(built: Built, value: float) -> None:
    """Set the scale of each residual block's last BatchNorm, in both encoders."""
    for encoder in filter(None, (built.encoder, built.key_encoder)):
        for block in encoder.modules():
            if isinstance(block, BasicBlock | Bottleneck):
                last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                last.weight.data.fill_(value)


def agrees(got: Trajectory, plain: Trajectory) -> bool:
    """Whether a way went where the plain maths went: each loss within 2 %, the weights' directions within 0.95.

    On ResNet-50 at 64 px rounding to bf16 changes losses by 0.5 % at most, and the cosine to 0.99.
    """
    close = all(abs(a - b) <= 0.02 * abs(b) for a, b in zip(got.losses, plain.losses, strict=True))  # False for NaN
    return close and F.cosine_similarity(got.moved, plain.moved, dim=0).item() >= 0.95
