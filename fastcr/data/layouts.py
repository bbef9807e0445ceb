"""A root to the images of its splits, whichever of these layouts it has.

- an original archive (`archives.py`): CUB-200-2011, Stanford Cars, FGVC-Aircraft or iNaturalist 2019;
- class folders below `train/` and, if there is a test split, `test/` or `val/`; or class folders alone;
- a flat folder of images without labels (also as `train/` and `test/`);
- a folder of tar shards (`shards.py`);
- any of these in a folder that lies alone in the root, as some archives unpack;
- a text file that lists images (`archives.py`), with or without labels.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

from fastcr.data.archives import read_archive, read_list
from fastcr.data.images import SUFFIXES, ImageList, Splits
from fastcr.data.listing import BESIDE, EMPTY, OTHERS, Entries, Notes, ending_of, entries_of, images_below, split_of
from fastcr.data.shards import read_shards
from fastcr.errors import UsageError

NESTED = 3  # folders that lie alone in one another


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
    if root.is_file():
        return Splits(read_list(root), None), ()
    if not root.is_dir():
        raise UsageError(f"no folder {root}")
    notes, folder = Notes(), root
    for _ in range(NESTED):
        entries = entries_of(folder, notes)
        found = read_archive(folder) or _split_folders(folder, entries, notes) or read_shards(folder, entries, notes)
        if found or len(entries.folders) != 1 or entries.images:
            break
        inside = entries_of(folder / entries.folders[0], Notes())
        if inside.images or not (inside.folders or any(ending_of(name) == ".tar" for name in inside.others)):
            break  # a class
        folder /= entries.folders[0]
    found = found or Splits(_class_folders(folder, entries_of(folder, notes), notes), None)
    return found, notes.lines(root)


def _split_folders(root: Path, entries: Entries, notes: Notes) -> Splits | None:
    """The images below `train` and `test` or `val`; None where there is no `train`, or where it is a class."""
    named = {split: [name for name in entries.folders if split_of(name) == split] for split in ("train", "test", "val")}
    tests = named["test"] + named["val"]
    if not named["train"]:
        if "test" in map(str.lower, tests):
            raise UsageError(f"{root} has a folder {tests[0]} but none named train")
        return None
    train = named["train"][0]
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
        # a Mac writes an accent as a letter of its own: the same name in another split need not be the same bytes
        composed = tuple(unicodedata.normalize("NFC", name) for name in found)
        classes = composed if len({*composed}) == len(found) else tuple(found)
        labels = tuple(label for label, images in enumerate(found.values()) for _ in images)
        return ImageList(root, tuple(file for images in found.values() for file in images), labels, classes)
    if not entries.images:
        said = "; ".join([f"looked for {' '.join(sorted(SUFFIXES))}", *notes.lines(root)])
        raise UsageError(f"no images under {root} ({said})")
    return ImageList(root, tuple(entries.images), None, ())
