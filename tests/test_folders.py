"""Which images a folder holds, in each of the layouts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from fastcr.config import UsageError
from fastcr.folders import read_splits


def put(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path)


def cub_archive(root: Path) -> None:
    """Four images of two classes in the original archive's layout; ids are not in the order of the files."""
    rows = [("3", "001.Wren/b.jpg", "1", "1"), ("1", "001.Wren/a.jpg", "0", "1"),
            ("4", "002.Robin/d.jpg", "1", "2"), ("2", "002.Robin/c.jpg", "0", "2")]  # fmt: skip
    for _, file, _, _ in rows:
        put(root / "images" / file)
    for name, column in (("images.txt", 1), ("train_test_split.txt", 2), ("image_class_labels.txt", 3)):
        (root / name).write_text("".join(f"{row[0]} {row[column]}\n" for row in rows))


def test_class_folders_with_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("wren", "robin"):
            for i in range(2):
                put(tmp_path / split / name / f"{i}.JPG")
    put(tmp_path / "train" / "wren" / "deeper" / "x.png")
    (tmp_path / "train" / "wren" / "notes.txt").write_text("no image")
    splits = read_splits(tmp_path)
    assert splits.train.classes == ("robin", "wren")
    assert splits.train.files == ("robin/0.JPG", "robin/1.JPG", "wren/0.JPG", "wren/1.JPG", "wren/deeper/x.png")
    assert splits.train.labels == (0, 0, 1, 1, 1)
    assert splits.test is not None
    assert len(splits.test) == 4
    assert all(os.path.isfile(splits.train.path(i)) for i in range(len(splits.train)))


@pytest.mark.parametrize("nested", [False, True])
def test_cub_archive(tmp_path: Path, nested: bool) -> None:
    cub_archive(tmp_path / "CUB_200_2011" if nested else tmp_path)
    splits = read_splits(tmp_path)
    assert splits.train.files == ("001.Wren/b.jpg", "002.Robin/d.jpg")
    assert splits.train.labels == (0, 1)
    assert splits.test is not None
    assert splits.test.files == ("001.Wren/a.jpg", "002.Robin/c.jpg")
    assert splits.test.classes == splits.train.classes == ("001.Wren", "002.Robin")
    assert os.path.isfile(splits.test.path(1))


def test_class_folders_without_splits_and_flat_folders(tmp_path: Path) -> None:
    put(tmp_path / "classes" / "a" / "1.png")
    put(tmp_path / "classes" / "b" / "1.png")
    splits = read_splits(tmp_path / "classes")
    assert (splits.train.labels, splits.test) == ((0, 1), None)
    for name in ("2.png", "1.png"):
        put(tmp_path / "flat" / name)
    splits = read_splits(tmp_path / "flat")
    assert splits.train.files == ("1.png", "2.png")
    assert splits.train.labels is None


def test_odd_entries_are_passed_over(tmp_path: Path) -> None:
    for name in ("plain.jpg", "with 'quote' and ü.jpg", "line\nbreak.jpg"):
        put(tmp_path / "a" / name)
    (tmp_path / "a" / "folder.jpg").mkdir()
    (tmp_path / "a" / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert len(read_splits(tmp_path).train) == 3


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        read_splits(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images under"):
        read_splits(tmp_path / "empty")
    put(tmp_path / "odd" / "train" / "wren" / "1.png")
    put(tmp_path / "odd" / "test" / "robin" / "1.png")
    with pytest.raises(UsageError, match=r"different classes: 2 are in one only, e.g. 'robin'"):
        read_splits(tmp_path / "odd")
    put(tmp_path / "only" / "test" / "robin" / "1.png")
    with pytest.raises(UsageError, match="none named train"):
        read_splits(tmp_path / "only")


@pytest.mark.parametrize("table", ["train_test_split.txt", "image_class_labels.txt"])
@pytest.mark.parametrize("damage", ["missing", "short", "garbled"])
def test_broken_cub_tables_are_named(tmp_path: Path, table: str, damage: str) -> None:
    cub_archive(tmp_path)
    file = tmp_path / table
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_text("1 1\n")
    else:
        file.write_text("nonsense\n")
    with pytest.raises(UsageError, match=r"image_class_labels|train_test_split"):
        read_splits(tmp_path)
