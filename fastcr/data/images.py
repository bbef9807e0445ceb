"""Lists of images, and how a file becomes pixels."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastcr.errors import UsageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"})
# PIL's own guard against decompression bombs, moved up: photographs of 12,000 x 9,000 pixels exist
Image.MAX_IMAGE_PIXELS = 250_000_000


@dataclass(frozen=True)
class ImageList:
    """The images of one split, in an order that never changes: `files` below `root`, a label each if there are any."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def path(self, index: int) -> str:
        """Name of image `index` in messages and reports: its file."""
        return os.path.join(self.root, self.files[index])

    def open(self, index: int) -> BinaryIO:
        """The encoded file of image `index`, opened. Raises `OSError` where there is none."""
        return open(self.path(index), "rb")

    def stamp(self, index: int) -> str:
        """Text that changes when the file of image `index` does. Raises `OSError` where there is none."""
        facts = os.stat(self.path(index))
        return f"{self.path(index)} {facts.st_size} {facts.st_mtime_ns}"

    def read(self, index: int) -> bytes:
        """The bytes of the encoded file of image `index`. Raises `OSError` where there is none."""
        with self.open(index) as file:
            return file.read()

    def rgb(self, index: int) -> Image.Image:
        """Decode image `index`, as `read_rgb`. Raises `OSError` for whatever is not a whole image."""
        try:
            data = self.read(index)
        except OSError as error:
            raise OSError(f"{self.path(index)!r} cannot be read: {error.strerror or error}") from error
        return read_rgb(io.BytesIO(data), self.path(index))

    def rgb_or_next(self, index: int) -> tuple[Image.Image, list[int]]:
        """Image `index`, or the next readable one after it; and the indices skipped as unreadable.

        Raises `UsageError` if no image can be read.
        """
        bad: list[int] = []
        while len(bad) < len(self):
            at = (index + len(bad)) % len(self)
            try:
                return self.rgb(at), bad
            except OSError:
                bad.append(at)
        raise self.none_readable()

    def none_readable(self) -> UsageError:
        """The error to raise when no image can be read."""
        return UsageError(f"none of the {len(self)} images under {self.root} can be read")


@dataclass(frozen=True)
class Splits:
    """What a root holds; `test` is None where nothing is set aside for testing."""

    train: ImageList
    test: ImageList | None


def read_rgb(file: str | BinaryIO, name: str = "") -> Image.Image:
    """Decode any image PIL can read to RGB, 8 bits; 16-bit grey is scaled, alpha is dropped.

    Raises `OSError`, with `name` or else `file` in it, for whatever is not a whole image.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # decoders raise whatever the broken bytes lead them to
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise OSError(f"{(name or file)!r} is not a readable image: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, 8 bits; 16-bit grey is scaled, alpha is dropped."""
    if image.mode.startswith("I"):  # convert("RGB") would clip 16-bit values at 255
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large image costs memory


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
            raise UsageError(f"unreadable image {path!r} (--data.on_corrupt skip uses the next one instead)")
        if len(self.files) == len(self.images):
            raise self.images.none_readable()
        print(f"fastcr: unreadable image {path!r}: its neighbour is used instead", file=sys.stderr)
