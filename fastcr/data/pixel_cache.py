"""The decoded training images (`--data.cache`) as uint8: on the device, in memory or on disk.

Images whose shorter side is over a bound are reduced to it as they are decoded. The images lie one after the other in
one array; whoever loads from it, on whatever device, gets the same pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcr.data.crops import resized
from fastcr.data.images import ImageList, full_size, upright_size
from fastcr.errors import UsageError
from fastcr.runs.checkpoint import new_folder
from fastcr.runs.context import Context
from fastcr.runs.machine import cache_folder

Place = Literal["device", "host", "disk"]
PIXELS, LAYOUT = "pixels.u8", "layout.npz"  # files of --data.cache disk
VERSION = b"2"  # raise it whenever files are decoded to other pixels
FILTER = "bicubic"  # of torch, for bytes: within a rounding of PIL's and ten times as fast
Layout = dict[str, np.ndarray]  # starts, sizes and broken, as in `CachedImages`


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
    """Decode every image, or take up what an earlier run left on disk; `sizes` as `measure` found them for `side`.

    Raises `UsageError` if no image can be read, or if the disk is full.
    """
    if not sizes.any():
        raise images.none_readable()
    total = 3 * int(sizes.prod(1).sum())
    decode = partial(_decode, images, sizes, side, context)
    if place == "disk":
        pixels, layout = _on_disk(cache_folder() / _name(images, sizes, side), total, decode)
    else:
        device, pinned = ("cpu", context.device.type == "cuda") if place == "host" else (context.device, False)
        pixels = torch.empty(total, dtype=torch.uint8, device=device, pin_memory=pinned)
        layout = decode(pixels)
    return CachedImages(images.root, images.files, images.labels, images.classes, pixels, **layout)


def _decode(images: ImageList, sizes: np.ndarray, side: int, context: Context, pixels: Tensor) -> Layout:
    """Decode every image into `pixels`."""
    lengths = sizes.prod(1) * 3
    starts = np.cumsum(lengths) - lengths

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
    return {"starts": starts[stand_in], "sizes": sizes[stand_in], "broken": np.flatnonzero(~np.array(done))}


def _name(images: ImageList, sizes: np.ndarray, side: int) -> str:
    """A name that changes when any image, or its size in the cache, does."""
    identity = hashlib.blake2b(digest_size=12)
    for index in np.flatnonzero(sizes[:, 0]).tolist():
        identity.update(f"{index} {images.path(index)} {images.stamp(index)}\n".encode(errors="surrogateescape"))
    identity.update(sizes.tobytes() + FILTER.encode() + VERSION)
    return f"pixels-{identity.hexdigest()}-{side}"


def _on_disk(folder: Path, total: int, decode: Callable[[Tensor], Layout]) -> tuple[Tensor, Layout]:
    """Pixels, mapped from a file in `folder`, and their layout; where there is no such folder, it is written first."""
    if not folder.exists():
        try:
            with new_folder(folder) as draft:
                with open(draft / PIXELS, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, total)  # a full disk says so now
                pixels = np.memmap(draft / PIXELS, dtype=np.uint8, mode="r+")
                np.savez(draft / LAYOUT, **decode(torch.from_numpy(pixels)))  # type: ignore[arg-type]
                pixels.flush()
        except OSError as error:
            raise UsageError(f"cannot save the decoded images in {folder}: {error}") from None
    try:
        with np.load(folder / LAYOUT) as arrays:  # never as pickled objects
            layout = {name: arrays[name] for name in ("starts", "sizes", "broken")}
        # torch wants the memory writable; nothing is written to it
        pixels = np.memmap(folder / PIXELS, dtype=np.uint8, mode="c", shape=(total,))
    except Exception:  # numpy raises whatever the broken bytes lead it to
        raise UsageError(f"{folder} is broken: remove it to decode the images again") from None
    return torch.from_numpy(pixels), layout
