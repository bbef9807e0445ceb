"""Images that a table names: a list in a text file, or the archive of one of four data sets, known by what it holds.

| archive | recognised by | training images | test images |
|---|---|---|---|
| CUB-200-2011 | `images.txt` | 1 in `train_test_split.txt` | 0 |
| Stanford Cars | `cars_train/` | `devkit/cars_train_annos.mat` | `cars_test_annos_withlabels.mat` (here or there) |
| FGVC-Aircraft | `images_variant_trainval.txt` | that list, by variant | `images_variant_test.txt` |
| iNaturalist 2019 | `train2019.json` | that list | `val2019.json` |

The test labels of iNaturalist 2019 are not public: its validation list serves as the test split.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastcr.data.images import ImageList, Splits, composed
from fastcr.data.listing import TWICE, Notes
from fastcr.errors import UsageError

Rows = list[tuple[str, str]]  # files and the names of their classes


def read_text(file: Path) -> str:
    """The text of `file`, with or without a byte order mark; what is no UTF-8 is kept as `surrogateescape` does.

    Raises `OSError` if it cannot be read.
    """
    return file.read_bytes().decode("utf-8-sig", "surrogateescape")


def on_disk(folder: Path, path: str) -> str | None:
    """`path` below `folder` as it is spelled there, accents and separators; None if there is no such file."""
    turned = path.replace("\\", "/")
    spellings = (path, turned, composed(turned), unicodedata.normalize("NFD", turned))
    return next((each for each in spellings if os.path.isfile(os.path.join(folder, each))), None)


def read_list(file: Path, notes: Notes) -> ImageList:
    """The images a text file names: on each line a path (from the file's own folder), then perhaps a tab and a label.

    Blank lines and lines that begin with `#` are skipped, and what is listed twice is listed once. Raises `UsageError`
    if the file is no text, or names no images, some that are not there, or one with two labels.
    """
    try:
        text = read_text(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise UsageError(f"{file} is neither a folder of images or tar shards nor a text file that lists images")
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip() and line[0] != "#"]
    if not lines:
        raise UsageError(f"{file} names no images")
    named = [(path, composed(label.strip())) for path, _, label in (line.partition("\t") for line in lines)]
    there = {path: on_disk(file.parent, path) for path, _ in named}
    if missing := sorted(path for path, spelling in there.items() if spelling is None):
        raise UsageError(
            f"{len(missing)} of the {len(there)} images that {file} names are not there, e.g. {missing[0]!r} "
            "(each line: a path, then perhaps a tab and a label)"
        )
    rows = sorted({(there[path] or "", label) for path, label in named})
    paths, labels = zip(*rows, strict=True)
    if two := [path for path, following in pairwise(paths) if path == following]:
        raise UsageError(f"{file} names {two[0]!r} with two labels")
    notes[TWICE] += [file.parent / path for (path, _), times in Counter(named).items() if times > 1]
    return ImageList(file.parent, paths, None, ()).with_labels([label or None for label in labels], sorted({*labels}))


def read_archive(root: Path) -> Splits | None:
    """The splits of the archive unpacked in `root`; None where there is none.

    Raises `UsageError` if a table is missing or broken, or names images that are not there.
    """
    # exists() would take a pipe, and its reader wait for ever
    read = next((read for mark, read in ARCHIVES.items() if (root / mark).is_file() or (root / mark).is_dir()), None)
    if read is None:
        return None
    tables = _Tables(root)
    try:
        classes, (train_folder, train), (test_folder, test) = read(tables)
    except ImportError:
        raise UsageError('the tables of Stanford Cars need scipy: pip install "fastcr[archives]"') from None
    except Exception:  # readers raise whatever the broken bytes lead them to
        raise UsageError(f"{tables.last} is missing, or is not the table that this archive has there") from None
    return Splits(_images(root / train_folder, train, classes), _images(root / test_folder, test, classes))


def _images(folder: Path, rows: Rows, classes: list[str]) -> ImageList:
    """The images of a split. Raises `UsageError` if some lie elsewhere or nowhere, or in none of the `classes`."""
    named, names = [file for file, _ in sorted(rows)], [name for _, name in sorted(rows)]
    if not rows:
        raise UsageError(f"the archive's tables name no images in {folder} for one of the splits")
    if outside := [file for file in named if os.path.isabs(file) or ".." in Path(file).parts]:
        raise UsageError(f"a table of the archive names an image outside {folder}: {outside[0]!r}")
    files = [on_disk(folder, file) or "" for file in named]
    if missing := [file for file, there in zip(named, files, strict=True) if not there]:
        counted = f"{len(missing)} of the {len(rows)} images that the archive's tables name"
        raise UsageError(f"{counted} are not in {folder}, e.g. {missing[0]!r}")
    if unknown := {*names} - {*classes}:
        raise UsageError(f"a class of {folder} is not in the list of classes: {min(unknown)!r}")
    return ImageList(folder, tuple(files), None, ()).with_labels(names, classes)


class _Tables:
    """The tables of an archive; `last` is the one that was opened last, and so the one that is broken."""

    def __init__(self, root: Path) -> None:
        self.root = self.last = root

    def lines(self, name: str) -> list[str]:
        self.last = self.root / name
        return [line.strip() for line in read_text(self.last).splitlines() if line.strip()]

    def pairs(self, name: str) -> dict[str, str]:
        """Lines `<image id> <value>`; the value may hold spaces."""
        return dict(line.split(None, 1) for line in self.lines(name))

    def matlab(self, name: str, variable: str) -> Any:
        """A variable of a MATLAB file, an array."""
        from scipy.io import loadmat

        self.last = self.root / name
        return np.atleast_1d(loadmat(self.last, variable_names=[variable], squeeze_me=True)[variable])


def _cub(tables: _Tables) -> Any:
    files, flags = tables.pairs("images.txt"), tables.pairs("train_test_split.txt")
    if files.keys() != flags.keys():
        raise KeyError
    rows = {flag: [(file, file.split("/")[0]) for id_, file in files.items() if flags[id_] == flag] for flag in "10"}
    return sorted({file.split("/")[0] for file in files.values()}), *(("images", each) for each in rows.values())


def _cars(tables: _Tables) -> Any:
    classes = [*map(str, tables.matlab("devkit/cars_meta.mat", "class_names"))]
    numbered = dict(enumerate(classes, start=1))
    # the devkit's own test table has no labels: the one that has came separately
    labels = "cars_test_annos_withlabels.mat"
    test = labels if (tables.root / labels).is_file() else f"devkit/{labels}"
    found = []
    for folder, name in (("cars_train", "devkit/cars_train_annos.mat"), ("cars_test", test)):
        rows = tables.matlab(name, "annotations")
        found.append((folder, [(str(row["fname"]), numbered[int(row["class"])]) for row in rows]))
    return classes, *found


def _aircraft(tables: _Tables) -> Any:
    files = [tables.pairs(f"images_variant_{split}.txt") for split in ("trainval", "test")]
    rows = ([(f"{id_}.jpg", name) for id_, name in each.items()] for each in files)
    return tables.lines("variants.txt"), *(("images", each) for each in rows)


def _inat(tables: _Tables) -> Any:
    found = []
    for split in ("train", "val"):
        tables.last = tables.root / f"{split}2019.json"
        content = json.loads(tables.last.read_bytes())
        names = {row["id"]: str(row["name"]) for row in sorted(content["categories"], key=lambda row: row["id"])}
        files = {row["id"]: str(row["file_name"]) for row in content["images"]}
        rows = [(files[row["image_id"]], names[row["category_id"]]) for row in content["annotations"]]
        found.append(([*names.values()], rows))
    return found[0][0], *((".", rows) for _, rows in found)


# by what the root of each holds
ARCHIVES = {
    "images.txt": _cub,
    "cars_train": _cars,
    "images_variant_trainval.txt": _aircraft,
    "train2019.json": _inat,
}
