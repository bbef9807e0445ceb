"""Attention drawn over the image it belongs to."""

from __future__ import annotations

from PIL import Image, ImageOps
from torch import Tensor

from fastcr.data.crops import centre_crop

COLD, WARM, HOT = "#1b1044", "#e0483e", "#fdf3a0"
STRENGTH = 0.75  # how far the most attended position is covered


def as_evaluated(image: Image.Image, image_size: int) -> Image.Image:
    """What evaluation sees of an RGB image: a square of `image_size` pixels from its centre."""
    return Image.fromarray(centre_crop(image, image_size).contiguous().numpy())


def overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """`image` with a map `[H,W]` of the same crop over it: warm where the map is high, bare where it is low.

    The map is scaled to its own maximum, so that flat maps look flat and warm throughout.
    """
    scaled = attention.detach().cpu().double() / attention.max().clamp_min(1e-12).item()
    heat = Image.fromarray((scaled * 255).round().byte().numpy())
    heat = heat.resize(image.size, Image.Resampling.BICUBIC)
    colours = ImageOps.colorize(heat, black=COLD, mid=WARM, white=HOT)
    return Image.composite(colours, image.convert("RGB"), heat.point(lambda value: round(value * STRENGTH)))
