"""Lists of images, and how a file becomes pixels."""

from __future__ import annotations

import os
import sys
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from fastcr.data.depth import to_rgb
from fastcr.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".gif", ".avif", ".jp2", ".j2k", ".jpx",
})  # fmt: skip
# PIL's own guard against decompression bombs, moved up: photographs of 12,000 x 9,000 pixels exist
Image.MAX_IMAGE_PIXELS = 250_000_000
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # of its 64 MB, editors fill more than 1 with one text
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # the image itself is read all the same
_T = Image.Transpose
TURNS = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270,
    7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # of EXIF's orientations  # fmt: skip
FULL_SIZE = "fastcr full size"  # key of PIL's facts of an image


def composed(name: object) -> str:
    """A name as names are compared: a Mac writes an accent as a letter of its own, other systems do not."""
    return unicodedata.normalize("NFC", str(name))


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

    def with_labels(self, labels: Sequence[int | str | None], classes: Sequence[int | str]) -> Self:
        """The same images with a label each, one of `classes`, or without labels if there are none.

        Labels and classes that read alike are one: a number and its digits, an accent composed and decomposed.
        Raises `UsageError` if only some have one.
        """
        if all(label is None for label in labels):
            return self
        if None in labels:
            raise UsageError(f"some images have a label and some, e.g. {self.path(labels.index(None))!r}, have none")
        number = {name: label for label, name in enumerate(dict.fromkeys(map(composed, classes)))}
        return replace(self, labels=tuple(number[composed(label)] for label in labels), classes=tuple(number))

    def path(self, index: int) -> str:
        """Name of image `index` in messages and reports: its file."""
        return os.path.join(self.root, self.files[index])

    def open(self, index: int) -> BinaryIO:
        """The encoded file of image `index`, opened. Raises `OSError` where there is none."""
        return open(self.path(index), "rb")

    def stamp(self, index: int) -> str:
        """Text that changes when the file of image `index` does. Raises `OSError` where there is none."""
        facts = os.stat(self.path(index))
        return f"{facts.st_size} {facts.st_mtime_ns}"

    def read(self, index: int) -> bytes:
        """The bytes of the encoded file of image `index`. Raises `OSError` where there is none."""
        with self.open(index) as file:
            return file.read()

    def rgb(self, index: int, least: int = 0) -> Image.Image:
        """Decode image `index`, as `read_rgb`. Raises `OSError` for whatever is not a whole image."""
        try:
            file = self.open(index)
        except OSError as error:
            raise OSError(f"{self.path(index)!r} cannot be read: {error.strerror or error}") from error
        with file:
            return read_rgb(file, self.path(index), least)

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
    """The images of a root; `test` is None where none are set aside for testing."""

    train: ImageList
    test: ImageList | None


def read_rgb(file: str | BinaryIO, name: str = "", least: int = 0) -> Image.Image:
    """Decode any image PIL can read to RGB, 8 bits, the right way up; alpha is dropped.

    A shorter side of `least` pixels is enough, if given: the decoder may halve a large JPEG up to three times, which
    takes it half the time or less. `full_size` tells the size it would have.
    Raises `OSError`, with `name` or else `file` in it, for whatever is not a whole image.
    """
    try:
        with Image.open(file) as image:
            size = upright_size(image)
            if least and (times := min(image.size) // least) > 1:
                image.draft("", (image.width // times, image.height // times))
            rgb = upright_rgb(image)
            rgb.info[FULL_SIZE] = size
            return rgb
    except Exception as error:  # decoders raise whatever the broken bytes lead it to
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise OSError(f"{(name or file)!r} is not a readable image: {reason}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image of any mode as RGB, 8 bits, turned as its EXIF data says."""
    turn, rgb = TURNS.get(orientation_of(image)), to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def full_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image of `read_rgb` in its file, the right way up; of another image, its own."""
    return image.info.get(FULL_SIZE, (image.height, image.width))


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation of an opened image, as its data before the pixels says; 1, upright, where it says nothing."""
    if image.format == "TIFF":  # PIL itself turns these
        return 1
    try:
        exif = Image.Image.getexif(image)  # not PNG's own, which decodes the pixels to look behind them
        return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # PIL raises whatever the broken bytes lead it to
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image as `read_rgb` will turn it, without decoding it."""
    return image.size if 5 <= orientation_of(image) <= 8 else image.size[::-1]


class BadFiles:
    """Unreadable images met so far: each is named once on stderr, or stops the run (`on_corrupt="fail"`)."""

    def __init__(self, images: ImageList, on_corrupt: str) -> None:
        self.images, self.on_corrupt = images, on_corrupt
        self.files: list[str] = []

    def note(self, index: int) -> None:
        """Record image `index` as unreadable. Raises `UsageError` under `fail`."""
        path = self.images.path(index)
        if path in self.files:
            return
        self.files.append(path)
        if self.on_corrupt == "fail":
            raise UsageError(f"unreadable image {path!r} (--data.on_corrupt skip uses the next one instead)")
        print(f"fastcr: unreadable image {path!r}: its neighbour is used instead", file=sys.stderr)
