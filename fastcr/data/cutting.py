"""Decoded pixels to two views by `kernels/two_views.py`: on a GPU in one fused pass.

The pixels come from the cache (`pixel_cache.py`), which may lie on the device or in memory; a batch at a time from
DALI's decoder (`dali_views.py`); or, needing neither, an image at a time from PIL in worker processes.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastcr.data.images import BadFiles, ImageList
from fastcr.data.pixel_cache import CachedImages
from fastcr.data.views import MEAN, STD, Batch, Loading, ViewParameters, draw_parameters, normalise
from fastcr.kernels.two_views import two_views
from fastcr.runs.machine import load_batches

Sample = tuple[Tensor, list[int]]


def view_table(p: ViewParameters) -> np.ndarray:
    """Parameters of `n` images as the op takes them: fp32 `[n,2,16]`, columns as in `two_views.COLUMNS`."""
    columns = (
        p.crop,
        np.where(p.jitter[..., None], p.order, -1),
        p.factors,
        p.grey[..., None],
        p.sigma[..., None],
        np.where(p.blur, p.window, 1)[..., None],
        p.flip[..., None],
    )
    return np.concatenate(columns, axis=2, dtype=np.float32)


def cut_views(
    pixels: Tensor, starts: np.ndarray, widths: np.ndarray, table: np.ndarray, indices: np.ndarray, loading: Loading
) -> Batch:
    """Two views of each image of a batch, normalised as encoders trained on ImageNet expect.

    `pixels` uint8 `[bytes]` on the device of `loading` holds the images, `[H,W,3]` each: image b begins at byte
    `starts[b]`, its rows are `widths[b]` pixels. `table` is that of `view_table`, `indices` `[n]` which
    images they are.
    """

    def send(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory().to(pixels.device, non_blocking=True) if pixels.is_cuda else tensor

    size, dtype, impl = loading.image_size, loading.context.dtype, loading.impl
    tensors = send(starts), send(widths), send(table)
    first, second = two_views(pixels, *tensors, size, mean=MEAN, std=STD, dtype=dtype, impl=impl)
    return Batch(first, second, send(indices))


def cached_views(images: CachedImages, loading: Loading, bad: BadFiles, start: int) -> Generator[Batch, None, None]:
    """Batches from step `start` on, from the pixels of a cache."""
    for epoch, indices in loading.steps(len(images), start):
        sizes, starts, pixels = images.sizes[indices], images.starts[indices], images.pixels
        table = view_table(draw_parameters(loading.seed, epoch, indices, sizes, loading.views))
        if pixels.device != loading.context.device:  # bring them there, one after the other
            lengths = 3 * sizes.prod(1)
            begins = lengths.cumsum() - lengths
            pixels = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=loading.context.device)
            for at, length, begin in zip(starts.tolist(), lengths.tolist(), begins.tolist(), strict=True):
                pixels[begin : begin + length].copy_(images.pixels[at : at + length], non_blocking=True)
            starts = begins
        yield cut_views(pixels, starts, sizes[:, 1], table, indices, loading)


def cut_image(image: Image.Image, parameters: ViewParameters, size: int) -> Tensor:
    """The two views of an RGB image, uint8 `[2,size,size,3]`; `parameters` are of that image alone."""
    pixels, table = torch.from_numpy(np.array(image)).flatten(), torch.from_numpy(view_table(parameters))
    start, width = torch.zeros(1, dtype=torch.int64), torch.tensor([image.width])
    views = two_views(pixels, start, width, table, size, mean=(0.0,) * 3, std=(1 / 255,) * 3)[:, 0]
    return views.round_().to(torch.uint8).permute(0, 2, 3, 1)


class _ViewDataset(Dataset[Sample]):
    """`(epoch, index)` to the two views of an image, uint8 `[2,S,S,3]`, and the images skipped as unreadable."""

    def __init__(self, images: ImageList, loading: Loading) -> None:
        self.images, self.size, self.seed, self.views = images, loading.image_size, loading.seed, loading.views

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        rgb, bad = self.images.rgb_or_next(index)
        sizes = np.array([[rgb.height, rgb.width]])
        parameters = draw_parameters(self.seed, epoch, np.array([index]), sizes, self.views)
        return cut_image(rgb, parameters, self.size), bad  # uint8: a quarter of the room between processes


def _collate(samples: list[Sample]) -> tuple[Tensor, list[int]]:
    return torch.stack([views for views, _ in samples], dim=1), [index for _, bad in samples for index in bad]


def torch_views(images: ImageList, loading: Loading, bad: BadFiles, start: int) -> Generator[Batch, None, None]:
    """Batches from step `start` on, decoded and augmented by worker processes."""
    context, size = loading.context, 2 * 3 * loading.batch_size * loading.image_size**2
    items = ([(epoch, index) for index in indices.tolist()] for epoch, indices in loading.steps(len(images), start))
    loaded = load_batches(_ViewDataset(images, loading), items, _collate, context.workers, size, context.device)
    for (pixels, unreadable), (_, indices) in zip(loaded, loading.steps(len(images), start), strict=False):
        for index in unreadable:
            bad.note(index)
        first, second = pixels.to(context.device, non_blocking=True)
        numbers = torch.from_numpy(indices).to(context.device)
        yield Batch(normalise(first, context.dtype), normalise(second, context.dtype), numbers)
