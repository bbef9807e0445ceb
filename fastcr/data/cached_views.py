"""Decoded pixels to two views by `kernels/two_views.py`: on a GPU in one fused pass.

The pixels come from the cache (`pixel_cache.py`), which may lie on the device or in memory; or, a batch at a time, from
DALI's decoder (`dali_views.py`).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcr.data.pixel_cache import CachedImages
from fastcr.data.views import MEAN, STD, Batch, Loading, ViewParameters, Views, draw_parameters
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


@dataclass
class CachedViews(Views):
    """Two views of each image of a cache."""

    images: CachedImages

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        images, loading = self.images, self.loading
        for epoch, indices in loading.steps(len(images), start_step):
            sizes, starts, pixels = images.sizes[indices], images.starts[indices], images.pixels
            table = view_table(draw_parameters(loading.seed, epoch, indices, sizes, loading.views))
            if pixels.device != loading.context.device:
                pixels, starts = self._bring(starts, sizes)
            yield cut_views(pixels, starts, sizes[:, 1], table, indices, loading)

    def _bring(self, starts: np.ndarray, sizes: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The images on the device, one after the other, and where each begins there."""
        lengths = 3 * sizes.prod(1)
        ends = lengths.cumsum()
        pixels = torch.empty(int(ends[-1]), dtype=torch.uint8, device=self.loading.context.device)
        for start, length, end in zip(starts.tolist(), lengths.tolist(), ends.tolist(), strict=True):
            pixels[end - length : end].copy_(self.images.pixels[start : start + length], non_blocking=True)
        return pixels, ends - lengths
