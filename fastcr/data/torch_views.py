"""Files to two views with PIL and torchvision: the reference for `dali_views`, and the loader without DALI."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from fastcr.data.images import ImageList, read_rgb_or_next
from fastcr.data.views import ALONE, BadFiles, Batch, Shard, ViewParameters, draw_parameters, normalise, step_indices
from fastcr.runs.machine import leave_signals

Sample = tuple[Tensor, list[int]]


def augment(image: Tensor, parameters: ViewParameters, view: int, size: int) -> Tensor:
    """View `view` of one image: uint8 `[3,H,W]` to uint8 `[size,size,3]`; `parameters` are of that image alone."""
    p = ViewParameters(*(values[0, view] for values in parameters))
    top, left, height, width = p.crop.tolist()
    cropped = F.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    x = F.to_dtype(cropped, torch.float32, scale=True)
    if p.jitter:
        brightness, contrast, saturation, hue = p.factors.tolist()
        for which in p.order.tolist():
            match which:
                case 0:
                    x = F.adjust_brightness(x, brightness)
                case 1:
                    x = F.adjust_contrast(x, contrast)
                case 2:
                    x = F.adjust_saturation(x, saturation)
                case 3:
                    x = F.adjust_hue(x, hue)
    if p.grey:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if p.blur:
        x = F.gaussian_blur(x, [int(p.window)] * 2, [float(p.sigma)])
    if p.flip:
        x = F.horizontal_flip(x)
    return x.mul(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous()


class _ViewDataset(Dataset[Sample]):
    """`(epoch, index)` to the two views of an image, uint8 `[2,S,S,3]`, and the unreadable images passed over."""

    def __init__(self, images: ImageList, size: int, seed: int) -> None:
        self.images, self.size, self.seed = images, size, seed

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        picture, bad = read_rgb_or_next(self.images, index)
        image = F.pil_to_tensor(picture)
        parameters = draw_parameters(self.seed, epoch, np.array([index]), np.array([image.shape[1:]]))
        return torch.stack([augment(image, parameters, view, self.size) for view in (0, 1)]), bad


class _Steps:
    """The endless list of batches from a step on, as `(epoch, index)` pairs."""

    def __init__(self, images: int, batch_size: int, seed: int, start: int, shard: Shard) -> None:
        self.images, self.batch_size, self.seed, self.start, self.shard = images, batch_size, seed, start, shard

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start
        while True:
            epoch, indices = step_indices(self.images, self.batch_size, self.seed, step, self.shard)
            yield [(epoch, int(index)) for index in indices]
            step += 1


def _collate(samples: list[Sample]) -> tuple[Tensor, list[int]]:
    return torch.stack([views for views, _ in samples], dim=1), [index for _, bad in samples for index in bad]


class TorchViews:
    """Two views of each image through torchvision, decoded and augmented by `workers` processes."""

    def __init__(
        self,
        images: ImageList,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        bad: BadFiles,
        shard: Shard = ALONE,
    ) -> None:
        self.dataset, self.shard = _ViewDataset(images, image_size, seed), shard
        self.batch_size, self.workers, self.device, self.dtype = batch_size, workers, device, dtype
        self.bad = bad

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        steps = _Steps(len(self.dataset.images), self.batch_size, self.dataset.seed, start_step, self.shard)
        loader = DataLoader(
            self.dataset,
            batch_sampler=steps,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals,
        )
        for pixels, bad in loader:
            for index in bad:
                self.bad.note(index)
            first, second = pixels.to(self.device, non_blocking=True)
            yield Batch(normalise(first, self.dtype), normalise(second, self.dtype))
