"""A trained encoder as others use it: pictures in, unit embeddings and attention maps out.

    encoder = fastcr.load("runs/cub200-20261123-120000")
    embedding, attention = encoder(encoder.transform(picture)[None])

`fastcr.load` is `load` below.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from fastcr.backbone import TIMM, build_backbone
from fastcr.checkpoint import load_weights
from fastcr.config import RationaleConfig, ReleasedConfig, UsageError
from fastcr.embed import Branch, build_branch, find_weights
from fastcr.folders import to_rgb
from fastcr.machine import pick_device
from fastcr.moco import mean_pool
from fastcr.released import from_released_checkpoint, released_facts
from fastcr.views import MEAN, STD


class Encoded(NamedTuple):
    """What an `Encoder` makes of a batch of images."""

    embedding: Tensor
    """`[B,C]`, unit length."""
    attention: Tensor
    """`[B,h,w]`, each map sums to 1; that of a released checkpoint lies in [0, 1] and depends on the whole batch."""


class Encoder(nn.Module):
    """Images to their rationale embedding and attention.

    Comes frozen and in eval mode; `requires_grad_(True).train()` readies it for fine-tuning.

    Attributes:
        backbone, branch: the parts; no branch (None) for plain MoCo.
        image_size: side of the images it was trained on, pixels; others work too.
        mean, std: of the normalisation, a number a colour.
        facts: the description kept with the weights.
        ignored: keys of a released checkpoint that no part of the encoder comes from.
    """

    def __init__(
        self, backbone: nn.Module, branch: Branch | None, facts: dict[str, Any], ignored: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.backbone, self.branch, self.ignored = backbone, branch, ignored
        self.facts = {"mean": MEAN, "std": STD} | facts
        self.image_size = int(facts["image_size"])
        self.mean, self.std = (tuple(map(float, self.facts[name])) for name in ("mean", "std"))

    def forward(self, images: Tensor) -> Encoded:
        """Normalised images `[B,3,S,S]` to embedding `[B,C]` and attention `[B,h,w]`.

        Without a branch the attention is uniform, and the embedding the mean one.
        """
        features = self.backbone(images)
        height, width = features.shape[2:]
        if self.branch is None:
            pooled = mean_pool(features)
            attention = pooled.new_full((features.shape[0], height, width), 1 / (height * width))
        else:
            pooled, attention = self.branch.pool(features)
            attention = attention.unflatten(1, (height, width))
        return Encoded(F.normalize(pooled, dim=1), attention)

    def mean_embedding(self, images: Tensor) -> Tensor:
        """Normalised images `[B,3,S,S]` to unit embeddings `[B,C]` by mean pooling, without the branch."""
        return F.normalize(mean_pool(self.backbone(images)), dim=1)

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """PIL picture of any mode to `[3,S,S]` as in `fastcr.evaluate`: shorter side to `round(S*8/7)`, centre crop."""
        size = self.image_size
        cut = [v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size)]
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        return v2.Compose([to_rgb, v2.PILToTensor(), *cut, *scale])


def load(path_or_run: str | os.PathLike[str], device: str | torch.device = "cpu") -> Encoder:
    """The encoder of a run folder, a weights file, a folder exported for the Hub, or an authors' released checkpoint.

    No code in the file is run. `UsageError` if it is missing, broken or foreign, or `device` is not there.
    """
    where, file, ignored = pick_device(str(device)), weights_file(Path(path_or_run)), tuple[str, ...]()
    try:
        state, facts, ignored = _named(*load_weights(file))
        if not facts:
            keys = ", ".join(sorted(state)[:3])
            raise UsageError(f"{file} was not written by fastcr.train (no fastcr metadata); its keys begin {keys}")
        _check(facts)
        detectors, released = facts["detectors"], facts["attention"] == "batch-minmax"
        rationale = RationaleConfig(enabled=detectors > 0, detectors=detectors, temperature=facts["temperature"])
        backbone, channels = build_backbone(facts["backbone"], facts["last_stage"], stem_maxpool=facts["stem_maxpool"])
        branch = build_branch(channels, rationale, ReleasedConfig(enabled=released))
        encoder = Encoder(backbone, branch, facts, ignored)
        encoder.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        promised = "a released checkpoint does" if ignored else "its metadata says"
        raise UsageError(f"{file} does not hold what {promised}: {' '.join(str(error).split())[:200]}") from None
    encoder.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return encoder.requires_grad_(False).eval()


def _check(facts: dict[str, Any]) -> None:
    """`ValueError` or `TypeError` for facts that an encoder could not be built or used with."""
    mean, std = (facts.get(name, (1, 1, 1)) for name in ("mean", "std"))
    checks = {
        "detectors": 0 <= facts["detectors"] <= 128,
        "temperature": 0 < facts["temperature"] < math.inf,
        "image_size": 1 <= int(facts["image_size"]) <= 16384,
        "mean": len(mean) == 3 and all(math.isfinite(each) for each in mean),
        "std": len(std) == 3 and all(0 < each < math.inf for each in std),
    }
    if wrong := [name for name, holds in checks.items() if not holds]:
        raise ValueError(f"{wrong[0]} cannot be {facts[wrong[0]]}")


def weights_file(path: Path) -> Path:
    """`path` itself, or the weights of that folder. `UsageError` if there are none."""
    runs, exported = path / "weights.safetensors", path / "model.safetensors"
    return exported if exported.is_file() and not runs.is_file() else find_weights(path)


def _named(
    state: dict[str, Tensor], facts: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """State dict with the names `backbone.*` and `branch.*`, its facts, and the keys left out."""
    if "conv16.weight" in state:
        kept = from_released_checkpoint(state)
        used = {id(value) for value in kept.values()}
        return kept, released_facts(state), tuple(key for key, value in state.items() if id(value) not in used)
    if facts and not any(key.startswith("backbone.") for key in state):  # exported under torchvision's or timm's names
        prefix = "backbone.timm." if str(facts.get("backbone")).startswith(TIMM) else "backbone."
        state = {key if key.startswith("branch.") else prefix + key: value for key, value in state.items()}
    return state, facts, ()
