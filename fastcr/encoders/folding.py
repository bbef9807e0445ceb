"""BatchNorm whose statistics stay, folded into the convolution before it: no pass over the feature maps is left of it.

With its running statistics a BatchNorm multiplies each channel by `scale = gamma / sqrt(variance + eps)`, so

    norm(convolution(x; weight, bias)) = convolution(x; weight * scale, (bias - mean) * scale + beta)

In training this is done anew in each pass, which gives weight, bias, gamma and beta the gradients that they have
without it; once only, where none of them is trained. For evaluation it is done once, in a copy.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FoldedConv2d(nn.Conv2d):
    """A convolution `[B,C,H,W]` to `[B,K,h,w]` that also does the work of the BatchNorm after it.

    It takes over the parameters of `convolution` under their names. `norm` keeps its place in the network and is no
    submodule here; a deep copy of the network copies it once, for both places.
    """

    norm: nn.BatchNorm2d
    kept: tuple[Tensor, Tensor] | None  # weight and bias of both, where they do not change

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        nn.Module.__init__(self)
        same = type(convolution) is _timm("Conv2dSame")
        vars(self).update(vars(convolution), norm=norm, kept=None, pads_as_needed=same)

    def keep(self, dtype: torch.dtype | None = None) -> None:
        """Fold for good, for autocast to `dtype` if that is given; the parameters must not change from now on."""
        with torch.no_grad():
            weight, bias = fold(self, self.norm)
        self.kept = weight.to(dtype or weight.dtype), bias.to(dtype or bias.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """What the norm gives after the convolution."""
        weight, bias = self.kept or fold(self, self.norm)
        if self.pads_as_needed:
            images = _timm("pad_same")(images, self.kernel_size, self.stride, self.dilation)
        return self._conv_forward(images, weight, bias)


class FoldedNorm(nn.BatchNorm2d):
    """A BatchNorm whose work a convolution does: only the activation of timm's BatchNorm is left to do here.

    Parameters and statistics keep their names; the statistics do not change, in training mode either.
    """

    act: nn.Module  # of timm's, as is drop
    drop: nn.Module

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(norm))

    def forward(self, features: Tensor) -> Tensor:
        """Features `[B,C,H,W]` as they are, or activated."""
        return self.act(self.drop(features)) if hasattr(self, "act") else features


def fold_norms(backbone: nn.Module, image_size: int) -> None:
    """Fold the BatchNorms of a backbone, images `[B,3,image_size,image_size]` to features, in each of its passes.

    A norm that is not the only one to take what a convolution gives stays as it is.
    """
    new = dict[nn.Module, nn.Module]()
    for convolution, norm in find_pairs(backbone, image_size):
        new[norm] = folded = FoldedNorm(norm)
        new[convolution] = FoldedConv2d(convolution, folded)
    for name, module in list(backbone.named_modules(remove_duplicate=False)):
        if module in new:
            backbone.set_submodule(name, new[module])


def folded_copy(backbone: nn.Module, image_size: int) -> nn.Module:
    """A copy of a backbone for evaluation, with norms folded once and without gradients of its parameters."""
    with torch.inference_mode(False), torch.no_grad():
        copied = copy.deepcopy(backbone).requires_grad_(False)
        if not any(isinstance(module, FoldedConv2d) for module in copied.modules()):
            fold_norms(copied, image_size)
        for module in copied.modules():
            if isinstance(module, FoldedConv2d):
                module.keep()
    return copied


def fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of both as one convolution; in fp32 under autocast too, which casts them afterwards."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt() * norm.weight
    bias = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
    return convolution.weight * scale.view(-1, 1, 1, 1), torch.addcmul(norm.bias, bias, scale)


def find_pairs(backbone: nn.Module, image_size: int) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Pairs of a convolution and the BatchNorm that alone takes its output, found by a pass of one image.

    Both must run once in it; which of them an operation is of is seen from the weight that it takes.
    """
    tried = copy.deepcopy(backbone).eval()
    own: dict[nn.Module, Any] = dict(zip(tried.modules(), backbone.modules(), strict=True))
    convolutions: dict[int, nn.Conv2d] = {
        id(each.weight): own[each] for each in own if type(each) in (nn.Conv2d, _timm("Conv2dSame"))
    }
    candidates: list[Any] = [each for each in own if type(each) in (nn.BatchNorm2d, _timm("BatchNormAct2d"))]
    norms: dict[int, nn.BatchNorm2d] = {
        id(each.weight): own[each] for each in candidates if each.running_var is not None and each.affine
    }
    image = next(tried.parameters()).new_zeros(1, 3, image_size, image_size)
    with torch.no_grad(), _Record() as record:
        features = tried(image)
    takes = [[id(each) for each in inputs] for inputs, _ in record.operations]
    uses = Counter(itertools.chain(*takes, map(id, tree_leaves(features))))
    made, pairs = dict[int, nn.Conv2d](), list[tuple[nn.Conv2d, nn.BatchNorm2d]]()
    for taken, (_, output) in zip(takes, record.operations, strict=True):
        for weight in (each for each in taken if uses[each] == 1):
            if weight in convolutions:
                made[id(output)] = convolutions[weight]
            elif weight in norms and taken[0] in made and uses[taken[0]] == 1:
                pairs.append((made[taken[0]], norms[weight]))
    return pairs


def _timm(name: str) -> Any:
    """A layer or function of timm's; None where timm is not in use."""
    return getattr(sys.modules.get("timm.layers"), name, None)


class _Record(TorchDispatchMode):
    """The operations inside it: the tensors that each takes, and what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = list[tuple[list[Any], Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and note it; the tensors are kept, so that none gets the identity of another."""
        output = func(*args, **(kwargs or {}))
        self.operations.append(([each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)], output))
        return output
