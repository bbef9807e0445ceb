"""A root to the images of its splits, whichever of these layouts it has.

- an original archive (`archives.py`): CUB-200-2011, Stanford Cars, FGVC-Aircraft or iNaturalist 2019;
- class folders below `train/` and, if there is a test split, `test/` or `val/` (these may be words of their names, and
  a folder of such a name may lie alone in one); or class folders alone;
- a flat folder of images without labels (also as `train/` and `test/`);
- a folder of tar shards (`shards.py`);
- any of these in a folder that lies alone in the root, as some archives unpack;
- a text file that lists images (`text_lists.py`), with or without labels.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

from fastcr.data.archives import read_archive
from fastcr.data.images import SUFFIXES, ImageList, Splits
from fastcr.data.listing import (
    BESIDE,
    EMPTY,
    FEW,
    SHARED,
    Entries,
    Notes,
    ending_of,
    entries_of,
    images_among,
    images_below,
    split_in,
)
from fastcr.data.shards import read_shards
from fastcr.data.text_lists import read_list
from fastcr.errors import UsageError

NESTED = 3  # folders that lie alone in one another


def read_splits(root: Path) -> Splits:
    """List the images of `root`, a folder or a text file; what is left out is said on stderr, in a line for each kind.

    Raises `UsageError` if `root` is missing or holds no image.
    """
    splits = list_splits(Path(root))
    for note in splits.notes:
        print(f"fastcr: {root}: {note}", file=sys.stderr)
    return splits


def list_splits(root: Path) -> Splits:
    """As `read_splits`, but nothing is printed: what is to be said is in the notes."""
    if root.is_file():
        return Splits(read_list(root), None)
    if not root.is_dir():
        raise UsageError(f"no folder {root}")
    notes = Notes()
    for _ in range(NESTED):
        entries = entries_of(root, "", notes)
        found = read_archive(root) or _split_folders(root, entries, notes) or read_shards(root, entries, notes)
        inner = None if found else _alone(root, entries, notes)
        if inner is None:
            break
        root, notes = root / inner, notes.within(inner)
    found = found or Splits(_class_folders(root, entries, notes), None)
    return replace(found, notes=tuple(notes))


def _split_folders(root: Path, entries: Entries, notes: Notes) -> Splits | None:
    """The images below `train` and `test` or `val`; None where there is no `train`, or where it is a class."""
    train, tests = _folders_of_splits(root, entries)
    if train is None:
        if tests:
            raise UsageError(f"{root} has a folder {tests[0]} but none named train")
        return None
    inside = entries_of(root / train, "", Notes())
    if not inside.folders and any(ending_of(name) == ".tar" for name in inside.others) and not inside.images:
        return None  # shards
    if not inside.folders and not tests and len(entries.folders) > 1:
        return None  # a class of vehicles
    chosen, test = None, None
    for name in tests:  # the first that has labels, or else the first
        images = _split(root, name, notes)
        if test is None or images.labels is not None:
            chosen, test = name, images
        if images.labels is not None:
            break
    for name in sorted({*entries.folders, *entries.images} - {train, chosen}):
        notes.add(BESIDE, name)
    if chosen and os.path.samefile(root / train, root / chosen):
        notes.add(SHARED, chosen)
    return _alike(_split(root, train, notes), test)


def _folders_of_splits(root: Path, entries: Entries) -> tuple[str | None, list[str]]:
    """The folder to train on, if there is one, and those to measure on: `test` before `val`.

    Where none is named train, they are those with words such as in `seg_train` that hold folders, if it is clear which.
    """
    whole, word = ({split: [] for split in ("train", "test", "val")} for _ in range(2))
    for name in sorted(entries.folders):
        if split_in(name, whole=True):
            whole[split_in(name)].append(name)
        if split_in(name) and entries_of(root, name, Notes()).folders:
            word[split_in(name)].append(name)
    if whole["train"]:
        return whole["train"][0], whole["test"] + whole["val"]
    if len(word["train"]) == 1 and (tests := word["test"] + word["val"]):
        return word["train"][0], tests
    return None, [name for name in whole["test"] if name.lower() == "test"]


def _split(root: Path, name: str, notes: Notes) -> ImageList:
    """The images below the folder `name` of `root`, or below one that lies alone in it and is of the same split."""
    root, notes = root / name, notes.within(name)
    entries = entries_of(root, "", notes)
    inner = _alone(root, entries, notes)
    if inner and split_in(inner) == split_in(name):
        root, notes = root / inner, notes.within(inner)
        entries = entries_of(root, "", notes)
    return _class_folders(root, entries, notes)


def _alike(train: ImageList, test: ImageList | None) -> Splits:
    """The two splits with labels of the same classes, those of both together."""
    if test and train.labels is not None and test.labels is not None and train.classes != test.classes:
        classes = sorted({*train.classes, *test.classes})
        train, test = (
            part.with_labels([part.classes[label] for label in part.labels or ()], classes) for part in (train, test)
        )
    return Splits(train, test)


def _alone(root: Path, entries: Entries, notes: Notes) -> str | None:
    """The folder in `root` that holds everything: alone one with a folder `train`, or alone, and full of folders."""
    if entries.images:
        return None
    inside = {name: entries_of(root, name, Notes()) for name in entries.folders[:FEW]}
    split = [
        name for name, found in inside.items() if any(split_in(each, whole=True) == "train" for each in found.folders)
    ]
    if len(split) > 1:  # of detectors' data sets, one folder holds the images and one the labels
        split = [
            name
            for name in split
            if any(ending_of(each) in SUFFIXES for _, _, names in os.walk(root / name) for each in names)
        ]
    if len(split) == 1:
        for name in entries.folders:
            if name != split[0]:
                notes.add(BESIDE, name)
        return split[0]
    if len(inside) == 1:
        ((name, found),) = inside.items()
        tars = any(ending_of(each) == ".tar" for each in found.others)
        return name if (found.folders or tars) and not found.images else None
    return None


def _class_folders(root: Path, entries: Entries, notes: Notes) -> ImageList:
    """The images in the class folders of `root`, or else those directly in `root`, without labels."""
    below = {name: images_below(root, name, notes) for name in sorted(entries.folders)}
    for name in (name for name, images in below.items() if not images):
        notes.add(EMPTY, name)
    found = {name: images for name, images in below.items() if images}
    # a Mac writes an accent as a letter of its own: the same name in another split need not be the same bytes
    composed = tuple(unicodedata.normalize("NFC", name) for name in found)
    classes = composed if len({*composed}) == len(found) else tuple(found)
    flat = sorted([*entries.images, *images_among(root, entries.others, notes)])
    if found and flat:
        raise UsageError(
            f"{root} holds images and also folders of images ({next(iter(found.values()))[0]!r}): keep one kind"
        )
    if found:
        labels = tuple(label for label, images in enumerate(found.values()) for _ in images)
        return ImageList(root, tuple(file for images in found.values() for file in images), labels, classes)
    if not flat:
        said = "; ".join([f"looked for {' '.join(sorted(SUFFIXES))}", *map(str, notes)])
        raise UsageError(f"no images under {root} ({said})")
    return ImageList(root, tuple(flat), None, ())
