"""Ways to pool features that need no training: the baselines that a trained encoder and its attention have to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.data.crops import centres_of
from fastcr.encoders.backbone import mean_pool
from fastcr.encoders.encoder import Encoder
from fastcr.errors import UsageError
from fastcr.method.ddt import Axis

Pooling = Callable[[Tensor], Tensor]  # features [B,C,h,w] to [B,C'], not normalised, fp32
SIGMA = 1.5 / 7  # of the centred Gaussian, in sides of the map
SHOWN = {"rationale": "attention", "norm": "feature-strength"}  # what people read and type, where files say otherwise


def weighted(features: Tensor, weights: Tensor) -> Tensor:
    """Mean of the positions of features `[B,C,h,w]`, weighted with `[B,h,w]` or `[h,w]` (they need not sum to 1)."""
    weights = weights / weights.sum((-2, -1), keepdim=True).clamp(min=1e-30)
    return torch.einsum("bchw,bhw->bc", features.float(), weights.expand_as(features[:, 0]))


def gem(features: Tensor) -> Tensor:
    """Generalised mean with p = 3 (Radenovic et al. 2018, arXiv 1711.02512); negative features count as 0."""
    return features.float().clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)


def norm(features: Tensor) -> Tensor:
    """Feature-strength weighting: positions weighted with the norm of their features."""
    return weighted(features, features.float().norm(dim=1))


def gaussian(features: Tensor) -> Tensor:
    """Positions weighted with a Gaussian at the centre of the image: what needs no look at it."""
    squares = (centres_of(*features.shape[2:]) - 0.5).square().sum(1).view(features.shape[2:])
    return weighted(features, torch.exp(-squares / (2 * SIGMA**2)).to(features.device, torch.float32))


# by the names of results.json, those that need to know nothing but the features
OF_FEATURES: dict[str, Pooling] = {"mean": mean_pool, "gem": gem, "norm": norm, "gaussian": gaussian}


def without_training(axis: Axis) -> dict[str, Pooling]:
    """Every such pooling by its name, the mean excepted; `axis` is DDT's, of images like those that are pooled."""

    def ddt(features: Tensor) -> Tensor:
        return weighted(features, axis.attention(features))

    return {**{name: pool for name, pool in OF_FEATURES.items() if name != "mean"}, "ddt": ddt}


def key_of(asked: str | None, encoder: Encoder) -> str:
    """The name in `results.json` of the pooling that `--pooling` asks for; by default the attention, else the mean.

    `UsageError` for the attention or the class token of an encoder that has none.
    """
    default = "mean" if encoder.branch is None else "attention"
    key = {shown: name for name, shown in SHOWN.items()}.get(asked or default, asked or default)
    if key == "rationale" and encoder.branch is None:
        raise UsageError("--pooling attention: this encoder has no branch for the attention")
    if key == "cls" and not encoder.has_class_token:
        raise UsageError("--pooling cls: this encoder has no class token")
    return key


def pooled(features: Tensor, encoder: Encoder, pooling: str, token: Tensor | None = None) -> Tensor:
    """Features `[B,C,h,w]` of `encoder` to unit embeddings `[B,C']`, fp32.

    `pooling` is a name that `key_of` gives; "cls" needs the class `token` `[B,C]`.
    """
    if pooling in OF_FEATURES:
        return F.normalize(OF_FEATURES[pooling](features).float(), dim=1)
    unit = encoder.pooled(features).rationale if pooling == "rationale" else token
    assert unit is not None  # `key_of` has seen to it
    return unit if pooling == "rationale" else F.normalize(unit.float(), dim=1)
