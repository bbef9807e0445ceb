"""The encoder: a torchvision ResNet or a timm model up to its last feature map, and where its weights come from."""

from __future__ import annotations

import difflib
import importlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from fastcr.checkpoint import read_state_dict
from fastcr.config import ModelConfig, UsageError
from fastcr.views import MEAN, STD

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
STAGES = ("layer1", "layer2", "layer3", "layer4")
TIMM = "timm:"
# what may come after the last feature map of a timm model; the classifier's own name is in its `pretrained_cfg`
TIMM_HEADS = ("head", "head_dist", "attn_pool", "pre_logits")
# the encoder's part of other people's checkpoints, in the order they are tried ("module." is off already)
PREFIXES = (
    "",  # torchvision, timm
    "backbone.timm.",  # fastcr, a timm encoder
    "backbone.",  # fastcr, lightly, solo-learn
    "encoder_q.",  # MoCo v1 and v2
    "base_encoder.",  # MoCo v3
    "online_encoder.0.",  # BYOL as the method's authors released it
    "encoder.",
)
# lightly keeps a ResNet as the Sequential of its children
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


class TimmEncoder(nn.Module):
    """The model `timm` up to its last feature map; square or oblong images `[B,3,H,W]` to features `[B,C,h,w]`.

    Images come normalised with ImageNet's mean and std, and are put to those of the model's own weights. The class
    token and its like are left out; the others lie on their grid.
    """

    timm: Any
    scale: Tensor
    shift: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.timm = model
        mean, std = (tuple(model.pretrained_cfg[key]) for key in ("mean", "std"))
        self.renormalise = (mean, std) != (MEAN, STD)
        self.register_buffer("scale", (torch.tensor(STD) / torch.tensor(std)).view(3, 1, 1), persistent=False)
        shift = (torch.tensor(MEAN) - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[B,C,h,w]`; `ValueError` if the model's are no map."""
        if self.renormalise:
            images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        features = self.timm.forward_features(images)
        if features.ndim == 4:  # some models keep the channels last
            return features if features.shape[1] == self.timm.num_features else features.permute(0, 3, 1, 2)
        if hasattr(self.timm, "fc_norm"):  # a norm that the model has after pooling serves each position here
            features = self.timm.fc_norm(features)
        tokens = features[:, getattr(self.timm, "num_prefix_tokens", 0) :]
        high = round(math.sqrt(tokens.shape[1] * images.shape[2] / images.shape[3]))
        wide = tokens.shape[1] // max(high, 1)
        if tokens.shape[1] != high * wide or tokens.shape[1] < 2:
            raise ValueError(f"its features {list(features.shape)} are no map")
        return tokens.transpose(1, 2).unflatten(2, (high, wide))


def backbone_mistake(name: str, last_stage: str = "layer4", *, stem_maxpool: bool = True) -> str | None:
    """What is wrong with these settings, on one line; None if they name an encoder.

    Raises `UsageError` for a timm model where there is no timm.
    """
    if not name.startswith(TIMM):
        if name not in RESNETS:
            return (
                f"--model.backbone: no encoder {name!r} ({_guess(name, RESNETS, 1)}; "
                f"there are {', '.join(RESNETS)} and timm:NAME)"
            )
        if last_stage not in STAGES:
            return f"last_stage must be one of {', '.join(STAGES)}, got {last_stage!r}"
        return None
    timm, model = _timm(name), name.removeprefix(TIMM)
    tagged = timm.list_pretrained()
    if not (model in tagged if "." in model else timm.is_model(model)):
        return f"--model.backbone: timm has no model {model!r} ({_guess(model, timm.list_models() + tagged, 3)})"
    if last_stage != "layer4" or not stem_maxpool:
        return (
            "--model.last_stage layer3 and --released.stem_maxpool False are for torchvision's ResNets: "
            f"{name} is taken whole (--model.last_stage layer4)"
        )
    return None


def build_backbone(
    name: str, last_stage: str = "layer4", *, stem_maxpool: bool = True, image_size: int | None = None
) -> tuple[nn.Module, int]:
    """A randomly initialised encoder, images `[B,3,H,W]` to its last features `[B,C,h,w]`, and `C`.

    The parameters of a ResNet keep torchvision's names (`h = H/32`; layer3: `H/16`), those of `timm:NAME` timm's, after
    `timm.`. Raises `ValueError` for what `backbone_mistake` names, `UsageError` without timm, or if the encoder gives
    no map for images of side `image_size`, where that is given.
    """
    mistake = backbone_mistake(name, last_stage, stem_maxpool=stem_maxpool)
    if mistake:
        raise ValueError(mistake)
    if name.startswith(TIMM):
        return _build_timm(name, image_size)
    resnet = torchvision.models.get_model(name, weights=None)
    modules = OrderedDict(resnet.named_children())
    channels = modules.pop("fc").in_features
    modules.pop("avgpool")
    if not stem_maxpool:
        modules.pop("maxpool")
    for stage in STAGES[STAGES.index(last_stage) + 1 :]:
        modules.pop(stage)
        channels //= 2
    return nn.Sequential(modules), channels


def _build_timm(name: str, image_size: int | None) -> tuple[nn.Module, int]:
    model = _create(name, pretrained=False)
    for head in TIMM_HEADS:
        if hasattr(model, head):
            setattr(model, head, nn.Identity())
    encoder = TimmEncoder(model)
    if image_size:
        try:
            with torch.no_grad():
                encoder.eval()(torch.zeros(1, 3, image_size, image_size))
        except Exception as error:  # each model refuses in its own way
            own = model.pretrained_cfg["input_size"][-1]
            raise UsageError(
                f"{name} cannot take --data.image_size {image_size} (its own is {own}): {_line(error)}"
            ) from None
    return encoder.train(), model.num_features


def _create(name: str, *, pretrained: bool) -> Any:
    timm, model = _timm(name), name.removeprefix(TIMM)
    try:  # position embeddings resized to the image in each pass, where a model has any: the weights fit every size
        return timm.create_model(model, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:
        return timm.create_model(model, pretrained=pretrained, num_classes=0)


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise UsageError(f'{name} needs timm: pip install "fastcr[timm]"') from None


def load_initial_weights(backbone: nn.Module, config: ModelConfig) -> list[str]:
    """Fill `backbone` as `config.weights` says; returns the names left random.

    A file may hold torchvision's or timm's own names, or one of the checkpoints of `PREFIXES`. Weights of later stages,
    of the classifier and of other parts of such a checkpoint (heads, key encoder, queue) are passed over.
    Raises `UsageError` for weights that cannot be had, are foreign, or leave part of the encoder unfilled without
    `--model.allow_missing_weights True`.
    """
    if config.weights == "none":
        return []
    encoder = backbone.timm if isinstance(backbone, TimmEncoder) else backbone
    wanted = encoder.state_dict()
    if config.weights == "imagenet":
        source, state = "ImageNet weights", _download(config.backbone)
    else:
        source, state = config.weights, backbone_state(read_state_dict(Path(config.weights)), wanted)
    if not state.keys() & wanted.keys():
        raise UsageError(f"{source} has no weight of a {config.backbone}; its keys begin {_some(state)}")
    beyond = _beyond(backbone, config.last_stage)
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
        shorter = "" if encoder is not backbone else "; --model.last_stage layer3 ends before layer4"
        raise UsageError(
            f"{source} lacks {len(missing)} of the encoder's weights, {_some(missing)} "
            f"(--model.allow_missing_weights True leaves them random{shorter})"
        )
    encoder.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)
    return missing


def backbone_state(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, in the names of `wanted`; `state` itself where no known prefix fits."""
    for prefix in PREFIXES:
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if part.keys() & wanted.keys():
            return part
        named = {_child_name(key): value for key, value in part.items()}
        if named.keys() & wanted.keys():
            return named
    return state


def _child_name(key: str) -> str:
    """torchvision's name for a key of `nn.Sequential(*resnet.children())`."""
    first, _, rest = key.partition(".")
    return f"{CHILDREN.get(first, first)}.{rest}"


def _beyond(backbone: nn.Module, last_stage: str) -> tuple[str, ...]:
    """First parts of the names of what comes after the encoder in the model it is taken from, or beside it."""
    if not isinstance(backbone, TimmEncoder):
        return (*STAGES[STAGES.index(last_stage) + 1 :], "fc", "branch")
    classifier = backbone.timm.pretrained_cfg["classifier"] or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    return (*TIMM_HEADS, "branch", *(name.split(".")[0] for name in names))


def _download(name: str) -> dict[str, Tensor]:
    if name.startswith(TIMM):
        return _download_timm(name)
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
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


def _download_timm(name: str) -> dict[str, Tensor]:
    model = name.removeprefix(TIMM)
    if not _timm(name).models.is_model_pretrained(model):
        raise UsageError(f"timm has no weights for {model}: pass --model.weights FILE or --model.weights none")
    try:
        return _create(name, pretrained=True).state_dict()
    except Exception as error:  # the hub's, the network's and the file's, each of its own kind
        raise UsageError(
            f"timm cannot get the weights of {model} ({_line(error)}): pass --model.weights FILE in timm's names "
            "(or --model.weights none)"
        ) from None


def _guess(name: str, names: Sequence[str], count: int) -> str:
    close = difflib.get_close_matches(name, names, n=count)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "nothing of a similar name"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _some(keys: object) -> str:
    names = sorted(keys)  # type: ignore[call-overload]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "nothing"
