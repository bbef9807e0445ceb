"""The decoded training set (`--data.cache`): every image once as uint8, on the device, in memory or on disk.

Images whose shorter side is over a bound are reduced to it as they are decoded. The images lie one after the other in
one array; whoever loads from it, on whatever device, gets the same pixels.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastcr.data.images import ImageList
from fastcr.data.views import BadFiles
from fastcr.errors import UsageError

Place = Literal["device", "host", "disk"]
T = TypeVar("T")


class PixelCache(NamedTuple):
    """Images `[H,W,3]` uint8, one after the other; an unreadable one stands for the next that can be read."""

    pixels: Tensor  # uint8 [bytes]
    starts: np.ndarray  # int64 [n]: first byte of each image
    sizes: np.ndarray  # int64 [n,2]: height, width
    broken: np.ndarray  # int64: the unreadable images


@dataclass(frozen=True)
class CachedImages(ImageList):
    """An image list that hands out what is in the cache instead of reading files."""

    cache: PixelCache = field(compare=False, repr=False)

    def rgb(self, index: int) -> Image.Image:
        """Image `index`, decoded."""
        start, (height, width) = self.cache.starts[index], self.cache.sizes[index]
        pixels = self.cache.pixels[start : start + 3 * height * width].numpy()
        return Image.fromarray(pixels.reshape(height, width, 3))


def bounded_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The size with the shorter side reduced to `side` pixels where it is longer."""
    shorter = min(height, width)
    return (height, width) if shorter <= side else (round(height * side / shorter), round(width * side / shorter))


def measure(images: ImageList, side: int, workers: int, console: Console) -> np.ndarray:
    """Height and width `[n,2]` of every image as the cache will hold it, from the files' headers; 0 for unreadable."""

    def size(index: int) -> tuple[int, int]:
        try:
            with images.open(index) as file, Image.open(file) as image:
                return bounded_size(image.height, image.width, side)
        except Exception:  # PIL raises whatever the broken bytes lead it to; `BadFiles` names the image later
            return 0, 0

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        found = list(_shown(pool.map(size, range(len(images))), len(images), "measuring the images", console))
    return np.array(found, dtype=np.int64)


def fill(
    images: ImageList,
    sizes: np.ndarray,
    place: Place,
    *,
    side: int,
    device: torch.device,
    workers: int,
    folder: Path,
    bad: BadFiles,
    console: Console,
) -> PixelCache:
    """Decode every image, or take up what an earlier run left on the disk; `sizes` as `measure` found them.

    `bad` is told of the images that cannot be read. Raises `UsageError` if none can, or if the disk is full.
    """
    if not sizes.any():
        raise UsageError(f"none of the {len(images)} images under {images.root} can be read")
    if place == "disk":
        cache = _on_disk(images, sizes, side, workers, folder, console)
    else:
        total = int(sizes.prod(1).sum()) * 3
        pinned = place == "host" and device.type == "cuda"
        pixels = torch.empty(total, dtype=torch.uint8, device=device if place == "device" else "cpu", pin_memory=pinned)

        def put(start: int, image: np.ndarray) -> None:
            pixels[start : start + image.size].copy_(torch.from_numpy(image.reshape(-1)))

        cache = PixelCache(pixels, *_decode(images, sizes, side, workers, put, console))
    for index in cache.broken.tolist():
        bad.note(index)
    return cache


def _shown(items: Iterable[T], total: int, title: str, console: Console) -> Iterable[T]:
    """The items, with a progress bar where there is a terminal."""
    return track(items, title, total, console=console, transient=True, disable=not console.is_terminal)


def _decode(
    images: ImageList,
    sizes: np.ndarray,
    side: int,
    workers: int,
    put: Callable[[int, np.ndarray], None],
    console: Console,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hand every image and its first byte to `put`; returns starts, sizes and the unreadable ones."""
    lengths = sizes.prod(1) * 3
    starts = np.cumsum(lengths) - lengths

    def one(index: int) -> bool:
        height, width = sizes[index].tolist()
        try:
            image = images.rgb(index)
        except OSError:
            return False
        if image.size != (width, height):
            if bounded_size(image.height, image.width, side) != (height, width):
                return False  # another file than the one that was measured
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        put(int(starts[index]), np.array(image))
        return True

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        done = list(_shown(pool.map(one, range(len(images))), len(images), "decoding the images", console))
    readable = np.flatnonzero(done)
    if not len(readable):
        raise UsageError(f"none of the {len(images)} images under {images.root} can be read")
    # the next readable image, or the first one for those behind the last
    stand_in = readable[np.searchsorted(readable, np.arange(len(images))) % len(readable)]
    return starts[stand_in], sizes[stand_in], np.flatnonzero(~np.array(done))


def _on_disk(
    images: ImageList, sizes: np.ndarray, side: int, workers: int, folder: Path, console: Console
) -> PixelCache:
    """A memory-mapped file, and beside it an index, which is written last: without it the pixels count for nothing."""
    identity = hashlib.blake2b(digest_size=12)
    for index in np.flatnonzero(sizes[:, 0]).tolist():
        identity.update(f"{index} {images.stamp(index)}\n".encode(errors="surrogateescape"))
    identity.update(sizes.tobytes())
    name = f"pixels-{identity.hexdigest()}-{side}"
    index_file, pixel_file = folder / f"{name}.npz", folder / f"{name}.u8"
    total = int(sizes.prod(1).sum()) * 3
    if not (index_file.exists() and pixel_file.exists() and pixel_file.stat().st_size == total):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another run may be filling the same cache
                written, listed = Path(scratch, "pixels"), Path(scratch, "index.npz")
                with open(written, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, total)  # a full disk says so now
                pixels = np.memmap(written, dtype=np.uint8, mode="r+")

                def put(start: int, image: np.ndarray) -> None:
                    pixels[start : start + image.size] = image.reshape(-1)

                starts, kept, broken = _decode(images, sizes, side, workers, put, console)
                pixels.flush()
                np.savez(listed, starts=starts, sizes=kept, broken=broken)
                os.replace(written, pixel_file)
                os.replace(listed, index_file)
        except OSError as error:
            raise UsageError(f"cannot save {pixel_file}: {error}") from None
    try:
        with np.load(index_file) as index:  # never as pickled objects
            starts, kept, broken = index["starts"], index["sizes"], index["broken"]
    except Exception:  # numpy raises whatever the broken bytes lead it to
        raise UsageError(f"{index_file} is broken: remove it to decode the images again") from None
    pixels = np.memmap(pixel_file, dtype=np.uint8, mode="c")  # torch wants it writable; nothing is written
    return PixelCache(torch.from_numpy(pixels), starts, kept, broken)
