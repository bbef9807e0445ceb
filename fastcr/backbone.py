"""The encoder: a torchvision ResNet up to its last convolutional map, and where its weights come from."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from fastcr.checkpoint import read_state_dict
from fastcr.config import ModelConfig, UsageError

STAGES = ("layer1", "layer2", "layer3", "layer4")


def build_backbone(name: str, last_stage: str = "layer4", *, stem_maxpool: bool = True) -> tuple[nn.Sequential, int]:
    """A randomly initialised ResNet, images `[B,3,H,W]` to features `[B,C,H/32,W/32]` (layer3: /16), and `C`.

    Its parameters keep torchvision's names.
    """
    resnet = torchvision.models.get_model(name, weights=None)
    modules = OrderedDict(resnet.named_children())
    if last_stage not in STAGES:
        raise ValueError(f"last_stage must be one of {', '.join(STAGES)}, got {last_stage!r}")
    channels = modules.pop("fc").in_features
    modules.pop("avgpool")
    if not stem_maxpool:
        modules.pop("maxpool")
    for stage in STAGES[STAGES.index(last_stage) + 1 :]:
        modules.pop(stage)
        channels //= 2
    return nn.Sequential(modules), channels


def load_initial_weights(backbone: nn.Sequential, config: ModelConfig) -> list[str]:
    """Fill `backbone` as `config.weights` says; returns the names left random.

    Weights of later stages and of the classifier are passed over.
    Raises `UsageError` for weights that cannot be had, are foreign, or leave part of the encoder unfilled without
    `--model.allow_missing_weights True`.
    """
    if config.weights == "none":
        return []
    if config.weights == "imagenet":
        source, state = "ImageNet weights", _download(config.backbone)
    else:
        source, state = config.weights, backbone_state(read_state_dict(Path(config.weights)))
    wanted = backbone.state_dict()
    if not state.keys() & wanted.keys():
        raise UsageError(f"{source} has no weight of a {config.backbone}; its keys begin {_some(state)}")
    beyond = (*STAGES[STAGES.index(config.last_stage) + 1 :], "fc")
    foreign = [key for key in state if key not in wanted and key.split(".")[0] not in beyond]
    if foreign:
        raise UsageError(f"{source} is not a {config.backbone}: it has {len(foreign)} foreign keys, {_some(foreign)}")
    for key in state.keys() & wanted.keys():
        if state[key].shape != wanted[key].shape:
            raise UsageError(
                f"{source} is not a {config.backbone}: {key} is {list(state[key].shape)}, not {list(wanted[key].shape)}"
            )
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing and not config.allow_missing_weights:
        raise UsageError(
            f"{source} lacks {len(missing)} of the encoder's weights, {_some(missing)} "
            "(--model.allow_missing_weights True leaves them random; --model.last_stage layer3 ends before layer4)"
        )
    backbone.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)
    return missing


def backbone_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict: torchvision's own, or one of fastcr's weights files."""
    ours = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return ours or state


def _download(name: str) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # a proxy's page or a cut transfer fails anywhere in torch's reader
        file = weights.url.rsplit("/", 1)[1]
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        if not isinstance(error, URLError) and (folder / file).exists():
            raise UsageError(
                f"the ImageNet weights {folder / file} are broken: remove that file to download it again"
            ) from None
        raise UsageError(
            f"no network for the ImageNet weights ({getattr(error, 'reason', error)}): put {file} into {folder}, or "
            f"pass --model.weights /path/to/{file} (or --model.weights none)"
        ) from None


def _some(keys: object) -> str:
    names = sorted(keys)  # type: ignore[call-overload]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "nothing"
