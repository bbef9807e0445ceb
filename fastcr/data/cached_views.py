"""Decoded pixels to two views in one fused pass (`kernels/two_views.py`): the loader of a GPU.

The pixels come from the cache (`pixel_cache.py`), which may lie on the device or in memory; or, a batch at a time, from
DALI's decoder (`dali_views.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastcr.data.pixel_cache import PixelCache
from fastcr.data.views import ALONE, MEAN, STD, BadFiles, Batch, Shard, ViewParameters, draw_parameters, step_indices
from fastcr.kernels.launch import Impl
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
    pixels: Tensor, starts: Tensor, widths: Tensor, table: Tensor, *, size: int, dtype: torch.dtype, impl: Impl
) -> Batch:
    """The op on tensors of one batch, normalised as ImageNet's encoders expect."""
    return Batch(*two_views(pixels, starts, widths, table, size, mean=MEAN, std=STD, dtype=dtype, impl=impl))


class CachedViews:
    """Two views of each image of a cache, on `device`; `bad` are the files the cache was filled without."""

    def __init__(
        self,
        cache: PixelCache,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        impl: Impl,
        bad: BadFiles,
        shard: Shard = ALONE,
    ) -> None:
        self.cache, self.image_size, self.batch_size, self.seed = cache, image_size, batch_size, seed
        self.device, self.dtype, self.impl, self.shard = device, dtype, impl, shard
        self.bad = bad

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        step = start_step
        while True:
            epoch, indices = step_indices(len(self.cache.starts), self.batch_size, self.seed, step, self.shard)
            sizes = self.cache.sizes[indices]
            table = view_table(draw_parameters(self.seed, epoch, indices, sizes))
            pixels, starts = self.cache.pixels, self.cache.starts[indices]
            if pixels.device != self.device:
                pixels, starts = self._bring(starts, sizes[:, 1], table)
            tensors = [self._send(values) for values in (starts, sizes[:, 1].copy(), table)]
            yield cut_views(pixels, *tensors, size=self.image_size, dtype=self.dtype, impl=self.impl)
            step += 1

    def _send(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _bring(self, starts: np.ndarray, widths: np.ndarray, table: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Copy the rows that the crops touch to the device; moves the crops' `top` in `table` to match."""
        first = table[:, :, 0].min(1)
        last = (table[:, :, 0] + table[:, :, 2]).max(1)
        table[:, :, 0] -= first[:, None]
        origins = starts + 3 * widths * first.astype(np.int64)
        lengths = 3 * widths * (last - first).astype(np.int64)
        ends = lengths.cumsum()
        pixels = torch.empty(int(ends[-1]), dtype=torch.uint8, device=self.device)
        for origin, length, end in zip(origins.tolist(), lengths.tolist(), ends.tolist(), strict=True):
            pixels[end - length : end].copy_(self.cache.pixels[origin : origin + length], non_blocking=True)
        return pixels, ends - lengths
