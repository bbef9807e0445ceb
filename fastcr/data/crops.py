"""The centre crop that evaluation sees of a picture, and where the points of a picture lie in it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF


def centre_crop(picture: Image.Image, size: int) -> Tensor:
    """What evaluation sees of an RGB picture, uint8 `[size,size,3]`.

    The shorter side becomes `round(size*8/7)`, then the central square is cut.
    """
    crop = TF.resize(TF.pil_to_tensor(picture), [round(size * 8 / 7)], antialias=True)
    return TF.center_crop(crop, [size, size]).permute(1, 2, 0)


def in_crop(points: Tensor, sizes: Tensor, image_size: int) -> Tensor:
    """Points `[N,P,2]` (x, y), fractions of the image, as fractions of the square that evaluation cuts.

    `sizes` `[N,2]` are (height, width) in pixels. Evaluation resizes the shorter side to `round(image_size*8/7)`, then
    cuts the central square.
    """
    short = round(image_size * 8 / 7)
    height, width = sizes.double().unbind(1)
    # torchvision's rounding: the longer side down to a whole pixel, the crop's corner to the nearest
    scale = short / torch.minimum(height, width)
    resized = torch.stack([(width * scale + 1e-9).floor(), (height * scale + 1e-9).floor()], 1)
    corner = torch.from_numpy(np.round((resized - image_size).numpy() / 2))
    return (points * resized[:, None] - corner[:, None]) / image_size
