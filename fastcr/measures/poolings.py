"""Ways to pool features that need no training: the baselines that a trained encoder and its attention have to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
    high, wide = features.shape[2:]
    squares = [((torch.arange(side) + 0.5) / side - 0.5).square() for side in (high, wide)]
    weights = torch.exp(-(squares[0][:, None] + squares[1]) / (2 * SIGMA**2))
    return weighted(features, weights.to(features.device))


def scda(features: Tensor) -> Tensor:
    """SCDA (Wei et al. 2017, arXiv 1604.04994): mean and maximum `[B,2C]` of the positions that stand out.

    They are those whose features sum to more than the map's mean, of them the largest connected region. The paper's
    second layer and its mirrored image are left out.
    """
    features = features.float()
    total = features.sum(1)
    kept = largest_region(total > total.mean((1, 2), keepdim=True))
    kept |= ~kept.any(2).any(1)[:, None, None]  # a map that is the same everywhere is kept whole
    most = features.masked_fill(~kept[:, None], -torch.inf).amax((2, 3))
    return torch.cat([weighted(features, kept.float()), most], dim=1)


def largest_region(mask: Tensor) -> Tensor:
    """The largest region of `mask` `[B,h,w]` whose positions touch, corners too; of equal ones any one of them."""
    _, high, wide = mask.shape
    numbers = torch.arange(1, high * wide + 1, device=mask.device).view(high, wide).float()
    labels = numbers * mask
    for _ in range(high * wide):  # the largest number of a region spreads through it
        spread = torch.nn.functional.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    flat = labels.flatten(1).long()  # 0 outside
    sizes = torch.zeros(len(flat), high * wide + 1, device=mask.device).scatter_add_(1, flat, mask.flatten(1).float())
    largest = sizes.argmax(1, keepdim=True)
    return mask & (flat == largest).view_as(mask)


# by the names of results.json, those that need to know nothing but the features
OF_FEATURES: dict[str, Pooling] = {"mean": mean_pool, "gem": gem, "norm": norm, "gaussian": gaussian, "scda": scda}


def without_training(axis: Axis) -> dict[str, Pooling]:
    """Every such pooling by its name, the mean excepted; `axis` is DDT's, of images like those that are pooled."""

    def ddt(features: Tensor) -> Tensor:
        return weighted(features, axis.attention(features))

    return {**{name: pool for name, pool in OF_FEATURES.items() if name != "mean"}, "ddt": ddt}


def key_of(asked: str | None, encoder: Encoder) -> str:
    """The name in `results.json` of the pooling that `--pooling` asks for; by default the attention, else the mean.

    `UsageError` for the attention of an encoder that has none.
    """
    default = "mean" if encoder.branch is None else "attention"
    key = {shown: name for name, shown in SHOWN.items()}.get(asked or default, asked or default)
    if key == "rationale" and encoder.branch is None:
        raise UsageError("--pooling attention: this encoder has no branch for the attention")
    return key


def pooled(features: Tensor, encoder: Encoder, pooling: str, mean: Tensor | None = None) -> Tensor:
    """Features `[B,C,h,w]` of `encoder` to unit embeddings `[B,C']`, fp32; less `mean` `[C']`, if it is given.

    `pooling` is a name that `key_of` gives.
    """
    if pooling == "rationale":
        unit = encoder.pooled(features).rationale
        assert unit is not None  # `key_of` has seen to it
    else:
        unit = F.normalize(OF_FEATURES[pooling](features).float(), dim=1)
    return unit if mean is None else F.normalize(unit - mean.to(unit.device), dim=1)
