"""The centre crop that evaluation sees of an image, and where the points of an image lie in it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LONGEST = 16  # times the shorter side: what of an image is resized


def _shorter_side(size: int) -> int:
    """The shorter side, in pixels, to which an image is resized before the central square of `size` is cut."""
    return round(size * 8 / 7)


def enough(size: int) -> int:
    """The shorter side, in pixels, that `centre_crop` needs of a larger image: twice what it reduces that to."""
    return 2 * _shorter_side(size)


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """The central square of an RGB image, uint8 `[size,size,3]`; its side is 7/8 of the image's shorter side."""
    longest = LONGEST * min(image.size)
    if max(image.size) > longest:  # what is enlarged is kept small: a picture of 4 x 20,000 pixels would take gigabytes
        across, down = (max(side - longest, 0) // 2 for side in image.size)
        image = image.crop((across, down, image.width - across, image.height - down))
    short = _shorter_side(size)
    height, width = (int(short * side / min(image.size)) for side in image.size[::-1])
    top, left = (round((side - size) / 2) for side in (height, width))
    return resized(image, height, width)[top : top + size, left : left + size]


def resized(image: Image.Image, height: int, width: int, mode: str = "bilinear") -> Tensor:
    """An RGB image in another size, uint8 `[height,width,3]`, as torchvision makes it: within a rounding of PIL's."""
    pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
    if image.size != (width, height):
        pixels = F.interpolate(pixels, (height, width), mode=mode, align_corners=False, antialias=True)
    return pixels[0].permute(1, 2, 0)


def in_crop(points: Tensor, sizes: Tensor, image_size: int) -> Tensor:
    """Points `[N,P,2]` (x, y), fractions of the image, as fractions of the square that `centre_crop` cuts.

    `sizes` `[N,2]` are the images' (height, width) in pixels, `image_size` is the side of the square.
    """
    height, width = sizes.double().unbind(1)
    # torchvision's rounding: the longer side down to a whole pixel, the crop's corner to the nearest
    scale = _shorter_side(image_size) / torch.minimum(height, width)
    resized = torch.stack([(width * scale + 1e-9).floor(), (height * scale + 1e-9).floor()], 1)
    corner = torch.from_numpy(np.round((resized - image_size).numpy() / 2))
    return (points * resized[:, None] - corner[:, None]) / image_size


def centres_of(high: int, wide: int) -> Tensor:
    """Centres `[high*wide,2]` (x, y) of the positions of a map, fractions of the square, row by row."""
    y, x = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in (high, wide))
    return torch.stack([x.repeat(high), y.repeat_interleave(wide)], 1)
