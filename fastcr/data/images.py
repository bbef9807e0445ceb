"""Folders of images: which files, which labels, which split; and how one file becomes pixels.

A root is one of the original archives (`archives.py`), class folders (under `train/` and `test/`, or bare), a flat
folder without labels, a folder of tar shards (`shards.py`), or a text file that lists images. `python -m fastcr.folders
ROOT` says what it holds and which of its images are broken (`check.py`).
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastcr.errors import UsageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"})
# PIL's own guard against decompression bombs, moved up: a 12,000 x 9,000 photograph is a picture
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
        """Changes when the file of image `index` does. Raises `OSError` where there is none."""
        facts = os.stat(self.path(index))
        return f"{self.path(index)} {facts.st_size} {facts.st_mtime_ns}"

    def read(self, index: int) -> bytes:
        """The encoded file of image `index`. Raises `OSError` where there is none."""
        with self.open(index) as file:
            return file.read()

    def rgb(self, index: int) -> Image.Image:
        """Decode image `index`, as `read_rgb`. Raises `OSError` for whatever is not a whole picture."""
        try:
            data = self.read(index)
        except OSError as error:
            raise OSError(f"{self.path(index)!r} cannot be read: {error.strerror or error}") from error
        return read_rgb(io.BytesIO(data), self.path(index))


@dataclass(frozen=True)
class Splits:
    """What a root holds; `test` is None where nothing is set aside for testing."""

    train: ImageList
    test: ImageList | None


def read_rgb(file: str | BinaryIO, name: str = "") -> Image.Image:
    """Decode any picture PIL can read to RGB, 8 bits; 16-bit grey is scaled, alpha is dropped.

    Raises `OSError`, with `name` or else `file` in it, for whatever is not a whole picture.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # decoders raise whatever the broken bytes lead them to
        reason = "no format known here" if isinstance(error, UnidentifiedImageError) else error
        raise OSError(f"{(name or file)!r} is not a readable image: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, 8 bits; 16-bit grey is scaled, alpha is dropped."""
    if image.mode.startswith("I"):  # convert("RGB") would clip 16-bit values at 255
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large picture costs memory


def read_rgb_or_next(images: ImageList, index: int) -> tuple[Image.Image, list[int]]:
    """Image `index`, or the next readable one after it; and the indices passed over as unreadable."""
    bad: list[int] = []
    while len(bad) < len(images):
        at = (index + len(bad)) % len(images)
        try:
            return images.rgb(at), bad
        except OSError:
            bad.append(at)
    raise UsageError(f"none of the {len(images)} images under {images.root} can be read")
