"""Any encoder that a command is told: one with weights in a file (`load`), or a frozen one by its name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastcr.config import Config, DataConfig, ModelConfig, RationaleConfig
from fastcr.encoders.backbone import RESNETS, TIMM, backbone_mistake, build_backbone
from fastcr.encoders.encoder import Encoder, describe, load
from fastcr.encoders.hub import find_weights
from fastcr.encoders.weights import load_initial_weights, with_own_colours
from fastcr.errors import UsageError
from fastcr.runs.checkpoint import facts_of


class Opened(NamedTuple):
    """An encoder, and how it is found again."""

    encoder: Encoder
    source: str  # its name, or the path of its weights
    sha256: str  # of these


def is_name(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is an encoder's name, perhaps with weights (timm:NAME=FILE), and not a path that is there."""
    name = os.fspath(source)
    return (name.split("=")[0] in RESNETS or name.startswith(TIMM)) and not os.path.exists(name)


def model_of(name: str, weights: str = ModelConfig.weights, **others: Any) -> ModelConfig:
    """The settings that a name stands for; `weights` where it names none. `UsageError` for an encoder that is none."""
    name, _, file = name.partition("=")
    model = ModelConfig(name, weights=file or weights, **others)
    if wrong := backbone_mistake(name, model.last_stage):
        raise UsageError(wrong.removeprefix("--model.backbone: "))
    return model


def open_encoder(
    source: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    tuned: float | None = None,
    image_size: int | None = None,
    say: Callable[[str], object] = print,
    **settings: Any,
) -> Opened:
    """The encoder that `load` takes, or one by its name, without a branch, frozen, which has no `tuned`.

    `settings` are those of `model_of`; `say` is told what lies beside the weights of a name. Without `image_size`, and
    where nothing says it there, it is 224 px. `UsageError` if the encoder cannot be had.
    """
    if not is_name(source):
        file = find_weights(source)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        return Opened(load(file, device, tuned=tuned, image_size=image_size), os.path.abspath(file), sha256)
    if tuned is not None:
        raise UsageError(f"--run.tuned is of a run folder, and {source} is the name of an encoder")
    model, digest = model_of(os.fspath(source), **settings), hashlib.sha256()
    image_size = image_size or facts_of(Path(model.weights)).get("size", DataConfig.image_size)
    model = with_own_colours(model, say)
    torch.manual_seed(0)  # of weights that stay random
    colours = model.mean, model.std
    backbone, _ = build_backbone(model.backbone, model.last_stage, image_size=image_size, colours=colours)
    load_initial_weights(backbone, model)
    config = Config(model=model, data=DataConfig(image_size=image_size), rationale=RationaleConfig(enabled=False))
    encoder = Encoder(backbone, None, describe(config)).requires_grad_(False).eval()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    encoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Opened(encoder, os.fspath(source), digest.hexdigest())
