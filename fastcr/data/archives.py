"""The original archives of four data sets, recognised by what the root holds: their tables to labelled splits.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastcr.data.images import ImageList, Splits
from fastcr.data.text_lists import read_text
from fastcr.errors import UsageError

Rows = Iterable[tuple[str, str]]  # file, name of its class


class Part(NamedTuple):
    """A split as an archive describes it."""

    table: Path  # the file that lists its images
    folder: Path  # where they lie
    rows: Rows


Archive = tuple[tuple[str, ...], Part, Part]  # classes; training and test images


def read_archive(root: Path) -> Splits | None:
    """The splits of the archive unpacked in `root` or in the folder it unpacks to; None where there is none.

    Raises `UsageError` if a table is missing or broken, or names images that are not there.
    """
    for marks, homes, read in ARCHIVES:
        for base in (root, *(root / home for home in homes)):
            # exists() would take a pipe, and its reader wait for ever
            if any((base / mark).is_file() or (base / mark).is_dir() for mark in marks):
                classes, train, test = read(base)
                return Splits(_split(classes, *train), _split(classes, *test))
    return None


def _split(classes: tuple[str, ...], table: Path, root: Path, rows: Rows) -> ImageList:
    """The images that `table` names, below `root`. `UsageError` if some lie elsewhere or nowhere, or in no class."""
    rows = sorted(rows)
    if not rows:
        raise UsageError(f"{table} names no images for one of the splits")
    if outside := [file for file, _ in rows if os.path.isabs(file) or ".." in Path(file).parts]:
        raise UsageError(f"{table} names an image outside {root}: {outside[0]!r}")
    if missing := [file for file, _ in rows if not os.path.isfile(root / file)]:
        raise UsageError(
            f"{len(missing)} of the {len(rows)} images that {table} names are not in {root}, e.g. {missing[0]!r}"
        )
    if unknown := {name for _, name in rows} - {*classes}:
        raise UsageError(f"{table} names a class that is not in the list of classes: {min(unknown)!r}")
    images = ImageList(root, tuple(file for file, _ in rows), None, ())
    return images.with_labels([name for _, name in rows], classes)


@contextmanager
def _reading(file: Path, what: str) -> Iterator[None]:
    """Whatever a reader raises about a table becomes the one line that it is missing, or is not `what`."""
    try:
        yield
    except Exception:  # readers raise whatever the broken bytes lead them to
        raise UsageError(f"{file} is missing or is not {what}") from None


def _lines(file: Path) -> dict[str, str]:
    """A table of lines `<image id> <value>`; the value may hold spaces."""
    with _reading(file, "a table of '<image id> <value>'"):
        pairs = (line.split(None, 1) for line in read_text(file).splitlines() if line.strip())
        return {id_: value.strip() for id_, value in pairs}


def _cub(root: Path) -> Archive:
    names = ("images.txt", "train_test_split.txt", "image_class_labels.txt")
    files, training, labels = (_lines(root / name) for name in names)
    if not files.keys() == training.keys() == labels.keys():
        raise UsageError(f"images.txt, train_test_split.txt and image_class_labels.txt of {root} list different ids")
    rows = {id_: (file, file.split("/")[0]) for id_, file in files.items()}
    table, folder = root / "train_test_split.txt", root / "images"
    train, test = (Part(table, folder, [row for id_, row in rows.items() if training[id_] == flag]) for flag in "10")
    return tuple(sorted({name for _, name in rows.values()})), train, test


def _matlab(file: Path, name: str) -> Any:
    """Variable `name` of a MATLAB file, an array."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UsageError('the tables of Stanford Cars need scipy: pip install "fastcr[archives]"') from None
    with _reading(file, f"the archive's MATLAB file with {name!r}"):
        return np.atleast_1d(loadmat(file, variable_names=[name], squeeze_me=True)[name])


def _cars(root: Path) -> Archive:
    classes = tuple(map(str, _matlab(root / "devkit" / "cars_meta.mat", "class_names")))

    def part(folder: str, table: Path) -> Part:
        rows = _matlab(table, "annotations")
        # the devkit's own test table has no labels; the one with labels came separately
        with _reading(table, f"a table of files and their classes, which count from 1 to {len(classes)}"):
            numbered = dict(enumerate(classes, start=1))
            names = [numbered[int(number)] for number in rows["class"]]
            return Part(table, root / folder, [*zip(map(str, rows["fname"]), names, strict=True)])

    labels = "cars_test_annos_withlabels.mat"
    test_table = root / labels if (root / labels).is_file() else root / "devkit" / labels
    return classes, part("cars_train", root / "devkit" / "cars_train_annos.mat"), part("cars_test", test_table)


def _aircraft(root: Path) -> Archive:
    with _reading(root / "variants.txt", "the list of classes"):
        names = map(str.strip, read_text(root / "variants.txt").splitlines())
        classes = tuple(name for name in names if name)

    def part(table: Path) -> Part:
        return Part(table, root / "images", [(f"{id_}.jpg", name) for id_, name in _lines(table).items()])

    return classes, part(root / "images_variant_trainval.txt"), part(root / "images_variant_test.txt")


def _inat(root: Path) -> Archive:
    def read(file: Path) -> tuple[Part, tuple[str, ...]]:
        with _reading(file, "iNaturalist's table of images, annotations and categories"):
            content = json.loads(file.read_bytes())
            names = {row["id"]: str(row["name"]) for row in sorted(content["categories"], key=lambda row: row["id"])}
            files = {row["id"]: str(row["file_name"]) for row in content["images"]}
            rows = [(files[row["image_id"]], names[row["category_id"]]) for row in content["annotations"]]
            return Part(file, root, rows), tuple(names.values())

    (train, classes), (test, _) = read(root / "train2019.json"), read(root / "val2019.json")
    return classes, train, test


# what the root holds, the folders the archive unpacks to, and its reader
ARCHIVES: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Path], Archive]], ...] = (
    (("images.txt",), ("CUB_200_2011",), _cub),
    (("cars_train",), ("stanford_cars",), _cars),
    (("images_variant_trainval.txt",), ("data", "fgvc-aircraft-2013b/data"), _aircraft),
    (("train2019.json", "train_val2019"), (), _inat),
)
