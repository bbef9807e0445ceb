"""Folders of images: which files, which labels, which split; and how one file becomes pixels.

Three layouts are recognised: the original archive of CUB-200-2011 (`images.txt`, `train_test_split.txt`,
`image_class_labels.txt`), class folders (under `train/` and `test/`, or bare), and a flat folder without labels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastcr.config import UsageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"})
# PIL's own guard against decompression bombs, moved up: a 12,000 x 9,000 photograph is a picture
Image.MAX_IMAGE_PIXELS = 250_000_000


@dataclass(frozen=True)
class ImageList:
    """The images of one split, sorted by path: `files` relative to `root`, and a label each if there are any."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def path(self, index: int) -> str:
        """File of image `index`."""
        return os.path.join(self.root, self.files[index])


@dataclass(frozen=True)
class Splits:
    """What a root holds; `test` is None where nothing is set aside for testing."""

    train: ImageList
    test: ImageList | None


def read_splits(root: Path) -> Splits:
    """List the images under `root` (see the module's first lines for the layouts).

    Raises `UsageError` if `root` is missing, holds no image, or its splits name different classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"no folder {root}")
    for base in (root, root / "CUB_200_2011"):
        if (base / "images.txt").is_file():
            return _cub_archive(base)
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
    return Splits(_class_folders(root), None)


def _class_folders(root: Path) -> ImageList:
    """Class folders below `root`, else the images that lie in `root` itself, unlabelled."""
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."))
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
    return Path(name).suffix.lower() in SUFFIXES and os.path.isfile(os.path.join(folder, name))


def _cub_archive(root: Path) -> Splits:
    """The archive's three tables, each line `<image id> <value>`."""

    def table(name: str) -> dict[str, str]:
        try:
            return dict(line.split(None, 1) for line in (root / name).read_text().splitlines() if line.strip())
        except (OSError, ValueError):
            raise UsageError(f"{root / name} is missing or is not a table of '<image id> <value>'") from None

    files, training, labels = (
        table("images.txt"),
        table("train_test_split.txt"),
        table("image_class_labels.txt"),
    )
    if not files.keys() == training.keys() == labels.keys():
        raise UsageError(f"images.txt, train_test_split.txt and image_class_labels.txt of {root} list different ids")
    order = sorted(files, key=lambda id_: files[id_].strip())
    classes = tuple(sorted({files[id_].split("/")[0] for id_ in order}))

    def split(flag: str) -> ImageList:
        ids = [id_ for id_ in order if training[id_].strip() == flag]
        if not ids:
            raise UsageError(f"{root / 'train_test_split.txt'} marks no image with {flag}")
        return ImageList(
            root / "images",
            tuple(files[id_].strip() for id_ in ids),
            tuple(classes.index(files[id_].split("/")[0]) for id_ in ids),
            classes,
        )

    return Splits(split("1"), split("0"))


def read_rgb(path: str) -> Image.Image:
    """Decode any picture PIL can read to RGB, 8 bits; 16-bit grey is scaled, alpha is dropped.

    Raises `OSError` for whatever is not a whole picture.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I"):  # convert("RGB") would clip 16-bit values at 255
                image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # decoders raise whatever the broken bytes lead them to
        raise OSError(f"{path!r} is not a readable image: {error}") from error


def read_rgb_or_next(images: ImageList, index: int) -> tuple[Image.Image, list[int]]:
    """Image `index`, or the next readable one after it; and the indices passed over as unreadable."""
    bad: list[int] = []
    while len(bad) < len(images):
        at = (index + len(bad)) % len(images)
        try:
            return read_rgb(images.path(at)), bad
        except OSError:
            bad.append(at)
    raise UsageError(f"none of the {len(images)} images under {images.root} can be read")
