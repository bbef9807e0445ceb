"""Files, or cached pixels, to two views with PIL and torchvision: the reference for every other loader."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from fastcr.data.images import BadFiles, ImageList
from fastcr.data.views import Batch, Loading, ViewParameters, draw_parameters, normalise
from fastcr.runs.machine import leave_signals

Sample = tuple[Tensor, list[int]]
ADJUSTMENTS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def augment(image: Tensor, parameters: ViewParameters, view: int, size: int) -> Tensor:
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


class _ViewDataset(Dataset[Sample]):
    """`(epoch, index)` to the two views of an image, uint8 `[2,S,S,3]`, and the images skipped as unreadable."""

    def __init__(self, images: ImageList, loading: Loading) -> None:
        self.images, self.loading = images, loading

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        rgb, bad = self.images.rgb_or_next(index)
        image = F.pil_to_tensor(rgb)
        loading, size = self.loading, np.array([image.shape[1:]])
        parameters = draw_parameters(loading.seed, epoch, np.array([index]), size, loading.views)
        return torch.stack([augment(image, parameters, view, loading.image_size) for view in (0, 1)]), bad


def _collate(samples: list[Sample]) -> tuple[Tensor, list[int]]:
    return torch.stack([views for views, _ in samples], dim=1), [index for _, bad in samples for index in bad]


class TorchViews:
    """Two views of each image through torchvision, decoded and augmented by worker processes."""

    def __init__(self, images: ImageList, loading: Loading, bad: BadFiles) -> None:
        self.images, self.loading, self.bad = images, loading, bad

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        loading = self.loading
        steps = loading.steps(len(self.images), start_step)
        loader = DataLoader(
            _ViewDataset(self.images, loading),
            batch_sampler=([(epoch, index) for index in indices.tolist()] for epoch, indices in steps),
            num_workers=loading.workers,
            collate_fn=_collate,
            pin_memory=loading.device.type == "cuda",
            worker_init_fn=leave_signals,
        )
        numbers = (indices for _, indices in loading.steps(len(self.images), start_step))
        for (pixels, bad), indices in zip(loader, numbers, strict=False):
            for index in bad:
                self.bad.note(index)
            first, second = pixels.to(loading.device, non_blocking=True)
            images = torch.from_numpy(indices).to(loading.device)
            yield Batch(normalise(first, loading.dtype), normalise(second, loading.dtype), images)
