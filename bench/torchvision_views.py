"""The same augmentation by torchvision: what the loaders' views are timed beside, and tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastcr.data.views import ViewParameters

ADJUSTMENTS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def torchvision_view(image: Tensor, parameters: ViewParameters, view: int, size: int) -> Tensor:
    """View `view` of one image: uint8 `[3,H,W]` to uint8 `[size,size,3]`; `parameters` are of that image alone."""
    p = ViewParameters(*(values[0, view] for values in parameters))
    cropped = F.resized_crop(image, *p.crop.tolist(), [size, size], antialias=True)
    x = F.to_dtype(cropped, torch.float32, scale=True)
    for which in p.order[p.order >= 0].tolist() if p.jitter else ():
        x = ADJUSTMENTS[which](x, float(p.factors[which]))
    if p.grey:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if p.blur:
        x = F.gaussian_blur(x, [int(p.window)] * 2, [float(p.sigma)])
    if p.flip:
        x = F.horizontal_flip(x)
    return x.mul(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous()
