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


@pytest.mark.parametrize("labelled", [False, True])
def test_odd_entries(tmp_path: Path, labelled: bool) -> None:
    """Folders and pipes are no images, whatever their names; a link that leads nowhere is listed, to be named."""
    folder = tmp_path / "a" if labelled else tmp_path
    names = ["plain.jpg", "with 'quote' and ü.jpg", "line\nbreak.jpg"]
    for name in names:
        put(folder / name)
    if labelled:  # a folder among images without labels would hold a class
        (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    images = read_splits(tmp_path).train
    assert [os.path.basename(file) for file in images.files] == sorted([*names, "broken.jpg"])
    with pytest.raises(OSError, match=r"broken.jpg' cannot be read: No such file"):
        images.rgb(0)


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
