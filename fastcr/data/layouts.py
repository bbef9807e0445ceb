"""A root to the images of its splits, whichever of these layouts it has.

- an original archive (`archives.py`): CUB-200-2011, Stanford Cars, FGVC-Aircraft or iNaturalist 2019;
- class folders below `train/` and, if there is a test split, `test/`; or class folders alone;
- a flat folder of images without labels (also as `train/` and `test/`);
- a folder of tar shards (`shards.py`);
- a text file that lists images, with or without labels.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from fastcr.data.archives import read_archive
from fastcr.data.images import SUFFIXES, ImageList, Splits
from fastcr.data.shards import read_shards
from fastcr.errors import UsageError


def read_splits(root: Path) -> Splits:
    """List the images of `root`, a folder or a text file.

    Raises `UsageError` if `root` is missing, holds no image, or its splits name different classes.
    """
    root = Path(root)
    if root.is_file():
        return Splits(_listed(root), None)
    if not root.is_dir():
        raise UsageError(f"no folder {root}")
    return read_archive(root) or _split_folders(root) or read_shards(root) or Splits(_class_folders(root), None)


def _split_folders(root: Path) -> Splits | None:
    """The images below `train` and `test`; None where there is neither."""
    train, test = (_class_folders(root / name) if (root / name).is_dir() else None for name in ("train", "test"))
    if test and not train:
        raise UsageError(f"{root} has a folder test but none named train")
    if train and test and train.labels and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UsageError(
            f"{root}/train and {root}/test name different classes: {len(odd)} are in one only, e.g. {odd[0]!r}"
        )
    return Splits(train, test) if train else None


def _class_folders(root: Path) -> ImageList:
    """The images in the class folders of `root`, or else those directly in `root`, without labels."""
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
    """The images a text file names: on each line a path (from the file's own folder), then perhaps a tab and a label.

    Blank lines and lines that begin with `#` are skipped.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    if any("\0" in line for line in lines):
        raise UsageError(f"{file} is neither a folder of images or tar shards nor a text file that lists images")
    lines = [line.rstrip("\r") for line in lines if line.strip() and line[0] != "#"]
    if not lines:
        raise UsageError(f"{file} names no images")
    paths, tabs, labels = zip(*sorted(line.partition("\t") for line in lines), strict=True)
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
    return ImageList(file.parent, paths, tuple(map(classes.index, labels)), classes)
