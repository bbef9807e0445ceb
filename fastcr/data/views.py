"""What all loaders share: the order of the images, and how the two views of an image are drawn (MoCo v2).

Every number is a function of (seed, epoch, image index, view): views do not depend on batch size, workers,
loader or a resume, and a loader holds no state beyond the step it is at.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcr.config import ViewsConfig
from fastcr.data.images import BadFiles, ImageList
from fastcr.kernels.launch import Impl
from fastcr.runs.context import Context

# what no setting changes of MoCo v2's augmentation, as torchvision names it
CROP_RATIO = (3 / 4, 4 / 3)
JITTER = np.array([0.4, 0.4, 0.4, 0.1])  # brightness, contrast, saturation: about 1; hue, turns: about 0
JITTER_CHANCE, FLIP_CHANCE = 0.8, 0.5
BLUR_SIGMA = (0.1, 2.0)
BLUR_REACH = 3.0  # sigmas on either side of a pixel that the blur takes in

DEFAULT = ViewsConfig()
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

CROP_TRIES = 10
_ORDERS = np.array(list(permutations(range(4))), dtype=np.int32)


class ViewParameters(NamedTuple):
    """Augmentation of `n` images, two views each; every array is `[n, 2, ...]`."""

    crop: np.ndarray  # int32 [n,2,4]: top, left, height, width, pixels
    jitter: np.ndarray  # bool
    factors: np.ndarray  # float32 [n,2,4]: brightness, contrast, saturation (factors), hue (turns)
    order: np.ndarray  # int32 [n,2,4]: the four of `factors` in the order they are applied; -1: none
    grey: np.ndarray  # bool
    blur: np.ndarray  # bool
    sigma: np.ndarray  # float32, pixels
    window: np.ndarray  # int32, taps of the blur: odd
    flip: np.ndarray  # bool


class Batch(NamedTuple):
    """Two views of the same images, normalised, channels-last: the query's and the key's, which may be larger."""

    first: Tensor  # [B,3,S,S]
    second: Tensor  # [B,3,K,K]
    images: Tensor | None = None  # int64 [B], their indices in the list; None if no one needs them

    def tensors(self) -> list[Tensor]:
        """Its tensors, without those that are None."""
        return [each for each in self if each is not None]


@dataclass(frozen=True)
class Loading:
    """What every loader is told."""

    sizes: tuple[int, int]  # sides of the query's and of the key's views, pixels
    batch_size: int  # images of this process in a step
    seed: int
    context: Context  # where the views go, in which precision, and which of several processes this is
    impl: Impl = "auto"  # of the op that cuts decoded images into views
    views: ViewsConfig = DEFAULT  # how they are drawn

    def steps(self, images: int, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Epoch and image indices `[batch_size]` of each step from `start` on, without end.

        The processes share one order: what they take together in a step is one batch of `batch_size * ranks`. The short
        last batch of an epoch is dropped.
        """
        rank, together = self.context.processes.rank, self.batch_size * self.context.processes.ranks
        for step in count(start):
            epoch, position = divmod(step, images // together)
            first = position * together + rank * self.batch_size
            yield epoch, epoch_order(images, self.seed, epoch)[first : first + self.batch_size]


Batches = Callable[[int], Generator[Batch, None, None]]  # from a step on, epoch after epoch, without end


@dataclass
class Views:
    """Two views of each image, and the images found unreadable so far."""

    images: ImageList  # their decoded copies if there is a cache
    bad: BadFiles
    batches: Batches


@lru_cache(maxsize=2)
def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """A fresh permutation of the images each epoch, the first one included."""
    return np.random.default_rng([seed, epoch]).permutation(images)


def draw_parameters(
    seed: int, epoch: int, indices: np.ndarray, sizes: np.ndarray, views: ViewsConfig = DEFAULT
) -> ViewParameters:
    """Augmentation parameters of images `indices` `[n]` with `sizes` `[n,2]` (height, width, pixels)."""
    # a counter-based generator, so that any image is drawn alone: `[2, 2 * CROP_TRIES + 12]` numbers in [0, 1)
    generators = (np.random.Philox(key=seed, counter=[0, 0, int(index), epoch]) for index in indices)
    uniforms = np.stack([np.random.Generator(each).random((2, 2 * CROP_TRIES + 12)) for each in generators])
    areas, ratios, rest = np.split(uniforms, [CROP_TRIES, 2 * CROP_TRIES], axis=2)
    top, left, jitter, *factors, order, grey, blur, sigma, flip = np.moveaxis(rest, 2, 0)
    sigma = _between(*BLUR_SIGMA, sigma)
    smallest = np.array([[views.crop], [views.key_crop if views.key == "weak" else views.crop]])  # share of the area
    strong, moved = np.array([True, views.key == "same"]), np.array([True, views.key != "centre"])
    crop = _crop_boxes(sizes.astype(np.float64), _between(smallest, 1.0, areas), ratios, top, left)
    if views.key == "centre":
        crop[:, 1] = _centres(sizes)
    width, middle = views.jitter * JITTER, np.array([1, 1, 1, 0])
    return ViewParameters(
        crop=crop,
        jitter=(jitter < JITTER_CHANCE) & strong & (views.jitter > 0),
        factors=_between(middle - width, middle + width, np.stack(factors, axis=2)).astype(np.float32),
        order=_ORDERS[(order * len(_ORDERS)).astype(np.int64)],
        grey=(grey < views.grey) & strong,
        blur=(blur < views.blur) & strong,
        sigma=sigma.astype(np.float32),
        window=(2 * np.ceil(BLUR_REACH * sigma) + 1).astype(np.int32),
        flip=(flip < FLIP_CHANCE) & moved,
    )


def _between(low: Any, high: Any, uniform: np.ndarray) -> np.ndarray:
    return low + (high - low) * uniform


def _crop_boxes(
    sizes: np.ndarray, areas: np.ndarray, ratios: np.ndarray, top: np.ndarray, left: np.ndarray
) -> np.ndarray:
    """Crops int32 `[n,2,4]` as torchvision's RandomResizedCrop draws them, from shares of the area and uniform numbers.

    `areas` and `ratios` `[n,2,CROP_TRIES]` are of the tries: the first box that fits into the image counts; where none
    does, it is the largest central one with an allowed ratio. `top` and `left` `[n,2]` place the box in the image.
    """
    height, width = sizes[:, None, 0], sizes[:, None, 1]
    area = areas * (height * width)[..., None]
    ratio = np.exp(_between(np.log(CROP_RATIO[0]), np.log(CROP_RATIO[1]), ratios))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width[..., None]) & (h > 0) & (h <= height[..., None])
    first, any_fits = fits.argmax(2)[..., None], fits.any(2)
    w, h = (np.take_along_axis(side, first, axis=2)[..., 0] for side in (w, h))
    central_w = np.where(width / height > CROP_RATIO[1], np.maximum(np.rint(height * CROP_RATIO[1]), 1), width)
    central_h = np.where(width / height < CROP_RATIO[0], np.maximum(np.rint(width / CROP_RATIO[0]), 1), height)
    w, h = np.where(any_fits, w, central_w), np.where(any_fits, h, central_h)
    y = np.where(any_fits, np.floor(top * (height - h + 1)), (height - h) // 2)
    x = np.where(any_fits, np.floor(left * (width - w + 1)), (width - w) // 2)
    return np.stack([y, x, h, w], axis=2).astype(np.int32)


def _centres(sizes: np.ndarray) -> np.ndarray:
    """Central squares `[n,4]` of 7/8 of the shorter side: what `crops.centre_crop` cuts."""
    side = np.maximum(np.rint(sizes.min(1) * 7 / 8), 1)
    top, left = np.rint((sizes - side[:, None]) / 2).T  # rounded as torchvision does
    return np.stack([top, left, side, side], axis=1)


@lru_cache(maxsize=8)
def _row_of_colours(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean, and what to multiply by, of the `3 * size` values in a row: a CPU is slow at adding three at a time."""
    mean, std = (torch.tensor(each, device=device).repeat(size) * 255 for each in (MEAN, STD))
    return mean, 1 / std


def normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 `[B,S,S,3]` to `(x/255 - MEAN)/STD` as `[B,3,S,S]` in `dtype`, channels-last (nothing is transposed)."""
    mean, scale = _row_of_colours(pixels.shape[2], pixels.device)
    return (pixels.flatten(2) - mean).mul_(scale).to(dtype).view(pixels.shape).permute(0, 3, 1, 2)
