"""BatchNorm whose statistics stay, folded into the convolution before it: no pass over the feature maps is left of it.

With its running statistics a BatchNorm multiplies each channel by `scale = gamma / sqrt(variance + eps)`, so

    norm(convolution(x; weight, bias)) = convolution(x; weight * scale, (bias - mean) * scale + beta)

Done anew in each pass, this gives weight, bias, gamma and beta the gradients that they have without it. Modules,
parameters and their names stay as they are, and a BatchNorm in training mode does what it always did.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


def fold_norms(backbone: nn.Module, image_size: int) -> None:
    """Let the BatchNorms of a backbone, images `[B,3,image_size,image_size]` to features, be folded in eval mode.

    Those that are not the only ones to take what a convolution gives stay as they are.
    """
    for convolution, norm in find_pairs(backbone, image_size):
        # partials, because a deep copy of the backbone takes them to its own modules
        convolution.forward = partial(_convolve, convolution, norm)  # type: ignore[method-assign]
        norm.forward = partial(_finish, norm)  # type: ignore[method-assign]


def unfold_norms(backbone: nn.Module) -> None:
    """Undo `fold_norms`."""
    for module in backbone.modules():
        if _is_folded(module):
            del module.forward


def _is_folded(module: nn.Module) -> bool:
    """Whether `fold_norms` gave it another forward pass."""
    return getattr(vars(module).get("forward"), "func", None) in (_convolve, _finish)


@contextmanager
def folded_once(backbone: nn.Module, image_size: int) -> Iterator[None]:
    """Inside it weights and statistics shall not change, and are folded once, without gradients.

    A compiled backbone is left as it is: what it was compiled for would no longer hold.
    """
    if backbone._compiled_call_impl is not None:
        yield
        return
    before = {module: vars(module)["forward"] for module in backbone.modules() if _is_folded(module)}
    pairs = [each.args for each in before.values() if len(each.args) == 2] or find_pairs(backbone, image_size)
    for convolution, norm in pairs:
        with torch.inference_mode(False), torch.no_grad():
            kept = fold(convolution, norm)
        convolution.forward = partial(_convolve, convolution, norm, kept=kept)  # type: ignore[method-assign]
        norm.forward = partial(_finish, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        unfold_norms(backbone)
        for module, forward in before.items():
            module.forward = forward


def find_pairs(backbone: nn.Module, image_size: int) -> list[Pair]:
    """Convolutions and the BatchNorms that alone take what they give, as a pass of one image shows."""
    tried = copy.deepcopy(backbone).eval()
    own = dict(zip(tried.modules(), backbone.modules(), strict=True))
    convolutions, norms = ([each for each in own if kind(each)] for kind in (_is_plain_convolution, _is_plain_norm))
    if not (convolutions and norms):
        return []
    seen = _Seen()
    for each in convolutions:
        each.register_forward_hook(seen.made_by)
    for each in norms:
        each.register_forward_pre_hook(seen.taken_by)
    parameter = next(tried.parameters())
    with torch.no_grad(), seen:
        features = tried(parameter.new_zeros(1, 3, image_size, image_size))
    seen.count(features)
    found: list[Any] = [(own[convolution], own[norm]) for convolution, norm in seen.pairs()]
    return found


def _is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module does what `_convolve` does, but for the norm."""
    if not isinstance(module, nn.Conv2d) or "forward" in vars(module):
        return False
    inherited = type(module).forward, type(module)._conv_forward
    return type(module) is _timm("Conv2dSame") or inherited == (nn.Conv2d.forward, nn.Conv2d._conv_forward)


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a module does what `_finish` does, and the norm; in eval mode with statistics of its own."""
    if not isinstance(module, nn.BatchNorm2d) or "forward" in vars(module) or module.running_var is None:
        return False
    return type(module) is _timm("BatchNormAct2d") or type(module).forward is nn.BatchNorm2d.forward


def _timm(name: str) -> Any:
    """A layer of timm; None where timm is not in use."""
    return getattr(sys.modules.get("timm.layers"), name, None)


class _Seen(TorchDispatchMode):
    """Under it: which convolution made what, which norm took it, and how many operations did."""

    def __init__(self) -> None:
        super().__init__()
        self.made = dict[int, tuple[nn.Module, Tensor]]()  # tensors are kept, so that none gets the number of another
        self.taken = dict[int, nn.Module]()
        self.uses, self.calls = Counter[int](), Counter[nn.Module]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count what it takes."""
        self.count((args, kwargs))
        return func(*args, **(kwargs or {}))

    def count(self, taken: Any) -> None:
        """One more use of each tensor in `taken`."""
        self.uses.update(id(each) for each in tree_leaves(taken) if id(each) in self.made)

    def made_by(self, convolution: nn.Module, args: Any, output: Tensor) -> None:
        """Hook after a convolution."""
        self.calls[convolution] += 1
        self.made[id(output)] = convolution, output

    def taken_by(self, norm: nn.Module, args: Any) -> None:
        """Hook before a norm."""
        self.calls[norm] += 1
        self.taken[id(args[0])] = norm

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Convolutions that ran once, and the norms that did and took what they made, when nothing else did."""
        alone = [each for each in self.made if each in self.taken and self.uses[each] == 1]
        pairs = [(self.made[each][0], self.taken[each]) for each in alone]
        return [pair for pair in pairs if all(self.calls[module] == 1 for module in pair)]


def _convolve(
    convolution: nn.Conv2d, norm: nn.BatchNorm2d, images: Tensor, kept: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Forward pass of a convolution, and with running statistics of the norm after it, as `kept` or folded here."""
    if _stays(norm):
        return type(convolution).forward(convolution, images)
    weight, bias = kept or fold(convolution, norm)
    if type(convolution) is _timm("Conv2dSame"):
        images = _timm("pad_same")(images, convolution.kernel_size, convolution.stride, convolution.dilation)
    return convolution._conv_forward(images, weight, bias)


def _finish(norm: Any, features: Tensor) -> Tensor:
    """What is left of the norm's forward pass: nothing, or the activation of timm's."""
    if _stays(norm):
        return type(norm).forward(norm, features)
    return norm.act(norm.drop(features)) if type(norm) is _timm("BatchNormAct2d") else features


def _stays(norm: nn.BatchNorm2d) -> bool:
    """Whether it is done as ever: with the statistics of the batch, and in an exported graph, whose users fold it."""
    return norm.training or torch.compiler.is_exporting()


def fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of both as one convolution; in fp32 under autocast too, which casts them afterwards."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    bias = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
    bias = bias * scale if norm.bias is None else torch.addcmul(norm.bias, bias, scale)
    return convolution.weight * scale.view(-1, 1, 1, 1), bias
