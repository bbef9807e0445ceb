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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastcr.data.images import ImageList, Splits
from fastcr.data.text_lists import read_text
from fastcr.errors import UsageError


def read_archive(root: Path) -> Splits | None:
    """The splits of the archive unpacked in `root`; None where there is none.

    Raises `UsageError` if a table is missing or broken, or names images that are not there.
    """
    for mark, read in ARCHIVES.items():
        # exists() would take a pipe, and its reader wait for ever
        if (root / mark).is_file() or (root / mark).is_dir():
            return read(root)
    return None


def _split(classes: Iterable[str], table: Path, root: Path, rows: Iterable[tuple[str, str]]) -> ImageList:
    """The images below `root` that `table` names: `rows` are files and the names of their classes.

    Raises `UsageError` if some lie elsewhere or nowhere, or in none of the `classes`.
    """
    rows, classes = sorted(rows), tuple(classes)
    if not rows:
        raise UsageError(f"{table} names no images for one of the splits")
    if outside := [file for file, _ in rows if os.path.isabs(file) or ".." in Path(file).parts]:
        raise UsageError(f"{table} names an image outside {root}: {outside[0]!r}")
    if missing := [file for file, _ in rows if not os.path.isfile(root / file)]:
        counted = f"{len(missing)} of the {len(rows)} images"
        raise UsageError(f"{counted} that {table} names are not in {root}, e.g. {missing[0]!r}")
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


def _cub(root: Path) -> Splits:
    names = ("images.txt", "train_test_split.txt", "image_class_labels.txt")
    files, training, labels = (_lines(root / name) for name in names)
    if not files.keys() == training.keys() == labels.keys():
        raise UsageError(f"{', '.join(names)} of {root} list different ids")
    rows = {flag: [(file, file.split("/")[0]) for id_, file in files.items() if training[id_] == flag] for flag in "10"}
    classes = sorted({file.split("/")[0] for file in files.values()})
    return Splits(*(_split(classes, root / names[1], root / "images", each) for each in rows.values()))


def _matlab(file: Path, name: str) -> Any:
    """Variable `name` of a MATLAB file, an array."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UsageError('the tables of Stanford Cars need scipy: pip install "fastcr[archives]"') from None
    with _reading(file, f"the archive's MATLAB file with {name!r}"):
        return np.atleast_1d(loadmat(file, variable_names=[name], squeeze_me=True)[name])


def _cars(root: Path) -> Splits:
    classes = [*map(str, _matlab(root / "devkit" / "cars_meta.mat", "class_names"))]

    def split(folder: str, table: Path) -> ImageList:
        annotations = _matlab(table, "annotations")
        # the devkit's own test table has no labels: the one that has came separately
        with _reading(table, f"a table of files and their classes, which count from 1 to {len(classes)}"):
            numbered = dict(enumerate(classes, start=1))
            rows = [(str(row["fname"]), numbered[int(row["class"])]) for row in annotations]
        return _split(classes, table, root / folder, rows)

    labels = "cars_test_annos_withlabels.mat"
    test = root / labels if (root / labels).is_file() else root / "devkit" / labels
    return Splits(split("cars_train", root / "devkit" / "cars_train_annos.mat"), split("cars_test", test))


def _aircraft(root: Path) -> Splits:
    with _reading(root / "variants.txt", "the list of classes"):
        classes = [line.strip() for line in read_text(root / "variants.txt").splitlines() if line.strip()]
    tables = root / "images_variant_trainval.txt", root / "images_variant_test.txt"
    rows = ([(f"{id_}.jpg", name) for id_, name in _lines(table).items()] for table in tables)
    return Splits(*(_split(classes, table, root / "images", each) for table, each in zip(tables, rows, strict=True)))


def _inat(root: Path) -> Splits:
    def read(file: Path) -> tuple[list[str], list[tuple[str, str]]]:
        with _reading(file, "iNaturalist's table of images, annotations and categories"):
            content = json.loads(file.read_bytes())
            names = {row["id"]: str(row["name"]) for row in sorted(content["categories"], key=lambda row: row["id"])}
            files = {row["id"]: str(row["file_name"]) for row in content["images"]}
            rows = [(files[row["image_id"]], names[row["category_id"]]) for row in content["annotations"]]
            return [*names.values()], rows

    files = root / "train2019.json", root / "val2019.json"
    (classes, train), (_, test) = map(read, files)
    return Splits(_split(classes, files[0], root, train), _split(classes, files[1], root, test))


# by what the root of each holds
ARCHIVES = {
    "images.txt": _cub,
    "cars_train": _cars,
    "images_variant_trainval.txt": _aircraft,
    "train2019.json": _inat,
}
