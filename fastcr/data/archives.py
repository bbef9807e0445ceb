"""The original archives of four data sets, recognised by what the root holds: their tables to labelled splits.

| archive | recognised by | training images | test images |
|---|---|---|---|
| CUB-200-2011 | `images.txt` | 1 in `train_test_split.txt` | 0 |
| Stanford Cars | `cars_train/` | `devkit/cars_train_annos.mat` | `cars_test_annos_withlabels.mat` (here or there) |
| the same, in one folder | `cars_annos.mat` | its rows without the flag `test` | those with it |
| FGVC-Aircraft | `images_variant_trainval.txt` | that list, by variant | `images_variant_test.txt` |
| iNaturalist 2019 | `train2019.json` | that list | `val2019.json` |

The test labels of iNaturalist 2019 are not public: its validation list serves as the test split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from fastcr.data.images import ImageList, Splits
from fastcr.errors import UsageError

Rows = Iterable[tuple[str, str]]  # file, name of its class


def read_archive(root: Path) -> Splits | None:
    """The splits of the archive unpacked in `root` or in the folder it unpacks to; None where there is none.

    Raises `UsageError` if a table is missing or broken, or names images that are not there.
    """
    for marks, homes, read in ARCHIVES:
        for base in (root, *(root / home for home in homes)):
            # exists() would take a pipe, and its reader wait for ever
            if any((base / mark).is_file() or (base / mark).is_dir() for mark in marks):
                return read(base)
    return None


def _split(root: Path, rows: Rows, classes: tuple[str, ...], table: Path) -> ImageList:
    """The images that `table` names, below `root`. `UsageError` if some lie elsewhere or nowhere, or in no class."""
    rows, number = sorted(rows), {name: i for i, name in enumerate(classes)}
    if not rows:
        raise UsageError(f"{table} names no images for one of the splits")
    if outside := [file for file, _ in rows if os.path.isabs(file) or ".." in Path(file).parts]:
        raise UsageError(f"{table} names an image outside {root}: {outside[0]!r}")
    if missing := [file for file, _ in rows if not os.path.isfile(root / file)]:
        raise UsageError(
            f"{len(missing)} of the {len(rows)} images that {table} names are not in {root}, e.g. {missing[0]!r}"
        )
    if unknown := {name for _, name in rows} - number.keys():
        raise UsageError(f"{table} names a class that is not in the list of classes: {min(unknown)!r}")
    return ImageList(root, tuple(file for file, _ in rows), tuple(number[name] for _, name in rows), classes)


def _lines(file: Path) -> dict[str, str]:
    """A table of lines `<image id> <value>`; the value may hold spaces."""
    try:
        pairs = (line.split(None, 1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        return {id_: value.strip() for id_, value in pairs}
    except (OSError, ValueError):
        raise UsageError(f"{file} is missing or is not a table of '<image id> <value>'") from None


def _cub(root: Path) -> Splits:
    files, training, labels = (
        _lines(root / name) for name in ("images.txt", "train_test_split.txt", "image_class_labels.txt")
    )
    if not files.keys() == training.keys() == labels.keys():
        raise UsageError(f"images.txt, train_test_split.txt and image_class_labels.txt of {root} list different ids")
    classes = tuple(sorted({file.split("/")[0] for file in files.values()}))

    def split(flag: str) -> ImageList:
        rows = [(file, file.split("/")[0]) for id_, file in files.items() if training[id_] == flag]
        return _split(root / "images", rows, classes, root / "train_test_split.txt")

    return Splits(split("1"), split("0"))


def _variable(file: Path, name: str) -> Any:
    from scipy.io import loadmat

    return loadmat(file, variable_names=[name], squeeze_me=True)[name]


def _matlab(file: Path, name: str, *fields: str) -> Any:
    """Variable `name` of a MATLAB file: an array, of records that have `fields` if any are named."""
    try:
        import scipy.io  # noqa: F401  # before the process that reads is forked
    except ImportError:
        raise UsageError('the tables of Stanford Cars need scipy: pip install "fastcr[archives]"') from None
    try:
        with ProcessPoolExecutor(1, get_context("fork")) as apart:  # broken bytes can crash scipy, and its process
            values = np.atleast_1d(apart.submit(_variable, file, name).result())
    except Exception:  # scipy raises whatever the broken bytes lead it to
        raise UsageError(f"{file} is missing or is not the archive's MATLAB file with {name!r}") from None
    if lacking := [field for field in fields if field not in (values.dtype.names or ())]:
        hint = ": the devkit's own test table has none, it came separately" if lacking == ["class"] else ""
        raise UsageError(f"{file}: {name!r} has no field {lacking[0]!r}{hint}")
    return values


def _cars(root: Path) -> Splits:
    classes = tuple(map(str, _matlab(root / "devkit" / "cars_meta.mat", "class_names")))
    test_table = root / "cars_test_annos_withlabels.mat"
    if not test_table.is_file():
        test_table = root / "devkit" / test_table.name

    def split(folder: str, table: Path) -> ImageList:
        rows = _matlab(table, "annotations", "fname", "class")
        return _split(root / folder, _numbered(rows["fname"], rows["class"], classes, table), classes, table)

    return Splits(split("cars_train", root / "devkit" / "cars_train_annos.mat"), split("cars_test", test_table))


def _cars_in_one_folder(root: Path) -> Splits:
    table = root / "cars_annos.mat"
    classes = tuple(map(str, _matlab(table, "class_names")))
    rows = _matlab(table, "annotations", "relative_im_path", "class", "test")

    def split(flag: int) -> ImageList:
        part = rows[rows["test"].astype(int) == flag]
        return _split(root, _numbered(part["relative_im_path"], part["class"], classes, table), classes, table)

    return Splits(split(0), split(1))


def _numbered(files: Any, numbers: Any, classes: tuple[str, ...], table: Path) -> Rows:
    """Files and their classes, which the tables of Cars count from 1."""
    if len(numbers) and not 1 <= min(numbers) <= max(numbers) <= len(classes):
        raise UsageError(f"{table} numbers classes outside 1..{len(classes)}")
    return [(str(file), classes[int(number) - 1]) for file, number in zip(files, numbers, strict=True)]


def _aircraft(root: Path) -> Splits:
    try:
        classes = tuple((root / "variants.txt").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        raise UsageError(f"{root / 'variants.txt'}, the list of classes, is missing or is not text") from None

    def split(table: Path) -> ImageList:
        return _split(root / "images", [(f"{id_}.jpg", name) for id_, name in _lines(table).items()], classes, table)

    return Splits(split(root / "images_variant_trainval.txt"), split(root / "images_variant_test.txt"))


def _inat(root: Path) -> Splits:
    def table(file: Path) -> tuple[Rows, list[str]]:
        try:
            content = json.loads(file.read_bytes())
            names = {row["id"]: str(row["name"]) for row in sorted(content["categories"], key=lambda row: row["id"])}
            files = {row["id"]: str(row["file_name"]) for row in content["images"]}
            rows = [(files[row["image_id"]], names[row["category_id"]]) for row in content["annotations"]]
            return rows, list(names.values())
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                f"{file} is missing or does not hold images, annotations and categories of iNaturalist"
            ) from None

    tables = [root / f"{split}2019.json" for split in ("train", "val")]
    (train, classes), (test, _) = (table(file) for file in tables)
    return Splits(_split(root, train, tuple(classes), tables[0]), _split(root, test, tuple(classes), tables[1]))


# what the root holds, the folders the archive unpacks to, and its reader
ARCHIVES: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Path], Splits]], ...] = (
    (("images.txt",), ("CUB_200_2011",), _cub),
    (("cars_annos.mat",), ("stanford_cars",), _cars_in_one_folder),
    (("cars_train",), ("stanford_cars",), _cars),
    (("images_variant_trainval.txt",), ("data", "fgvc-aircraft-2013b/data"), _aircraft),
    (("train2019.json", "train_val2019"), (), _inat),
)
