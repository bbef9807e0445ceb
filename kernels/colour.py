"""What `two_views` does to the colours of a view: torchvision's jitter, in torch and in Triton; blur in torch.

    0 brightness   clamp(f x)
    1 contrast     clamp(f x + (1 - f) mean(grey(x)))      mean over the view
    2 saturation   clamp(f x + (1 - f) grey(x))
    3 hue          the HSV hue turned by f turns

x red, green, blue in [0, 1]; grey(x) = .2989 r + .587 g + .114 b. A channel of a saturated colour is a trapezium over
the hue `t` in turns, `clamp(|6t - 3| - 1, 0, 1)`, shifted by thirds of a turn for green and blue.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

GREY = (0.2989, 0.587, 0.114)


def grey_reference(x: Tensor) -> Tensor:
    """Grey `[H,W]` of `[3,H,W]`."""
    return torch.tensordot(x.new_tensor(GREY), x, 1)


def jitter_reference(x: Tensor, which: int, factor: float) -> Tensor:
    """One of the four adjustments of a view `[3,H,W]`, by its number above; any other number: none."""
    match which:
        case 0:
            mixed = factor * x
        case 1:
            mixed = (factor * x).add_((1 - factor) * (x.mean((1, 2)) @ x.new_tensor(GREY)))
        case 2:
            mixed = torch.lerp(grey_reference(x), x, factor)
        case 3:
            return _turned(x, factor)
        case _:
            return x
    return mixed if 0 <= factor <= 1 else mixed.clamp_(0, 1)  # a mean of colours is a colour


def _turned(x: Tensor, turns: float) -> Tensor:
    """Turn the hue, found in sixths of a turn from red as `s` from 0 to 3, towards green or, negative, towards blue.

    `s = 1 + (g + b - r - low) / chroma`: from red to cyan first green rises, then red falls, then blue rises.
    """
    r, g, b = x
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b).sub_(low)
    s = (g + b).sub_(r).sub_(low).div_(chroma.clamp(min=torch.finfo(x.dtype).tiny)).add_(1)
    hue = s.copysign_(g - b).add_(6 * turns)
    hue.sub_(torch.round(hue / 6), alpha=6)  # from -3 to 3 again
    t = hue + x.new_tensor([0, -2, 2])[:, None, None]
    return torch.addcmul(low, chroma, t.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1))


def blur_reference(x: Tensor, sigma: float, window: int) -> Tensor:
    """Gaussian blur of a view `[3,H,W]`: `sigma` pixels, `window` taps an axis, odd; edges reflected."""
    reach = window // 2
    taps = torch.arange(window, dtype=x.dtype, device=x.device) - reach
    weights = torch.softmax(-0.5 * (taps / sigma) ** 2, 0).tolist()
    for axis, edges in ((1, [0, 0, reach, reach]), (2, [reach, reach, 0, 0])):
        padded, side = F.pad(x, edges, mode="reflect"), x.shape[axis]
        x = torch.zeros_like(x)
        for i, weight in enumerate(weights):  # on a CPU twice as fast as a convolution
            x.add_(padded.narrow(axis, i, side), alpha=weight)
    return x


if triton is not None:

    @triton.jit
    def luma(r, g, b):
        """Grey of a colour."""
        return 0.2989 * r + 0.587 * g + 0.114 * b

    @triton.jit
    def _mix(x, other, factor):
        return tl.minimum(tl.maximum(factor * x + (1 - factor) * other, 0.0), 1.0)

    @triton.jit
    def _channel(t, low, chroma):
        t = t - tl.floor(t)
        return low + chroma * tl.minimum(tl.maximum(tl.abs(6 * t - 3) - 1, 0.0), 1.0)

    @triton.jit
    def jitter(r, g, b, which, factors, mean):
        """One of the four adjustments by its factor in `factors`, none for -1; `mean` grey of the view for contrast."""
        factor = tl.load(factors + which, mask=which >= 0, other=1.0)
        if which == 0:
            r, g, b = _mix(r, 0.0, factor), _mix(g, 0.0, factor), _mix(b, 0.0, factor)
        elif which == 1:
            r, g, b = _mix(r, mean, factor), _mix(g, mean, factor), _mix(b, mean, factor)
        elif which == 2:
            grey = luma(r, g, b)
            r, g, b = _mix(r, grey, factor), _mix(g, grey, factor), _mix(b, grey, factor)
        elif which == 3:
            high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
            chroma = high - low
            sixth = 1 / (6 * tl.where(chroma == 0, 1.0, chroma))
            green_or_blue = tl.where(g == high, (b - r) * sixth + 1 / 3, (r - g) * sixth + 2 / 3)
            hue = tl.where(r == high, (g - b) * sixth, green_or_blue) + factor
            r, g = _channel(hue, low, chroma), _channel(hue + 2 / 3, low, chroma)
            b = _channel(hue + 1 / 3, low, chroma)
        return r, g, b
