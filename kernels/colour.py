"""Colour jitter as torchvision defines it, in torch and in Triton: what `two_views` does to a pixel's colour.

    0 brightness   clamp(f x)
    1 contrast     clamp(f x + (1 - f) mean(grey(x)))      mean over the view
    2 saturation   clamp(f x + (1 - f) grey(x))
    3 hue          the HSV hue turned by f turns

x red, green, blue in [0, 1]; grey(x) = .2989 r + .587 g + .114 b. A channel of a saturated colour is a trapezium over
the hue `t` in turns, `clamp(|6t - 3| - 1, 0, 1)`, shifted by thirds of a turn for green and blue.
"""

from __future__ import annotations

import torch
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
            return (factor * x).clamp(0, 1)
        case 1:
            return (factor * x + (1 - factor) * grey_reference(x).mean()).clamp(0, 1)
        case 2:
            return (factor * x + (1 - factor) * grey_reference(x)).clamp(0, 1)
        case 3:
            high, largest = x.max(0)
            low = x.amin(0)
            chroma = high - low
            r, g, b = x
            within = torch.stack([g - b, b - r, r - g]).gather(0, largest[None])[0]  # of the sixth around the largest
            hue = within / (6 * torch.where(chroma == 0, 1, chroma)) + largest / 3 + factor
            t = (hue + x.new_tensor([0, 2 / 3, 1 / 3])[:, None, None]) % 1
            return low + chroma * ((6 * t - 3).abs() - 1).clamp(0, 1)
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
