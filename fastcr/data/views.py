"""What two views of an image are: order of the images and MoCo v2 augmentation, free of any loader.

Every number is a function of (seed, epoch, image index, view): views do not depend on batch size, workers,
loader or a resume, and a loader holds no state beyond the step it is at.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastcr.data.images import ImageList
from fastcr.errors import UsageError

# MoCo v2, as torchvision names them
CROP_AREA = (0.2, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1
JITTER_CHANCE, GREY_CHANCE, BLUR_CHANCE, FLIP_CHANCE = 0.8, 0.2, 0.5, 0.5
BLUR_SIGMA = (0.1, 2.0)
BLUR_REACH = 3.0  # sigmas on either side of a pixel that the blur takes in

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

CROP_TRIES = 10
_ORDERS = np.array([(a, b, c, d) for a in range(4) for b in range(4) for c in range(4) for d in range(4)
                    if len({a, b, c, d}) == 4], dtype=np.int32)  # fmt: skip


class ViewParameters(NamedTuple):
    """Augmentation of `n` images, two views each; every array is `[n, 2, ...]`."""

    crop: np.ndarray  # int32 [n,2,4]: top, left, height, width, pixels
    jitter: np.ndarray  # bool
    factors: np.ndarray  # float32 [n,2,4]: brightness, contrast, saturation (factors), hue (turns)
    order: np.ndarray  # int32 [n,2,4]: the four of `factors` in the order they are applied
    grey: np.ndarray  # bool
    blur: np.ndarray  # bool
    sigma: np.ndarray  # float32, pixels
    window: np.ndarray  # int32, taps of the blur: odd
    flip: np.ndarray  # bool


class Batch(NamedTuple):
    """Two views of the same images: `first`, `second` `[B,3,S,S]`, normalised, channels-last."""

    first: Tensor
    second: Tensor


class Shard(NamedTuple):
    """Which of the processes that train together this is: each takes its own part of every step's images."""

    rank: int
    ranks: int


ALONE = Shard(0, 1)


class Views(Protocol):
    """The contract of `TorchViews`, `DaliViews` and `CachedViews`."""

    bad: BadFiles

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        ...


def draw_parameters(seed: int, epoch: int, indices: np.ndarray, sizes: np.ndarray) -> ViewParameters:
    """Augmentation parameters of images `indices` `[n]` with `sizes` `[n,2]` (height, width, pixels).

    The crop box follows torchvision's RandomResizedCrop (ten tries, then the largest central box in ratio).
    """
    uniforms = np.stack([_uniforms(seed, epoch, int(index)) for index in indices])
    area_u, ratio_u, rest = np.split(uniforms, [CROP_TRIES, 2 * CROP_TRIES], axis=2)
    top, left, jitter, brightness, contrast, saturation, hue, order, grey, blur, sigma, flip = np.moveaxis(rest, 2, 0)
    height, width = (sizes[:, None, axis].astype(np.float64) for axis in (0, 1))
    factors = [
        _between(1 - reach, 1 + reach, u)
        for reach, u in ((BRIGHTNESS, brightness), (CONTRAST, contrast), (SATURATION, saturation))
    ]
    sigma = _between(*BLUR_SIGMA, sigma)
    return ViewParameters(
        crop=_crop_boxes(height, width, area_u, ratio_u, top, left),
        jitter=jitter < JITTER_CHANCE,
        factors=np.stack([*factors, _between(-HUE, HUE, hue)], axis=2).astype(np.float32),
        order=_ORDERS[(order * len(_ORDERS)).astype(np.int64)],
        grey=grey < GREY_CHANCE,
        blur=blur < BLUR_CHANCE,
        sigma=sigma.astype(np.float32),
        window=(2 * np.ceil(BLUR_REACH * sigma) + 1).astype(np.int32),
        flip=flip < FLIP_CHANCE,
    )


def _uniforms(seed: int, epoch: int, index: int) -> np.ndarray:
    """`[2, 2 * CROP_TRIES + 12]` numbers in [0, 1): a counter-based generator, so any image is drawn alone."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, epoch]))
    return generator.random((2, 2 * CROP_TRIES + 12))


def _between(low: float, high: float, uniform: np.ndarray) -> np.ndarray:
    return low + (high - low) * uniform


def _crop_boxes(
    height: np.ndarray,
    width: np.ndarray,
    area_u: np.ndarray,
    ratio_u: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
) -> np.ndarray:
    """Boxes `[n,2,4]` from sizes `[n,1]`, tries `[n,2,CROP_TRIES]` and positions `[n,2]`."""
    area = _between(*CROP_AREA, area_u) * (height * width)[..., None]
    ratio = np.exp(_between(np.log(CROP_RATIO[0]), np.log(CROP_RATIO[1]), ratio_u))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width[..., None]) & (h > 0) & (h <= height[..., None])
    # the last column stands for "none fits": the whole picture, cut to the nearest allowed ratio
    central_h, central_w = (
        np.maximum(np.rint(width / CROP_RATIO[0]), 1),
        np.maximum(np.rint(height * CROP_RATIO[1]), 1),
    )
    wide, tall = width / height > CROP_RATIO[1], width / height < CROP_RATIO[0]
    w = np.concatenate([w, np.where(wide, central_w, width).repeat(2, 1)[..., None]], axis=2)
    h = np.concatenate([h, np.where(tall, central_h, height).repeat(2, 1)[..., None]], axis=2)
    any_fits = fits.any(2)
    first = np.where(any_fits, fits.argmax(2), CROP_TRIES)[..., None]
    w, h = (np.take_along_axis(side, first, axis=2)[..., 0] for side in (w, h))
    y = np.where(any_fits, np.floor(top * (height - h + 1)), (height - h) // 2)
    x = np.where(any_fits, np.floor(left * (width - w + 1)), (width - w) // 2)
    return np.stack([y, x, h, w], axis=2).astype(np.int32)


@lru_cache(maxsize=2)
def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """A fresh permutation of the images each epoch, the first one included."""
    return np.random.default_rng([seed, epoch]).permutation(images)


def step_indices(images: int, batch_size: int, seed: int, step: int, shard: Shard = ALONE) -> tuple[int, np.ndarray]:
    """Epoch and image indices `[batch_size]` of `step` in one process; the short last batch of an epoch is dropped.

    The processes share one order: what they take together in a step is one batch of `batch_size * shard.ranks`.
    """
    epoch, position = divmod(step, images // (batch_size * shard.ranks))
    start = (position * shard.ranks + shard.rank) * batch_size
    return epoch, epoch_order(images, seed, epoch)[start : start + batch_size]


@lru_cache(maxsize=8)
def _mean_and_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN, device=device) * 255, 1 / (torch.tensor(STD, device=device) * 255)


def normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 `[B,S,S,3]` to `(x/255 - MEAN)/STD` as `[B,3,S,S]` in `dtype`, channels-last (nothing is transposed)."""
    mean, scale = _mean_and_scale(pixels.device)
    return ((pixels - mean) * scale).to(dtype).permute(0, 3, 1, 2)


class Prefetched:
    """The same batches, each made while the one before is used: by a thread, and on a stream of its own with CUDA."""

    def __init__(self, views: Views, device: torch.device) -> None:
        self.views, self.device, self.bad = views, device, views.bad

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        batches = self.views.batches(start_step)
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        def make() -> tuple[Batch, torch.cuda.Event | None]:
            with torch.cuda.stream(stream):
                return next(batches), stream.record_event() if stream else None

        with ThreadPoolExecutor(1) as thread:
            if stream:
                thread.submit(torch.cuda.set_device, self.device).result()  # a thread begins on the first device
            future = thread.submit(make)
            while True:
                batch, made = future.result()
                future = thread.submit(make)
                if made:
                    user = torch.cuda.current_stream(self.device)
                    user.wait_event(made)
                    for view in batch:  # its memory may be used again only after the step
                        view.record_stream(user)
                yield batch


class BadFiles:
    """Unreadable images met so far: each is named once on stderr, or stops the run (`on_corrupt="fail"`)."""

    def __init__(self, images: ImageList, on_corrupt: str) -> None:
        self.images, self.on_corrupt = images, on_corrupt
        self.files: list[str] = []

    def note(self, index: int) -> None:
        """Record image `index` as unreadable. Raises `UsageError` under `fail`, or when all images are."""
        path = self.images.path(index)
        if path in self.files:
            return
        self.files.append(path)
        if self.on_corrupt == "fail":
            raise UsageError(f"unreadable image {path!r} (--data.on_corrupt skip passes over it)")
        if len(self.files) == len(self.images):
            raise UsageError(f"none of the {len(self.images)} images under {self.images.root} can be read")
        print(f"fastcr: unreadable image {path!r}: its neighbour is used instead", file=sys.stderr)
