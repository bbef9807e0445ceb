"""Which images a folder holds, in each of the layouts; what is said of them; what broken files do to a run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from PIL import Image

from fastcr.data.layouts import read_splits
from fastcr.errors import UsageError
from fastcr.folders import main


def put(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path)


def test_a_flat_folder_is_sorted_and_has_no_labels(tmp_path: Path) -> None:
    for name in ("2.png", "1.JPG"):
        put(tmp_path / name)
    splits = read_splits(tmp_path)
    assert (splits.train.files, splits.train.labels, splits.test) == (("1.JPG", "2.png"), None, None)


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
    with pytest.raises(OSError, match=r"broken.jpg' cannot be read: No such file or directory"):
        images.rgb(0)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        read_splits(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images under"):
        read_splits(tmp_path / "empty")
    put(tmp_path / "only" / "test" / "robin" / "1.png")
    with pytest.raises(UsageError, match="none named train"):
        read_splits(tmp_path / "only")


def test_a_list_names_images_and_labels(tmp_path: Path) -> None:
    """Paths are those from the list's folder, or absolute; comments, blank lines and Windows' line ends are borne."""
    put(tmp_path / "far away" / "ü 1.png")
    put(tmp_path / "lists" / "2.png")
    file = tmp_path / "lists" / "birds.txt"
    file.write_bytes(f"# birds\r\n\r\n../far away/ü 1.png\r\n{tmp_path}/lists/2.png\n   \n".encode())
    splits = read_splits(file)
    assert (splits.test, splits.train.labels, len(splits.train)) == (None, None, 2)
    assert {splits.train.rgb(i).size for i in range(2)} == {(8, 8)}
    file.write_text("2.png\twood wren\n../far away/ü 1.png\ta robin")
    labelled = read_splits(file).train
    assert labelled.files == ("../far away/ü 1.png", "2.png")
    assert [labelled.classes[label] for label in labelled.labels or ()] == ["a robin", "wood wren"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("\ufeff1.png\twren\r\ndir/2 3.png\tcrow \r\n", ["wren", "crow"]),  # as Windows' editors save it
        ("1.png\t\ndir/2 3.png\t\n", None),
        ("1.png\tcafe\u0301\ndir\\2 3.png\tcaf\u00e9\ndir\\2 3.png\tcaf\u00e9\n", ["caf\u00e9"] * 2),
    ],
)
def test_a_list_is_read_as_people_write_it(tmp_path: Path, text: str, labels: list[str] | None) -> None:
    put(tmp_path / "1.png")
    put(tmp_path / "dir" / "2 3.png")
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    images = read_splits(tmp_path / "list.txt").train
    assert images.files == ("1.png", "dir/2 3.png")
    found = None if images.labels is None else [images.classes[label] for label in images.labels]
    assert found == labels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# nothing\n\n", r"list.txt names no images"),
        ("1.png\n2.png\n3.png\n", r"2 of the 3 images that .*list.txt names are not there, e.g. '2.png'"),
        ("a/0\n1.png\n", r"1 of the 2 images that .*list.txt names are not there, e.g. 'a/0'"),
        ("1.png\t1\n1.png\t01\n", r"list.txt names '1.png' with two labels"),
        ("1.png\twren\n./1.png\n", r"some images have a label and some, e.g. '.*/./1.png', have none"),
        ("\0\1\2", r"neither a folder of images or tar shards nor a text file that lists images"),
    ],
)
def test_mistakes_in_a_list_are_named(tmp_path: Path, text: str, words: str) -> None:
    put(tmp_path / "1.png")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_splits(tmp_path / "list.txt")


def test_the_check_counts_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, wrens in (("train", 3), ("test", 1)):
        for i in range(wrens):
            put(tmp_path / split / "wren" / f"{i}.png")
        put(tmp_path / split / "robin" / "a.png")
    main([str(tmp_path), "--classes"])
    out = capsys.readouterr().out
    rows = [re.findall(r"[^│\s][^│]*[^│\s]|[^│\s]", line) for line in out.splitlines() if line.startswith("│")]
    for row in (["images", "4", "2"], ["broken", "0", "0"], ["classes", "2", "2"],
                ["images a class", "1 / 2 / 3", "1 / 1 / 1"], ["width, px", "8 / 8 / 8", "8 / 8 / 8"],
                ["wren", "3", "1"], ["robin", "1", "1"]):  # fmt: skip
        assert row in rows
    assert "all 6 images are whole" in out
    picture = tmp_path / "train" / "wren" / "0.png"
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    out = capsys.readouterr().out
    assert stop.value.code == 1
    assert f"broken: '{picture}' is not a readable image" in out
    assert "1 of 6 images are broken" in out
    assert max(len(line) for line in out.splitlines() if "│" in line) <= 100
