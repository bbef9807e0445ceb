"""The decoded training images (`--data.cache`) as uint8: on the device or in memory.

Images whose shorter side is over a bound are reduced to it as they are decoded. The images lie one after the other in
one array; whoever loads from it, on whatever device, gets the same pixels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcr.data.crops import resized
from fastcr.data.images import ImageList, full_size, upright_size
from fastcr.runs.context import Context

Place = Literal["device", "host"]
FILTER = "bicubic"  # of torch, for bytes: within a rounding of PIL's and ten times as fast


@dataclass(frozen=True)
class CachedImages(ImageList):
    """An image list with its pixels, images `[H,W,3]` one after the other.

    Where an image is unreadable, `starts` and `sizes` are those of the next that can be read.
    """

    pixels: Tensor = field(compare=False, repr=False)  # uint8 [bytes]
    starts: np.ndarray = field(compare=False, repr=False)  # int64 [n]: first byte of each image
    sizes: np.ndarray = field(compare=False, repr=False)  # int64 [n,2]: height, width
    broken: np.ndarray = field(compare=False, repr=False)  # int64: the unreadable images

    def rgb(self, index: int, least: int = 0) -> Image.Image:
        """Image `index`, decoded; as large as it is here, whatever is enough."""
        start, (height, width) = self.starts[index], self.sizes[index]
        return Image.fromarray(self.pixels[start : start + 3 * height * width].view(height, width, 3).cpu().numpy())


def bounded_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The size with the shorter side reduced to `side` pixels where it is longer."""
    shorter = min(height, width)
    return (height, width) if shorter <= side else (round(height * side / shorter), round(width * side / shorter))


def measure(images: ImageList, side: int, context: Context) -> np.ndarray:
    """Height and width `[n,2]` of every image as the cache will hold it, from the files' headers; 0 for unreadable."""

    def size(index: int) -> tuple[int, int]:
        try:
            with images.open(index) as file, Image.open(file) as image:
                return bounded_size(*upright_size(image), side)
        except Exception:  # PIL raises whatever the broken bytes lead it to; `BadFiles` names the image later
            return 0, 0

    with ThreadPoolExecutor(max(context.workers, 1)) as pool:
        found = list(context.progress(pool.map(size, range(len(images))), "measuring the images", len(images)))
    return np.array(found, dtype=np.int64)


def fill(images: ImageList, sizes: np.ndarray, place: Place, context: Context, side: int) -> CachedImages:
    """Decode every image; `sizes` as `measure` found them for `side`. Raises `UsageError` if no image can be read."""
    lengths = sizes.prod(1) * 3
    starts = np.cumsum(lengths) - lengths
    device, pinned = ("cpu", context.device.type == "cuda") if place == "host" else (context.device, False)
    pixels = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=device, pin_memory=pinned)

    def one(index: int) -> bool:
        """Whether image `index` could be read."""
        height, width = sizes[index].tolist()
        try:
            image = images.rgb(index, 2 * side)
        except OSError:
            return False
        if image.size != (width, height) and bounded_size(*full_size(image), side) != (height, width):
            return False  # another file than the one that was measured
        decoded = resized(image, height, width, FILTER).reshape(-1)
        pixels[starts[index] : starts[index] + lengths[index]].copy_(decoded)
        return True

    with ThreadPoolExecutor(max(context.workers, 1)) as pool:
        done = list(context.progress(pool.map(one, range(len(images))), "decoding the images", len(images)))
    readable = np.flatnonzero(done)
    if not len(readable):
        raise images.none_readable()
    # the next readable image, or the first one for those behind the last
    stand_in = readable[np.searchsorted(readable, np.arange(len(images))) % len(readable)]
    layout = starts[stand_in], sizes[stand_in], np.flatnonzero(~np.array(done))
    return CachedImages(images.root, images.files, images.labels, images.classes, pixels, *layout)
