"""The original archives, in miniature and in their true formats: which image goes where, under which class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.errors import UsageError


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def cub(root: Path) -> None:
    """Ids are not in the order of the files."""
    rows = [("3", "001.Wren/b.jpg", "1", "1"), ("1", "001.Wren/a.jpg", "0", "1"),
            ("4", "002.Robin/d.jpg", "1", "2"), ("2", "002.Robin/c.jpg", "0", "2")]  # fmt: skip
    for _, file, _, _ in rows:
        put(root / "images" / file)
    for name, column in (("images.txt", 1), ("train_test_split.txt", 2), ("image_class_labels.txt", 3)):
        (root / name).write_text("".join(f"{row[0]} {row[column]}\n" for row in rows))


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ford F-150"]


def save_matlab(file: Path, **variables: Any) -> None:
    """A struct array for a list of dicts, a cell array for a list of names."""
    io = pytest.importorskip("scipy.io")
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, rows in variables.items():
        if isinstance(rows[0], dict):
            structs = np.zeros((1, len(rows)), dtype=[(key, object) for key in rows[0]])
            for i, row in enumerate(rows):
                structs[0, i] = tuple(row.values())
            variables[name] = structs
        else:
            variables[name] = np.array([rows], dtype=object)
    io.savemat(file, variables)


def car(place: dict[str, Any]) -> dict[str, Any]:
    return {"bbox_x1": 3, "bbox_y1": 4, "bbox_x2": 7, "bbox_y2": 8} | place


def cars(root: Path) -> None:
    """Training and test folder number their files alike; classes count from 1."""
    train = [("00001.jpg", 3), ("00002.jpg", 1), ("00003.jpg", 3)]
    test = [("00001.jpg", 2)]
    for folder, rows in (("cars_train", train), ("cars_test", test)):
        for file, _ in rows:
            put(root / folder / file)
    save_matlab(root / "devkit" / "cars_meta.mat", class_names=CARS)
    for name, rows in (("devkit/cars_train_annos.mat", train), ("devkit/cars_test_annos_withlabels.mat", test)):
        save_matlab(root / name, annotations=[car({"class": label, "fname": file}) for file, label in rows])
    save_matlab(root / "devkit" / "cars_test_annos.mat", annotations=[car({"fname": "00001.jpg"})])


def aircraft(root: Path) -> None:
    """Variants with spaces and slashes; lists of other levels lie beside them."""
    lists = {"trainval": "0063287 737-200\n1025794 Falcon 2000\n0056978 F/A-18\n", "test": "1514522 737-200\n"}
    for split, text in lists.items():
        (root / f"images_variant_{split}.txt").write_text(text)
        (root / f"images_family_{split}.txt").write_text("0063287 Boeing 737\n")
        for line in text.splitlines():
            put(root / "images" / f"{line.split()[0]}.jpg")
    (root / "images_variant_train.txt").write_text("0063287 737-200\n")
    (root / "variants.txt").write_text("737-200\nF/A-18\nFalcon 2000\n")


def inat(root: Path) -> None:
    """Images and annotations in different orders; categories not sorted."""
    files = {7: "train_val2019/Birds/5/b.jpg", 3: "train_val2019/Birds/2/a.jpg", 9: "train_val2019/Birds/5/v.jpg"}
    categories = [{"id": 5, "name": "Turdus merula", "supercategory": "Birds"},
                  {"id": 2, "name": "Parus major", "supercategory": "Birds"}]  # fmt: skip
    for split, ids in (("train", {3: 2, 7: 5}), ("val", {9: 5})):
        images = [{"id": id_, "file_name": files[id_], "width": 8, "height": 8} for id_ in sorted(ids, reverse=True)]
        annotations = [{"id": 100 + id_, "image_id": id_, "category_id": label} for id_, label in ids.items()]
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}2019.json").write_text(json.dumps(content))
    for file in files.values():
        put(root / file)


def content(images: ImageList | None) -> dict[str, str]:
    assert images is not None
    assert images.labels is not None
    assert all(images.rgb(index).size == (8, 8) for index in range(len(images)))
    return {file: images.classes[label] for file, label in zip(images.files, images.labels, strict=True)}


ARCHIVES: dict[str, tuple[Callable[[Path], None], str, dict[str, str], dict[str, str], tuple[str, ...]]] = {
    "cub": (cub, "CUB_200_2011", {"001.Wren/b.jpg": "001.Wren", "002.Robin/d.jpg": "002.Robin"},
            {"001.Wren/a.jpg": "001.Wren", "002.Robin/c.jpg": "002.Robin"}, ("001.Wren", "002.Robin")),
    "cars": (cars, "stanford_cars", {"00001.jpg": CARS[2], "00002.jpg": CARS[0], "00003.jpg": CARS[2]},
             {"00001.jpg": CARS[1]}, tuple(CARS)),
    "aircraft": (aircraft, "fgvc-aircraft-2013b/data", {"0063287.jpg": "737-200", "1025794.jpg": "Falcon 2000",
             "0056978.jpg": "F/A-18"}, {"1514522.jpg": "737-200"}, ("737-200", "F/A-18", "Falcon 2000")),
    "inat": (inat, ".", {"train_val2019/Birds/2/a.jpg": "Parus major", "train_val2019/Birds/5/b.jpg": "Turdus merula"},
             {"train_val2019/Birds/5/v.jpg": "Turdus merula"}, ("Parus major", "Turdus merula")),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_read_by_its_tables(tmp_path: Path, name: str) -> None:
    """In its own folder or in the one that it unpacks to; missing images are counted."""
    make, home, train, test, classes = ARCHIVES[name]
    base = tmp_path / "unpacked" / home
    base.mkdir(parents=True, exist_ok=True)
    make(base)
    splits = read_splits(base)
    assert splits == read_splits(tmp_path / "unpacked")
    assert content(splits.train) == train
    assert content(splits.test) == test
    assert splits.test is not None
    assert splits.train.classes == splits.test.classes == classes
    assert list(splits.train.files) == sorted(splits.train.files)
    first, *_, last = sorted(train)
    for file in (first, last):
        next(path for path in base.rglob("*.jpg") if str(path).endswith(file)).unlink()
    with pytest.raises(UsageError, match=rf"^2 of the {len(train)} images that .* name are not in .*, e.g. '{first}'$"):
        read_splits(base)


TABLES = [
    (cub, "train_test_split.txt"),
    *((cars, f"devkit/{name}.mat") for name in ("cars_train_annos", "cars_test_annos_withlabels", "cars_meta")),
    *((aircraft, f"{name}.txt") for name in ("images_variant_trainval", "images_variant_test", "variants")),
    *((inat, f"{split}2019.json") for split in ("train", "val")),
]


@pytest.mark.parametrize(("make", "table"), TABLES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_broken_table_is_named(tmp_path: Path, make: Callable[[Path], None], table: str) -> None:
    make(tmp_path)
    file = tmp_path / table
    file.write_bytes(b"nonsense\n")
    with pytest.raises(UsageError, match=rf"{file.name}|not in the list of classes"):
        read_splits(tmp_path)
