"""Attention drawn over the picture it belongs to."""

from __future__ import annotations

from PIL import Image, ImageOps
from torch import Tensor

COLD, WARM, HOT = "#1b1044", "#e0483e", "#fdf3a0"
STRENGTH = 0.75  # how far the most attended place is covered


def overlay(picture: Image.Image, attention: Tensor) -> Image.Image:
    """`picture` with a map `[H,W]` of the same cut over it: warm where the map is high, bare where it is low.

    The map is scaled to its own maximum, so that flat maps look flat and warm throughout.
    """
    scaled = attention.detach().cpu().double() / attention.max().clamp_min(1e-12).item()
    heat = Image.fromarray((scaled * 255).round().byte().numpy())
    heat = heat.resize(picture.size, Image.Resampling.BICUBIC)
    colours = ImageOps.colorize(heat, black=COLD, mid=WARM, white=HOT)
    return Image.composite(colours, picture.convert("RGB"), heat.point(lambda value: round(value * STRENGTH)))
