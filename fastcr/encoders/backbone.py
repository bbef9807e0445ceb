"""The encoder: a torchvision ResNet or a timm model up to its last feature map, and where its weights come from."""

from __future__ import annotations

import difflib
import importlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcr.data.views import MEAN, STD
from fastcr.errors import UsageError, one_line

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
STAGES = ("layer1", "layer2", "layer3", "layer4")
TIMM = "timm:"
PACKAGED = "timm:tf_efficientnet_lite0"  # its weights come as a package too, together with timm in the extra `demo`
# what may come after the last feature map of a timm model; the classifier's own name is in its `pretrained_cfg`
TIMM_HEADS = ("head", "head_dist", "attn_pool", "pre_logits")
Colours = tuple[Sequence[float] | None, Sequence[float] | None]  # mean and std, red, green, blue; None: the usual ones


class TimmEncoder(nn.Module):
    """The model `timm` up to its last feature map; square or oblong images `[B,3,H,W]` to features `[B,C,h,w]`.

    Images come normalised with ImageNet's mean and std, and are put to `colours`, those that the model's own
    weights expect; by default timm's. The class token and its like are left out; the others lie on their grid.

    Attributes:
        has_class_token: whether the model has one, which `with_class_token` gives.
    """

    timm: Any
    scale: Tensor
    shift: Tensor

    def __init__(self, model: Any, colours: Colours = (None, None)) -> None:
        super().__init__()
        self.timm = model
        mean, std = (tuple(own or model.pretrained_cfg[key]) for own, key in zip(colours, ("mean", "std"), strict=True))
        plain = isinstance(getattr(model, "fc_norm", nn.Identity()), nn.Identity)  # else its token is not normalised
        self.has_class_token = plain and getattr(model, "cls_token", None) is not None
        self.renormalise = (mean, std) != (MEAN, STD)
        self.register_buffer("scale", (torch.tensor(STD) / torch.tensor(std)).view(3, 1, 1), persistent=False)
        shift = (torch.tensor(MEAN) - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[B,C,h,w]`; `ValueError` if the model's are no map."""
        return self.with_class_token(images)[0]

    def with_class_token(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features `[B,C,h,w]`, and the class token `[B,C]` of a model that has one."""
        if self.renormalise:
            images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        features = self.timm.forward_features(images)
        return self._map(features, images), features[:, 0] if self.has_class_token else None

    def _map(self, features: Any, images: Tensor) -> Tensor:
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


def backbone_mistake(name: str, last_stage: str = "layer4") -> str | None:
    """What is wrong with these settings, on one line; None if they name an encoder.

    Raises `UsageError` for a timm model where there is no timm.
    """
    known, found = list(RESNETS), name in RESNETS
    if name.startswith(TIMM):
        timm, model = import_timm(name), name.removeprefix(TIMM)
        tagged = timm.list_pretrained()
        known = [TIMM + each for each in timm.list_models() + tagged]
        found = model in tagged if "." in model else timm.is_model(model)
    if not found:
        guess = [f"did you mean {close!r}?" for close in difflib.get_close_matches(name, known, n=1)]
        there_are = f"there are {', '.join(RESNETS)} and timm:NAME"
        return f"--model.backbone: no encoder {name!r} ({' '.join([*guess, there_are])})"
    if last_stage != "layer4" and (name.startswith(TIMM) or last_stage not in STAGES):
        return f"--model.last_stage {last_stage} does not fit {name}: a timm model is taken whole (layer4)"
    return None


def build_backbone(
    name: str,
    last_stage: str = "layer4",
    *,
    stem_maxpool: bool = True,
    image_size: int | None = None,
    colours: Colours = (None, None),
) -> tuple[nn.Module, int]:
    """A randomly initialised encoder, images `[B,3,H,W]` to its last features `[B,C,h,w]`, and `C`.

    The parameters of a ResNet keep torchvision's names (`h = H/32`; layer3: `H/16`), those of `timm:NAME` timm's, after
    `timm.`. Raises `ValueError` for what `backbone_mistake` names, `UsageError` without timm, if the encoder gives
    no map for images of side `image_size`, where that is given, or for a ResNet with `colours` of its own.
    """
    mistake = backbone_mistake(name, last_stage)
    if mistake:
        raise ValueError(mistake)
    if name.startswith(TIMM):
        return _build_timm(name, image_size, colours)
    if any(own and tuple(own) != usual for own, usual in zip(colours, (MEAN, STD), strict=True)):
        raise UsageError(f"{name} takes images normalised as ImageNet's: weights of others need timm:{name}")
    resnet = importlib.import_module("torchvision").models.get_model(name, weights=None)
    modules = OrderedDict(resnet.named_children())
    channels = modules.pop("fc").in_features
    modules.pop("avgpool")
    if not stem_maxpool:
        modules.pop("maxpool")
    for stage in STAGES[STAGES.index(last_stage) + 1 :]:
        modules.pop(stage)
        channels //= 2
    return nn.Sequential(modules), channels


def freeze_stages(backbone: nn.Module, count: int | Literal["half"]) -> None:
    """Take the stem and the `count` stages after it from training, the statistics of their BatchNorms included.

    0 takes nothing, not even the stem; "half" is half of the stages, rounded down. `UsageError` for all stages of the
    backbone, or more.
    """
    if not count:
        return
    if isinstance(backbone, TimmEncoder):
        timm = importlib.import_module("timm")
        groups = timm.models.group_parameters(backbone.timm, backbone.timm.group_matcher(coarse=True))
        stages = [[f"timm.{name}" for name in groups[number]] for number in sorted(groups)]
    else:
        names = [name for name, _ in backbone.named_parameters()]
        stages = [[name for name in names if name.startswith(stage)] for stage in STAGES]
        stages = [[name for name in names if not name.startswith("layer")], *filter(None, stages)]
    if count == "half":
        count = (len(stages) - 1) // 2
    if count >= len(stages) - 1:
        raise UsageError(
            f"--model.frozen_stages {count}: this backbone has {len(stages) - 1}, so at most {len(stages) - 2}"
        )
    for name in itertools.chain.from_iterable(stages[: count + 1]):
        backbone.get_parameter(name).requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def usual_size(name: str) -> int | None:
    """Side of the images that a backbone's published weights were made for, pixels; None where timm does not say."""
    if not name.startswith(TIMM):
        return 224
    config = import_timm(name).get_pretrained_cfg(name.removeprefix(TIMM))
    return config.input_size[-1] if config else None


def synchronise_norms(model: nn.Module) -> None:
    """Put in place of each BatchNorm in `model` one that takes the statistics of all processes."""
    if any(isinstance(module, TimmEncoder) for module in model.modules()):  # torch's would drop the activations
        importlib.import_module("timm.layers").convert_sync_batchnorm(model)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _build_timm(name: str, image_size: int | None, colours: Colours) -> tuple[nn.Module, int]:
    model = create_timm(name, pretrained=False)
    for head in TIMM_HEADS:
        if hasattr(model, head):
            setattr(model, head, nn.Identity())
    encoder = TimmEncoder(model, colours)
    if image_size:
        check_size(encoder, name, image_size, f"--data.image_size {image_size}")
    return encoder.train(), model.num_features


def check_size(encoder: TimmEncoder, name: str, size: int, setting: str) -> None:
    """`UsageError`, which names the `setting`, where images of side `size` are none for `encoder`, timm's `name`."""
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # each model refuses in its own way
        own = encoder.timm.pretrained_cfg["input_size"][-1]
        raise UsageError(f"{name} cannot take {setting} (its own is {own}): {one_line(error)}") from None
    encoder.train()


def create_timm(name: str, *, pretrained: bool) -> Any:
    """The timm model that `timm:NAME` means, without its classifier."""
    timm, model = import_timm(name), name.removeprefix(TIMM)
    try:  # position embeddings resized to the image in each pass, where a model has any: the weights fit every size
        return timm.create_model(model, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:
        return timm.create_model(model, pretrained=pretrained, num_classes=0)


def import_timm(name: str) -> Any:
    """The package timm. `UsageError` if it is not installed."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        extra = "demo" if name == PACKAGED else "timm"
        raise UsageError(f'{name} needs timm: pip install "fastcr[{extra}]"') from None


def mean_pool(features: Tensor) -> Tensor:
    """Features `[B,C,H,W]` to their mean `[B,C]` in fp32, so that GradCAM's gradient is fp32 under autocast too.

    Their gradient is channels-last and in their dtype: expanded in fp32, written once in 16 bits.
    """
    # the division comes last: before it, the backward pass would write the gradients of all positions in fp32
    return features.permute(0, 2, 3, 1).sum((1, 2), dtype=torch.float32) / (features.shape[2] * features.shape[3])
