"""A root to the images of its splits, whichever of these layouts it has.

- an original archive (`archives.py`): CUB-200-2011, Stanford Cars, FGVC-Aircraft or iNaturalist 2019;
- class folders below `train/` and, if there is a test split, `test/` or `val/`; or class folders alone;
- a flat folder of images without labels (also as `train/` and `test/`);
- a folder of tar shards (`shards.py`);
- any of these in a folder that alone in the root holds images, as some archives unpack;
- a text file that lists images (`archives.py`), with or without labels.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path

from fastcr.data.archives import read_archive, read_list
from fastcr.data.images import SUFFIXES, ImageList, Splits, composed
from fastcr.data.listing import (
    ALIKE,
    BESIDE,
    EMPTY,
    OTHERS,
    SPELT,
    Entries,
    Notes,
    ending_of,
    entries_of,
    holds_images,
    images_below,
    split_of,
)
from fastcr.data.shards import read_shards
from fastcr.errors import UsageError

NESTED = 3  # folders that lie alone in one another
FEW = 8  # folders among which a bullet_train and a test_tube are splits rather than classes


def read_splits(root: Path) -> Splits:
    """List the images of `root`, a folder or a text file; what is left out is said on stderr, in a line for each kind.

    Raises `UsageError` if `root` is missing or holds no image.
    """
    splits, notes = list_splits(Path(root))
    for note in notes:
        print(f"fastcr: {root}: {note}", file=sys.stderr)
    return splits


def list_splits(root: Path) -> tuple[Splits, tuple[str, ...]]:
    """As `read_splits`, but nothing is printed: the lines that are to be said come beside the splits."""
    notes, folder = Notes(), root
    if root.is_file():
        return _noted(Splits(read_list(root, notes), None), notes, root.parent)
    if not root.is_dir():
        raise UsageError(f"no folder {root}")
    for _ in range(NESTED):
        entries = entries_of(folder, notes)
        found = read_archive(folder) or _split_folders(folder, entries, notes) or read_shards(folder, entries, notes)
        full = [*islice((name for name in entries.folders if holds_images(folder / name)), 2)]
        if found or len(full) != 1 or entries.images:
            break
        inside = entries_of(folder / full[0], Notes())
        if inside.images or not (inside.folders or any(ending_of(name) == ".tar" for name in inside.others)):
            break  # a class
        empty = [name for name in entries.folders if name != full[0]]
        notes[EMPTY] += [folder / name for name in empty if not images_below(folder, name, notes)]
        notes[OTHERS] += [folder / name for name in entries.others]
        folder /= full[0]
    found = found or _splits_within(_class_folders(folder, entries_of(folder, notes), notes), notes)
    return _noted(found, notes, root)


def _noted(splits: Splits, notes: Notes, root: Path) -> tuple[Splits, tuple[str, ...]]:
    """The splits, and what is to be said of them."""
    alike = defaultdict[str, list[str]](list)
    for name in sorted({*splits.train.classes, *(splits.test.classes if splits.test else ())}):
        alike["".join(name.casefold().replace("-", " ").replace("_", " ").split())].append(name)
    notes[ALIKE] += [root / " and ".join(names) for names in alike.values() if len(names) > 1]
    return splits, notes.lines(root)


def _splits_within(images: ImageList, notes: Notes) -> Splits:
    """Images in class folders, apart where these hold `train` and `test` or `val` (MVTec, VisA, BTAD).

    Raises `UsageError` if a class holds a split of another name than train, and none holds `train`.
    """
    if images.labels is None:
        return Splits(images, None)
    found = defaultdict[str, list[int]](list)
    for index, file in enumerate(images.files):
        _, *folders, _ = file.replace("\\", "/").split("/")
        found[next(filter(None, map(split_of, folders)), "")].append(index)
    tests = found["test"] or found["val"]
    if tests and not found["train"]:
        raise UsageError(f"{images.path(tests[0])!r} is of a split inside a class, and no class holds a folder train")
    if not tests:
        return Splits(images, None)
    notes[BESIDE] += [images.path(index) for index in sorted({*range(len(images))} - {*found["train"], *tests})]

    def part(indices: list[int]) -> ImageList:
        labels = tuple((images.labels or ())[index] for index in indices)
        return replace(images, files=tuple(images.files[index] for index in indices), labels=labels)

    return Splits(part(found["train"]), part(tests))


def _split_folders(root: Path, entries: Entries, notes: Notes) -> Splits | None:
    """The images below `train` and `test` or `val`; None where there is no `train`, or where it is a class."""

    def named(among_words: bool) -> tuple[list[str], list[str]]:
        splits = {name: split_of(name, among_words=among_words) for name in entries.folders}
        train, test, val = ([name for name in splits if splits[name] == split] for split in ("train", "test", "val"))
        return train, test + val

    trains, tests = named(among_words=False)
    if not (trains and tests) and len(entries.folders) <= FEW and all(named(among_words=True)):
        trains, tests = named(among_words=True)  # train2017 and val2017, bounding_box_train and bounding_box_test
    if not trains:
        if "test" in map(str.lower, tests):
            raise UsageError(f"{root} has a folder {tests[0]} but none named train")
        return None
    train = trains[0]
    if not tests and len(entries.folders) > 1 and not entries_of(root / train, Notes()).folders:
        return None  # a class of vehicles
    # the first that has labels, or else the first
    test = next((name for name in tests if entries_of(root / name, Notes()).folders), tests[0] if tests else None)
    notes[BESIDE] += [root / name for name in (*entries.folders, *entries.images) if name not in (train, test)]
    images = [_class_folders(root / name, entries_of(root / name, notes), notes) for name in (train, test) if name]
    return _alike(*images)


def _alike(train: ImageList, test: ImageList | None = None) -> Splits:
    """The two splits with labels of the same classes, those of both together."""
    if test and train.labels is not None and test.labels is not None and train.classes != test.classes:
        classes = sorted({*train.classes, *test.classes})
        train, test = (
            part.with_labels([part.classes[label] for label in part.labels or ()], classes) for part in (train, test)
        )
    return Splits(train, test)


def _class_folders(root: Path, entries: Entries, notes: Notes) -> ImageList:
    """The images in the class folders of `root`, or else those directly in `root`, without labels."""
    found = {name: images for name in entries.folders if (images := images_below(root, name, notes))}
    notes[EMPTY] += [root / name for name in entries.folders if name not in found]
    notes[OTHERS] += [root / name for name in entries.others]
    if found and entries.images:
        inside = next(iter(found.values()))[0]
        raise UsageError(f"{root} holds images and also folders of images ({inside!r}): keep one kind")
    if found:
        files = tuple(file for images in found.values() for file in images)
        names = [name for name, images in found.items() for _ in images]
        spelt = Counter(map(composed, found))
        notes[SPELT] += [root / name for name in found if spelt[composed(name)] > 1]
        return ImageList(root, files, None, ()).with_labels(names, [*found])
    if windows := [name for name in entries.images if "\\" in name]:
        raise UsageError(
            f"{root} holds {len(windows)} images with backslashes in their names, e.g. {windows[0]!r}: they were "
            "folders in a zip of Windows; `unzip` makes them folders again"
        )
    if not entries.images:
        said = "; ".join([f"looked for {' '.join(sorted(SUFFIXES))}", *notes.lines(root)])
        raise UsageError(f"no images under {root} ({said})")
    return ImageList(root, tuple(entries.images), None, ())
