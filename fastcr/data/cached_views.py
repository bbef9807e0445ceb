"""Decoded pixels to two views by `kernels/two_views.py`: on a GPU in one fused pass.

The pixels come from the cache (`pixel_cache.py`), which may lie on the device or in memory; or, a batch at a time, from
DALI's decoder (`dali_views.py`).
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from fastcr.data.images import BadFiles
from fastcr.data.pixel_cache import CachedImages
from fastcr.data.views import MEAN, STD, Batch, Loading, ViewParameters, draw_parameters
from fastcr.kernels.two_views import two_views


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
