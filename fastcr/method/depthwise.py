"""Depthwise convolutions whose gradients a CPU computes fast.

torch's CPU kernels have fast gradients for depthwise convolutions of stride 1 and 3 x 3 taps, and very slow ones for
others: in bf16, the weight gradient of 5 x 5 taps takes twenty times as long as the forward pass. The same gradients
are made of fast parts: those of a stride by putting zeros between the outputs, those of more taps from tiles of 3 x 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TILE = 3
Pair = tuple[int, int]


def is_slow(weight: Tensor, stride: Pair, groups: int) -> bool:
    """Whether torch's own gradients of this convolution are slow: depthwise, with a stride or more than 3 x 3 taps."""
    depthwise = groups == len(weight) > 1 and weight.shape[1] == 1
    high, wide = weight.shape[2:]
    return depthwise and min(high, wide) >= TILE and max(high, wide, TILE * max(stride)) > TILE


def has_slow_gradients(backbone: nn.Module) -> bool:
    """Whether any convolution of the backbone is slow."""
    convolutions = [each for each in backbone.modules() if isinstance(each, nn.Conv2d)]
    return any(is_slow(each.weight, _pair(each.stride), each.groups) for each in convolutions)


class FastGradients(TorchFunctionMode):
    """Inside it, slow depthwise convolutions on the CPU have fast gradients; all else is as it was."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `function`, or for a slow convolution, `Depthwise`."""
        if function is torch.conv2d and not kwargs and len(args) == 7 and torch.is_grad_enabled():
            images, weight, bias, stride, padding, dilation, groups = args
            plain = not isinstance(padding, str) and _pair(dilation) == (1, 1)
            if plain and is_slow(weight, _pair(stride), groups):
                return Depthwise.apply(images, weight, bias, _pair(stride), _pair(padding))
        return function(*args, **(kwargs or {}))


def _pair(value: Any) -> Pair:
    """A number for each side of an image, of one number for both or of two."""
    return (value, value) if isinstance(value, int) else tuple(value)


class Depthwise(torch.autograd.Function):
    """Depthwise convolution of images `[B,C,H,W]` with `[C,1,k,l]`: torch's forward, and gradients of fast parts."""

    @staticmethod
    def forward(
        context: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
    ) -> Tensor:
        """As `F.conv2d` with a group for each channel, under autocast too."""
        if torch.is_autocast_enabled("cpu"):
            images, weight = (each.to(torch.get_autocast_dtype("cpu")) for each in (images, weight))
            bias = None if bias is None else bias.to(images.dtype)
        context.save_for_backward(images, weight)
        context.stride, context.padding = stride, padding
        return F.conv2d(images, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of images, weight and bias, in the precision of the output."""
        images, weight = context.saved_tensors
        of_images, of_weight, of_bias, *_ = context.needs_input_grad
        bias = gradient.sum((0, 2, 3)) if of_bias else None
        padded = F.pad(images, (context.padding[1],) * 2 + (context.padding[0],) * 2)
        spread = _spread(gradient, padded, weight, context.stride)
        found = _gradients(spread, padded, weight, "images") if of_images else None
        if found is not None:
            top, left = context.padding
            found = found[:, :, top : top + images.shape[2], left : left + images.shape[3]]
        return found, _of_weight(spread, padded, weight) if of_weight else None, bias, None, None


def _spread(gradient: Tensor, padded: Tensor, weight: Tensor, stride: Pair) -> Tensor:
    """The gradient of the output that stride 1 would have: zeros where a larger one has none."""
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    if stride == (1, 1):
        return gradient
    sides = [padded.shape[i] - weight.shape[i] + 1 for i in (2, 3)]
    spread = gradient.new_zeros(*gradient.shape[:2], *sides).to(memory_format=torch.channels_last)
    spread[:, :, :: stride[0], :: stride[1]] = gradient
    return spread


def _of_weight(spread: Tensor, padded: Tensor, weight: Tensor) -> Tensor:
    """Gradient `[C,1,k,l]`, tile by tile: each is the gradient of a convolution with 3 x 3 taps."""
    found, (high, wide) = torch.empty_like(weight), spread.shape[2:]
    for top in _tiles(weight.shape[2]):
        for left in _tiles(weight.shape[3]):
            seen = padded[:, :, top : top + high + TILE - 1, left : left + wide + TILE - 1]
            tile = _gradients(spread, seen, weight[:, :, :TILE, :TILE], "weight")
            found[:, :, top : top + TILE, left : left + TILE] = tile
    return found


def _tiles(taps: int) -> list[int]:
    """Where tiles begin that cover so many taps; the last may overlap the one before."""
    return [*range(0, taps - TILE, TILE), taps - TILE]


def _gradients(gradient: Tensor, images: Tensor, weight: Tensor, of: str) -> Tensor:
    """torch's own gradient `of` the images or the weight, of a depthwise convolution without stride and padding."""
    wanted, none = [of == "images", of == "weight", False], [0, 0]
    found = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, [1, 1], none, [1, 1], False, none, len(weight), wanted
    )
    return found[0 if of == "images" else 1]
