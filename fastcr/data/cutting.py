"""Decoded pixels to two views by `kernels/two_views.py`: on a GPU in one fused pass.

The pixels come from the cache (`pixel_cache.py`), which may lie on the device or in memory; a batch at a time from
DALI's decoder (`dali_views.py`); or, needing neither, an image at a time from PIL in worker processes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

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

Sample = tuple[Sequence[Tensor], list[int]]


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


def two_sizes(
    pixels: Tensor, starts: Tensor, widths: Tensor, table: Tensor, sizes: Sequence[int], **options: Any
) -> list[Tensor]:
    """The views of `kernels/two_views.py`, each in a size of its own: `[B,3,S,S]` for each of the `sizes`."""
    parts = table.split(1, dim=1)
    return [two_views(pixels, starts, widths, *each, **options)[0] for each in zip(parts, sizes, strict=True)]


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

    tensors, dtype = (send(starts), send(widths), send(table)), loading.context.dtype
    first, second = two_sizes(pixels, *tensors, loading.sizes, mean=MEAN, std=STD, dtype=dtype, impl=loading.impl)
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


def cut_image(image: Image.Image, parameters: ViewParameters, sizes: Sequence[int]) -> list[Tensor]:
    """The two views of an RGB image in these sizes, uint8 `[S,S,3]`; `parameters` are of that image alone."""
    pixels, table = torch.from_numpy(np.array(image)).flatten(), torch.from_numpy(view_table(parameters))
    start, width = torch.zeros(1, dtype=torch.int64), torch.tensor([image.width])
    views = two_sizes(pixels, start, width, table, sizes, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    return [view[0].round_().to(torch.uint8).permute(1, 2, 0) for view in views]


class _ViewDataset(Dataset[Sample]):
    """`(epoch, index)` to the two views of an image, uint8 `[S,S,3]`, and the images skipped as unreadable."""

    def __init__(self, images: ImageList, loading: Loading) -> None:
        self.images, self.sizes, self.seed, self.views = images, loading.sizes, loading.seed, loading.views

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        rgb, bad = self.images.rgb_or_next(index)
        whole = np.array([[rgb.height, rgb.width]])
        parameters = draw_parameters(self.seed, epoch, np.array([index]), whole, self.views)
        return cut_image(rgb, parameters, self.sizes), bad  # uint8: a quarter of the room between processes


def _collate(samples: list[Sample]) -> tuple[list[Tensor], list[int]]:
    views = [torch.stack(each) for each in zip(*(views for views, _ in samples), strict=True)]
    return views, [index for _, bad in samples for index in bad]


def torch_views(images: ImageList, loading: Loading, bad: BadFiles, start: int) -> Generator[Batch, None, None]:
    """Batches from step `start` on, decoded and augmented by worker processes."""
    context, size = loading.context, 3 * loading.batch_size * sum(side**2 for side in loading.sizes)
    items = ([(epoch, index) for index in indices.tolist()] for epoch, indices in loading.steps(len(images), start))
    loaded = load_batches(_ViewDataset(images, loading), items, _collate, context.workers, size, context.device)
    for (views, unreadable), (_, indices) in zip(loaded, loading.steps(len(images), start), strict=False):
        for index in unreadable:
            bad.note(index)
        first, second = (normalise(each.to(context.device, non_blocking=True), context.dtype) for each in views)
        yield Batch(first, second, torch.from_numpy(indices).to(context.device))
