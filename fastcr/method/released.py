"""The variant of the authors' released code, in plain torch, for comparing with their results and checkpoints.

What it does differently (the preset `cub200-released` turns it on, its settings are `ReleasedConfig`):
  branch    1x1 convolution without bias -> BatchNorm -> ReLU -> maximum over K
  attention min-max scaled over the whole batch: an image's embedding depends on the batch it is in
  target    softmax of the raw GradCAM (values near 1e-4, so all but uniform), GradCAM of +loss, not detached
  fit loss  KL over the last spatial axis only, tau 1 (`rows`), or over all positions, tau 0.4 (`all`); summed
            over the batch
  embedding mean over positions of features times attention
The released code also keeps a second head and queue on masked features that never enter the loss: dropped here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastcr.config import RationaleConfig, ReleasedConfig
from fastcr.data.views import Batch
from fastcr.errors import UsageError
from fastcr.kernels.rationale_pool import RationalePool
from fastcr.method.moco import MoCo, mean_pool
from fastcr.method.objectives.contract import Objective
from fastcr.method.rationale import effective_number
from fastcr.method.step import Losses, Scale
from fastcr.method.weights import torchvision_name
from fastcr.runs.checkpoint import read_state_dict

KL_TEMPERATURE = {"rows": 1.0, "all": 0.4}
# the released step runs the branch three times on like features, and each run moves BatchNorm's statistics by 0.1
BATCHNORM_MOMENTUM = 1 - 0.9**3


class ReleasedBranch(nn.Module):
    """Detectors `conv.weight [K,C,1,1]` with batch normalisation."""

    def __init__(self, channels: int, rationale: RationaleConfig, released: ReleasedConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, rationale.detectors, 1, bias=False)
        self.norm = nn.BatchNorm2d(rationale.detectors, momentum=BATCHNORM_MOMENTUM)
        self.released = released

    def attention(self, features: Tensor) -> Tensor:
        """Features `[B,C,H,W]` to maps `[B,H,W]` in [0, 1], scaled over the whole batch."""
        with torch.autocast(features.device.type, enabled=False):
            peak = F.relu(self.norm(self.conv(features.float()))).amax(1)
            low, high = peak.amin(), peak.amax()
            return (peak - low) / (high - low).clamp_min(1e-12)

    def pool(self, features: Tensor) -> RationalePool:
        """Features `[B,C,H,W]` to `(pooled [B,C], attention [B,S])`; the attention does not sum to 1 here."""
        attention = self.attention(features)
        pooled = (features.float() * attention[:, None]).mean((2, 3))
        return RationalePool(pooled, attention.flatten(1))

    def fit(self, attention: Tensor, cam: Tensor) -> Tensor:
        """Released KL of maps `[B,H,W]` from GradCAM `[B,H,W]`, summed over the batch, a scalar."""
        target = cam.detach() if self.released.detach_target else cam
        if self.released.fit_axis == "all":
            attention, target = attention.flatten(1), target.flatten(1)
        temperature = KL_TEMPERATURE[self.released.fit_axis]
        log_attention = F.log_softmax(attention / temperature, dim=-1)
        return F.kl_div(log_attention, F.softmax(target / temperature, dim=-1), reduction="sum")

    def responses(self, features: Tensor) -> Tensor:
        """What each detector says at each position, before the maximum: `[B,K,H,W]` fp32."""
        return self.norm(self.conv(features.float()))

    def alone(self, responses: Tensor) -> Tensor:
        """The attention `[B,K,H,W]`, not scaled, that each detector would give without the others."""
        return responses.relu()

    @torch.no_grad()
    def effective_detectors(self, features: Tensor) -> Tensor:
        """exp(entropy of which detector wins a position), 1 to K; a scalar."""
        norm, responses = self.norm, F.conv2d(features.float(), self.conv.weight)
        # with the batch's statistics, as in training, but without moving the running ones
        responses = F.batch_norm(responses, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        return effective_number(responses.argmax(1), self.conv.out_channels)


def gradcam(features: Tensor, gradient: Tensor) -> Tensor:
    """Raw GradCAM `[B,H,W]` of features `[B,C,H,W]`; `gradient` `[B,C]` of the batch-mean loss by pooled features."""
    positions = features.shape[2] * features.shape[3]
    return F.relu(torch.einsum("bchw,bc->bhw", features.float(), gradient)) / positions


def released_losses(
    moco: MoCo,
    batch: Batch,
    autocast: torch.autocast,
    *,
    branch: ReleasedBranch,
    objective: Objective,
    scale: Scale = lambda loss: loss,
) -> Losses:
    """Losses of one batch as the released code computes them; the fit loss is a sum over the batch.

    The whole gradient passes through the losses, so `scale` is not needed here.
    """
    features, key = moco.encode(batch, autocast)
    with record_function("contrast"):
        pooled = mean_pool(features)
        if not pooled.requires_grad:  # the backbone is kept
            pooled.requires_grad_()
        contrast = objective(moco.query(pooled), moco.keys(key)).loss.mean()
        (gradient,) = torch.autograd.grad(
            contrast, pooled, retain_graph=True, create_graph=not branch.released.detach_target
        )
    with record_function("fit"):
        attention = branch.attention(features)
        fit = branch.fit(attention, gradcam(features, gradient))
    spread = attention.detach().flatten(1)
    return Losses(contrast, fit, spread / spread.sum(1, keepdim=True).clamp_min(1e-12), features.detach(), key)


def released_facts(state: dict[str, Tensor]) -> dict[str, Any]:
    """What `encoder.describe` would say of a released checkpoint: ResNet-50 at 224 px, no stem max-pool in BYOL."""
    return {
        "backbone": "resnet50",
        "last_stage": "layer4",
        "stem_maxpool": any(key.startswith("encoder_q.") for key in state),
        "detectors": len(state["conv16.weight"]),
        "temperature": KL_TEMPERATURE["all"],
        "attention": "batch-minmax",
        "image_size": 224,
    }


def load_byol_heads(moco: MoCo, file: Path) -> bool:
    """Fill BYOL's projector and predictor from a released BYOL checkpoint; False, and nothing, from any other file.

    Their layers are BYOL's, whatever they are called: tensors are taken in their order. `UsageError` if they are of
    other sizes (`--moco.embedding_dim`).
    """
    if moco.predictor is None or not file.is_file():
        return False
    state, parts = read_state_dict(file), {"online_encoder.1.": moco.head, "online_predictor.": moco.predictor}
    for prefix, part in parts.items():
        values = [value for key, value in state.items() if key.startswith(prefix)]
        own = part.state_dict()
        if not values:
            return False
        if [value.shape for value in values] != [value.shape for value in own.values()]:
            dim = moco.queue.shape[1]
            raise UsageError(f"{file}: {prefix}* do not fit this encoder and --moco.embedding_dim {dim}")
        part.load_state_dict(dict(zip(own, values, strict=True)))
    moco.key_head.load_state_dict(moco.head.state_dict())
    return True


def from_released_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released MoCo or BYOL state dict (without `module.`) to fastcr's names: `backbone.*` and `branch.*`.

    Key encoders, queues, heads, predictors and the unused masked head are left out.
    Raises `UsageError` if `state` is neither.
    """
    branch = {"conv16.weight": "branch.conv.weight"}
    branch |= {f"bn16.{name}": f"branch.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    branch["bn16.num_batches_tracked"] = "branch.norm.num_batches_tracked"
    if "conv16.weight" not in state:
        raise UsageError(f"not a released checkpoint (no conv16.weight); its keys begin {', '.join(sorted(state)[:3])}")
    encoder = "encoder_q." if any(key.startswith("encoder_q.") for key in state) else "online_encoder.0."
    names = {key: f"backbone.{torchvision_name(key.removeprefix(encoder))}" for key in state
             if key.startswith(encoder) and not key.startswith(f"{encoder}fc.")}  # fmt: skip
    if not names:
        raise UsageError(f"not a released checkpoint (no encoder); its keys begin {', '.join(sorted(state)[:3])}")
    return {new: state[old] for old, new in (names | branch).items() if old in state}
