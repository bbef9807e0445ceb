"""A trained encoder as others use it: images in, unit embeddings and attention maps out; and its weights file.

encoder = fastcr.load("runs/cub200-20261123-120000")
embedding, attention = encoder(encoder.transform(image)[None])
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastcr.config import Config
from fastcr.data.crops import centre_crop, enough
from fastcr.data.images import read_rgb, upright_rgb
from fastcr.data.views import MEAN, STD, normalise
from fastcr.encoders.backbone import TIMM, TimmEncoder, build_backbone, mean_pool
from fastcr.encoders.folding import folded_copy
from fastcr.encoders.hub import find_weights
from fastcr.encoders.rationale import RationaleHead
from fastcr.encoders.released import ReleasedBranch, from_released_checkpoint, released_facts
from fastcr.errors import UsageError, one_line
from fastcr.runs.beside import three_numbers
from fastcr.runs.checkpoint import INITIAL, check_finite, load_weights
from fastcr.runs.context import progress
from fastcr.runs.machine import pick_device

Branch = RationaleHead | ReleasedBranch
FEW = 32 * 112**2  # pixels at once that a CPU core encodes fastest: what is made of them stays in its caches


class Encoded(NamedTuple):
    """What an `Encoder` makes of a batch of images."""

    embedding: Tensor
    """`[B,C]`, unit length."""
    attention: Tensor
    """`[B,h,w]`, each map sums to 1; that of a released checkpoint lies in [0, 1] and depends on the whole batch."""


class Pooled(NamedTuple):
    """Both embeddings of a batch of images, from one pass of the encoder, in fp32."""

    mean: Tensor  # [B,C], unit length: mean pooling
    rationale: Tensor | None  # [B,C], unit length: pooled with the attention; None without a branch
    attention: Tensor | None  # [B,h,w]


class Encoder(nn.Module):
    """Images to their rationale embedding and attention.

    `fastcr.load` gives it frozen and in eval mode; `requires_grad_(True).train()` readies it for fine-tuning.

    Attributes:
        backbone, branch: the parts; no branch (None) for plain MoCo.
        image_size: side of the images that `transform` makes, pixels; others work too.
        mean, std: of the normalisation, a number a colour.
        facts: the description kept with the weights.
    """

    def __init__(self, backbone: nn.Module, branch: Branch | None, facts: dict[str, Any]) -> None:
        super().__init__()
        self.backbone, self.branch = backbone, branch
        self.facts = {"mean": MEAN, "std": STD} | facts
        self.image_size = int(facts["image_size"])
        self.mean, self.std = (tuple(map(float, self.facts[name])) for name in ("mean", "std"))

    def forward(self, images: Tensor) -> Encoded:
        """Normalised images `[B,3,S,S]` to embedding `[B,C]` and attention `[B,h,w]`.

        Without a branch the attention is uniform, and the embedding the mean one.
        """
        return self.encoded(self.backbone(images))

    def encoded(self, features: Tensor) -> Encoded:
        """Features `[B,C,h,w]` to what `forward` gives."""
        mean, rationale, attention = self.pooled(features)
        if rationale is not None and attention is not None:
            return Encoded(rationale, attention)
        # of the features' own shape: len() would fix the batch size of an exported graph
        return Encoded(mean, torch.full_like(features[:, 0], 1 / features[0, 0].numel()))

    @property
    def has_class_token(self) -> bool:
        """Whether the backbone is a ViT with a class token."""
        return getattr(self.backbone, "has_class_token", False)

    def features(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalised images `[B,3,S,S]` to features `[B,C,h,w]`; the backbone runs in `dtype`."""
        return self.with_class_token(images, dtype)[0]

    def with_class_token(self, images: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """As `features`, and the class token `[B,C]` of a backbone that has one."""
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            if isinstance(self.backbone, TimmEncoder) and self.has_class_token:
                return self.backbone.with_class_token(images)
            return self.backbone(images), None

    def of_crops(
        self, crops: Tensor, dtype: torch.dtype = torch.float32, names: Sequence[str] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """As `with_class_token`, of uint8 crops `[B,S,S,3]`, B > 0; a CPU takes a few of them at a time.

        `UsageError` for features that are not finite, with the name of the first such crop.
        """
        few = len(crops) if crops.is_cuda else max(FEW * torch.get_num_threads() // crops[0, ..., 0].numel(), 1)
        parts = [self.with_class_token(normalise(part, torch.float32), dtype) for part in crops.split(few)]
        features, tokens = ([each for each in column if each is not None] for column in zip(*parts, strict=True))
        whole = torch.cat(features)
        if not (finite := whole.isfinite().flatten(1).all(1)).all():
            first = int((~finite).nonzero()[0, 0])
            named = repr(names[first]) if names else f"image {first}"
            raise UsageError(f"the features of {named} are not finite: this encoder gives NaN or infinity")
        return whole, torch.cat(tokens) if tokens else None

    def both(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Pooled:
        """Normalised images `[B,3,S,S]` to both embeddings and the attention; the backbone runs in `dtype`."""
        return self.pooled(self.features(images, dtype))

    def pooled(self, features: Tensor) -> Pooled:
        """Features `[B,C,h,w]` to both embeddings and the attention."""
        mean = F.normalize(mean_pool(features), dim=1)
        if self.branch is None:
            return Pooled(mean, None, None)
        pooled, attention = self.branch.pool(features)
        return Pooled(mean, F.normalize(pooled, dim=1), attention.unflatten(1, features.shape[2:]))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """All parts in eval mode, put back as they were afterwards; inside it the weights shall not change.

        Its backbone is a copy with folded norms meanwhile. A compiled one stays: the copy would be compiled anew.
        """
        training = {module: module.training for module in self.modules()}  # frozen parts are always in eval mode
        self.eval()
        backbone = self.backbone
        if backbone._compiled_call_impl is None:
            self.backbone = folded_copy(backbone, self.image_size)
        try:
            yield
        finally:
            self.backbone = backbone
            for module, mode in training.items():
                module.training = mode

    @torch.inference_mode()
    def embed(self, images: Iterable[str | os.PathLike[str] | Image.Image], *, batch_size: int = 128) -> Tensor:
        """Image files, or PIL images, to unit embeddings `[N,C]`, fp32 on the CPU, with a bar in a terminal.

        They are those of `forward`. `OSError` for a file that is not a readable image.
        """
        every, device, found = list(images), next(self.parameters()).device, list[Tensor]()

        def crop(image: str | os.PathLike[str] | Image.Image) -> Tensor:
            if isinstance(image, Image.Image):
                return centre_crop(upright_rgb(image), self.image_size)
            return centre_crop(read_rgb(os.fspath(image), least=enough(self.image_size)), self.image_size)

        with self.evaluating(), ThreadPoolExecutor() as threads:
            for first in progress(range(0, len(every), batch_size), "embedding"):
                crops = torch.stack([*threads.map(crop, every[first : first + batch_size])])
                found.append(self.encoded(self.of_crops(crops.to(device))[0]).embedding.cpu())
        return torch.cat(found) if found else torch.empty(0, 0)

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """PIL image of any mode to `[3,S,S]` as in `fastcr.evaluate`: upright, shorter side to `round(S*8/7)`, cut."""
        return partial(_as_input, size=self.image_size)  # which can be pickled


def _as_input(image: Image.Image, size: int) -> Tensor:
    return normalise(centre_crop(upright_rgb(image), size)[None], torch.float32)[0]


def describe(config: Config) -> dict[str, Any]:
    """What a weights file says of itself (its metadata key `fastcr`), of an encoder trained as `config` says."""
    return {
        "backbone": config.model.backbone,
        "last_stage": config.model.last_stage,
        "stem_maxpool": True,
        "detectors": config.rationale.detectors if config.rationale.enabled else 0,
        "temperature": config.rationale.temperature,
        "attention": "softmax",
        "image_size": config.data.image_size,
        "mean": MEAN,
        "std": STD,
    } | {f"own_{name}": own for name in ("mean", "std") if (own := getattr(config.model, name))}


def load(
    path_or_run: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    tuned: float | None = None,
    image_size: int | None = None,
) -> Encoder:
    """The encoder of a run folder, a weights file, a folder exported for the Hub, or an authors' released checkpoint.

    `hf://OWNER/NAME`, or `hf://OWNER/NAME@REVISION`, is one on the Hub (extra `hub`). With `tuned`, it is that of a run
    folder so far on the way from its initial weights (0) to its trained ones (1): half way is better for kinds that it
    was not trained on (WiSE-FT, arXiv 2109.01903), the end for those that it was. `image_size` is the side of the
    images it will be given, pixels, if that is not the one of the training.
    No code in the file is run. `UsageError` if it is missing, broken, not finite or foreign, or `device` is not there.
    """
    where, file = pick_device(str(device)), find_weights(path_or_run)
    state, facts = _named(*load_weights(file))
    if not facts:
        keys = ", ".join(sorted(state)[:3])
        raise UsageError(f"{file} was not written by fastcr.train (no fastcr metadata); its keys begin {keys}")
    if tuned is not None and (share := tuned / facts.get("tuned", 1.0)) != 1:
        state, facts = between(file.with_name(INITIAL), state, share), facts | {"tuned": tuned}
    check_finite(state, file)
    if image_size:
        facts = facts | {"image_size": image_size}
    try:
        _check(facts)
        backbone, channels = build_backbone(
            facts["backbone"],
            facts["last_stage"],
            stem_maxpool=facts["stem_maxpool"],
            image_size=image_size,
            colours=(facts.get("own_mean"), facts.get("own_std")),
        )
        branch: Branch | None = None
        if facts["attention"] == "batch-minmax":
            branch = ReleasedBranch(channels, facts["detectors"])
        elif facts["detectors"]:
            branch = RationaleHead(channels, detectors=facts["detectors"], temperature=facts["temperature"])
        encoder = Encoder(backbone, branch, facts)
        encoder.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        promised = "a released checkpoint does" if facts.get("attention") == "batch-minmax" else "its metadata says"
        raise UsageError(f"{file} does not hold what {promised}: {one_line(error)}") from None
    encoder.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return encoder.requires_grad_(False).eval()


def between(initial: Path, state: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights that far on the way from those in the file `initial` to `state`, and beyond it above 1."""
    if share == 1:
        return state
    start, _ = load_weights(initial)
    try:
        return {
            name: torch.lerp(start[name].to(value), value, share) if value.is_floating_point() else value
            for name, value in state.items()
        }
    except (KeyError, RuntimeError) as error:
        raise UsageError(f"{initial} holds other weights than the run ended with: {one_line(error)}") from None


def _check(facts: dict[str, Any]) -> None:
    """`ValueError` or `TypeError` for facts that an encoder could not be built or used with."""
    checks = {
        "detectors": 0 <= facts["detectors"] <= 128,
        "temperature": 0 < facts["temperature"] < math.inf,
        "image_size": 1 <= int(facts["image_size"]) <= 16384,
    }
    if wrong := [name for name, holds in checks.items() if not holds]:
        raise ValueError(f"{wrong[0]} cannot be {facts[wrong[0]]}")
    for name in ("mean", "std", "own_mean", "own_std"):
        if facts.get(name):
            three_numbers(name, facts[name])


def _named(state: dict[str, Tensor], facts: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict with the names `backbone.*` and `branch.*`, and its facts."""
    if "conv16.weight" in state:
        return from_released_checkpoint(state), released_facts(state)
    if facts and not any(key.startswith("backbone.") for key in state):  # exported under torchvision's or timm's names
        prefix = "backbone.timm." if str(facts.get("backbone")).startswith(TIMM) else "backbone."
        state = {key if key.startswith("branch.") else prefix + key: value for key, value in state.items()}
    return state, facts
