"""The checkpoints of the authors' released code, for use and for comparison; fastcr does not train this variant.

Its branch differs from the paper's: a 1x1 convolution without bias, then BatchNorm, ReLU and the maximum over K. Its
attention is scaled between the smallest and the largest value of the whole batch, so an image's embedding depends on
the batch it is in. The embedding is the mean over positions of features times attention.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, autocast, nn

from fastcr.encoders.names import torchvision_name
from fastcr.errors import UsageError
from fastcr.kernels.rationale_pool import RationalePool


class ReleasedBranch(nn.Module):
    """Detectors `conv.weight [K,C,1,1]` with batch normalisation."""

    def __init__(self, channels: int, detectors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, detectors, 1, bias=False)
        self.norm = nn.BatchNorm2d(detectors)

    def responses(self, features: Tensor) -> Tensor:
        """What each detector says at each position, before the maximum: `[B,K,H,W]` fp32."""
        return self.norm(self.conv(features.float()))

    def attention(self, features: Tensor) -> Tensor:
        """Features `[B,C,H,W]` to maps `[B,H,W]` in [0, 1], scaled over the whole batch."""
        with autocast(features.device.type, enabled=False):
            peak = F.relu(self.responses(features)).amax(1)
            low, high = peak.amin(), peak.amax()
            return (peak - low) / (high - low).clamp_min(1e-12)

    def pool(self, features: Tensor) -> RationalePool:
        """Features `[B,C,H,W]` to `(pooled [B,C], attention [B,S])`; the attention does not sum to 1 here."""
        attention = self.attention(features)
        pooled = (features.float() * attention[:, None]).mean((2, 3))
        return RationalePool(pooled, attention.flatten(1))


def released_facts(state: dict[str, Tensor]) -> dict[str, Any]:
    """What `encoder.describe` would say of a released checkpoint: ResNet-50 at 224 px, no stem max-pool in BYOL."""
    return {
        "backbone": "resnet50",
        "last_stage": "layer4",
        "stem_maxpool": any(key.startswith("encoder_q.") for key in state),
        "detectors": state["conv16.weight"].shape[:1].numel(),
        "temperature": 0.4,
        "attention": "batch-minmax",
        "image_size": 224,
    }


def from_released_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released MoCo or BYOL state dict (without `module.`) to fastcr's names: `backbone.*` and `branch.*`.

    Key encoders, queues, heads, predictors and the unused masked head are left out.
    Raises `UsageError` if there is no encoder in `state`.
    """
    encoder = "encoder_q." if any(key.startswith("encoder_q.") for key in state) else "online_encoder.0."
    found = {}
    for key, value in state.items():
        if key.startswith(encoder) and not key.startswith(f"{encoder}fc."):
            found[f"backbone.{torchvision_name(key.removeprefix(encoder))}"] = value
        elif key == "conv16.weight" or key.startswith("bn16."):
            found[key.replace("conv16.", "branch.conv.").replace("bn16.", "branch.norm.")] = value
    if not any(key.startswith("backbone.") for key in found):
        raise UsageError(f"not a released checkpoint (no encoder); its keys begin {', '.join(sorted(state)[:3])}")
    return found
