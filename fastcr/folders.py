"""Folders of images: which files, which labels, which split; and how one file becomes pixels.

A root is one of the original archives (`archives.py`), class folders (under `train/` and `test/`, or bare), a flat
folder without labels, a folder of tar shards (`shards.py`), or a text file that lists images. `python -m fastcr.folders
ROOT` says what it holds and which of its images are broken (`check.py`).
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastcr.config import UsageError

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


def read_splits(root: Path) -> Splits:
    """List the images under `root` (see the module's first lines for the layouts).

    Raises `UsageError` if `root` is missing, holds no image, or its splits name different classes.
    """
    from fastcr.archives import read_archive  # these two build on the classes above
    from fastcr.shards import read_shards

    root = Path(root)
    if root.is_file():
        return Splits(_listed(root), None)
    if not root.is_dir():
        raise UsageError(f"no folder {root}")
    if archive := read_archive(root):
        return archive
    if (root / "train").is_dir():
        train = _class_folders(root / "train")
        test = _class_folders(root / "test") if (root / "test").is_dir() else None
        if test and train.labels and train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise UsageError(
                f"{root}/train and {root}/test name different classes: {len(odd)} are in one only, e.g. {odd[0]!r}"
            )
        return Splits(train, test)
    if (root / "test").is_dir():
        raise UsageError(f"{root} has a folder test but none named train")
    return read_shards(root) or Splits(_class_folders(root), None)


def _class_folders(root: Path) -> ImageList:
    """Class folders below `root`, else the images that lie in `root` itself, unlabelled."""
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."))
    here = Path(os.path.realpath(root))
    if around := [name for name in classes if here.is_relative_to(os.path.realpath(here / name))]:
        raise UsageError(f"{root / around[0]} is a link to a folder that holds {root} itself")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = [os.path.relpath(os.path.join(folder, file), root)
                 for folder, _, names in os.walk(root / name) for file in names if _is_image(folder, file)]  # fmt: skip
        files += sorted(found)
        labels += [label] * len(found)
    flat = sorted(name for name in os.listdir(root) if _is_image(root, name))
    if files and flat:
        raise UsageError(f"{root} holds images and also folders of images ({files[0]!r}): keep one kind")
    if files:
        return ImageList(root, tuple(files), tuple(labels), classes)
    if not flat:
        raise UsageError(f"no images under {root} (looked for {' '.join(sorted(SUFFIXES))})")
    return ImageList(root, tuple(flat), None, ())


def _is_image(folder: str | Path, name: str) -> bool:
    file = os.path.join(folder, name)  # a link that leads nowhere is listed too, to be named as unreadable
    return Path(name).suffix.lower() in SUFFIXES and (os.path.isfile(file) or not os.path.exists(file))


def _listed(file: Path) -> ImageList:
    """The images a text file names: a path a line (from the file's own folder), then a tab and a label or nothing."""
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    if any("\0" in line for line in lines):
        raise UsageError(f"{file} is neither a folder of images or tar shards nor a text file that lists images")
    lines = [line.rstrip("\r") for line in lines if line.strip() and line[0] != "#"]
    paths, tabs, labels = zip(*sorted(line.partition("\t") for line in lines), strict=True) if lines else ((), (), ())
    if not paths:
        raise UsageError(f"{file} names no images")
    if missing := [path for path in paths if not os.path.isfile(file.parent / path)]:
        raise UsageError(
            f"{len(missing)} of the {len(paths)} images that {file} names are not there, e.g. {missing[0]!r}"
        )
    if twice := [path for path, after in pairwise(paths) if path == after]:
        raise UsageError(f"{file} names {twice[0]!r} twice")
    if not any(tabs):
        return ImageList(file.parent, paths, None, ())
    if not all(tabs):
        raise UsageError(f"{file}: some images have a label and some, e.g. {paths[tabs.index('')]!r}, have none")
    classes = tuple(sorted(set(labels)))
    return ImageList(file.parent, paths, tuple(classes.index(label) for label in labels), classes)


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


if __name__ == "__main__":
    from fastcr.check import main

    main()
