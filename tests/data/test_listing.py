"""Folders as systems, programs and people leave them: what is read, what is left out, and what is said of it."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcr.data.images import ImageList
from fastcr.data.layouts import list_splits
from fastcr.data.listing import ALIKE, BESIDE, DEEPER, EMPTY, HIDDEN, LISTS, MASKED, OTHERS, SPELT
from fastcr.errors import UsageError
from fastcr.folders import main


def picture(shade: int = 0, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, kind)
    return file.getvalue()


def plant(root: Path, *files: str, content: bytes = picture()) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def names(images: ImageList | None, root: Path) -> list[str]:
    """Each image as `path below root=class`."""
    if images is None:
        return []
    labels = ["" if images.labels is None else images.classes[label] for label in images.labels or [0] * len(images)]
    files = (os.path.relpath(images.path(index), root) for index in range(len(images)))
    return [f"{file}={label}" for file, label in zip(files, labels, strict=True)]


def numbers(notes: tuple[str, ...]) -> dict[str, int]:
    """How many of each kind the notes say."""
    return {": ".join(parts[:2]): int(parts[2].split(",")[0]) for parts in (note.split(": ") for note in notes)}


BIRDS = ("crow/0.jpg", "wren/0.jpg")


def test_what_systems_leave_is_no_image_and_no_class(tmp_path: Path) -> None:
    left = (
        "crow/._0.jpg", "._crow", "__MACOSX/crow/0.jpg", ".ipynb_checkpoints/0.jpg", "crow/@eaDir/0.jpg",
        "crow/Thumbs.db", ".DS_Store", ".hidden/0.jpg", "lost+found/0.jpg", "$RECYCLE.BIN/0.jpg", "#recycle/0.jpg",
        "System Volume Information/0.jpg", "crow/~snapshot/0.jpg", "FOUND.000/0.jpg", "Network Trash Folder/0.jpg",
    )  # fmt: skip
    root = plant(tmp_path / ".cache" / "birds", *BIRDS, *left)  # below a hidden folder, which is no matter
    splits, notes = list_splits(root)
    assert names(splits.train, root) == ["crow/0.jpg=crow", "wren/0.jpg=wren"]
    assert notes == (f"{HIDDEN}: {len(left)}",)


def linked(root: Path) -> None:
    plant(root, "crow/0.jpg", "elsewhere/more/1.jpg")
    (root / "elsewhere").rename(root.parent / "elsewhere")
    (root / "crow" / "deep").symlink_to(root.parent / "elsewhere")
    (root / "wren").symlink_to(root.parent / "elsewhere" / "more")


def looping(root: Path) -> None:
    plant(root, *BIRDS)
    (root / "crow" / "up").symlink_to(root)
    (root / "wren" / "crow").symlink_to(root / "crow")
    (root / "crow" / "wren").symlink_to(root / "wren")
    (root / "loop").symlink_to(root.parent)


def imageless(root: Path) -> None:
    plant(root, "a/0.jpg")
    plant(root, "b/notes.txt", content=b"no image")
    (root / "c").mkdir()


# a tree; training and test images; and what is said, by number
TREES: dict[str, tuple[Callable[[Path], object] | tuple[str, ...], list[str], list[str], dict[str, int]]] = {
    "val": (("Train/a/0.jpg", "Validation/a/1.jpg"), ["Train/a/0.jpg=a"], ["Validation/a/1.jpg=a"], {}),
    "val beside test": (
        ("train/a/0.jpg", "val/a/1.jpg", "test/a/2.jpg"), ["train/a/0.jpg=a"], ["test/a/2.jpg=a"], {BESIDE: 1},
    ),
    "test without labels": (
        ("train/a/0.jpg", "val/a/1.jpg", "test/2.jpg"), ["train/a/0.jpg=a"], ["val/a/1.jpg=a"], {BESIDE: 1},
    ),
    "other classes in test": (
        ("train/crow/0.jpg", "train/robin/1.jpg", "test/robin/2.jpg", "test/wren/3.jpg"),
        ["train/crow/0.jpg=crow", "train/robin/1.jpg=robin"], ["test/robin/2.jpg=robin", "test/wren/3.jpg=wren"], {},
    ),
    "a class named train": (
        ("bus/0.jpg", "car/0.jpg", "train/0.jpg"), ["bus/0.jpg=bus", "car/0.jpg=car", "train/0.jpg=train"], [], {},
    ),
    "unpacked into itself": (
        ("birds/birds/train/a/0.jpg", "birds/birds/test/a/1.jpg", "birds/__MACOSX/x"),
        ["birds/birds/train/a/0.jpg=a"], ["birds/birds/test/a/1.jpg=a"], {HIDDEN: 1},
    ),
    "an archive beside what it was unpacked to": (
        ("a/0.jpg", "b/1.jpg", "birds.tar"), ["a/0.jpg=a", "b/1.jpg=b"], [], {OTHERS: 1},
    ),
    "deeper folders": (
        ("a/x/0.jpg", "a/1.jpg", "b/2.jpg"), ["a/1.jpg=a", "a/x/0.jpg=a", "b/2.jpg=b"], [], {DEEPER: 1},
    ),
    "links": (
        linked, ["crow/0.jpg=crow", "crow/deep/more/1.jpg=crow", "wren/1.jpg=wren"], [], {DEEPER: 1},
    ),
    "loops": (
        looping, ["crow/0.jpg=crow", "crow/wren/0.jpg=crow", "wren/0.jpg=wren", "wren/crow/0.jpg=wren"], [],
        {EMPTY: 1, DEEPER: 2},
    ),
    "folders without an image": (imageless, ["a/0.jpg=a"], [], {OTHERS: 1, EMPTY: 2}),
    "splits inside the classes": (
        ("cap/train/good/0.jpg", "cap/test/torn/1.jpg", "cap/ground_truth/torn/1.png", "nut/train/2.jpg", "nut/3.jpg"),
        ["cap/train/good/0.jpg=cap", "nut/train/2.jpg=nut"], ["cap/test/torn/1.jpg=cap"],
        {MASKED: 1, BESIDE: 1, DEEPER: 3},
    ),
    "splits with other words": (
        ("train2017/a/0.jpg", "val2017/a/1.jpg", "annotations/x.json"),
        ["train2017/a/0.jpg=a"], ["val2017/a/1.jpg=a"], {MASKED: 1},
    ),
    "an archive with lists": (
        ("food/images/pie/0.jpg", "food/images/tart/1.jpg", "food/meta/train.txt", "food/README.txt"),
        ["food/images/pie/0.jpg=pie", "food/images/tart/1.jpg=tart"], [], {EMPTY: 1, OTHERS: 2, LISTS: 1},
    ),
    "masks": (
        ("images/cat/0.jpg", "images/cat/0_mask.png", "images/dog/night_mask.jpg", "masks/cat/0.png"),
        ["images/cat/0.jpg=cat", "images/dog/night_mask.jpg=dog"], [], {MASKED: 2},
    ),
    "classes named masks and train": (
        ("labels/0.jpg", "masks/0.jpg", "toys/train/1.jpg"),
        ["labels/0.jpg=labels", "masks/0.jpg=masks", "toys/train/1.jpg=toys"], [], {DEEPER: 1},
    ),
    "an accent in two forms": (
        ("train/caf\u00e9/0.jpg", "train/cafe\u0301/1.jpg", "train/tea/2.jpg",
         "test/cafe\u0301/3.jpg", "test/Tea/4.jpg"),
        ["train/cafe\u0301/1.jpg=caf\u00e9", "train/caf\u00e9/0.jpg=caf\u00e9", "train/tea/2.jpg=tea"],
        ["test/Tea/4.jpg=Tea", "test/cafe\u0301/3.jpg=caf\u00e9"], {SPELT: 2, ALIKE: 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
def test_nothing_is_left_out_or_merged_in_silence(tmp_path: Path, tree: str) -> None:
    make, train, test, notes = TREES[tree]
    root = tmp_path / "root"
    root.mkdir()
    plant(root, *make) if isinstance(make, tuple) else make(root)
    splits, said = list_splits(root)
    assert names(splits.train, root) == train
    assert names(splits.test, root) == test
    assert numbers(said) == notes


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train\\crow\\0.jpg", "test\\crow\\1.jpg"], r"2 images with backslashes .*'test.*crow.*1.jpg'.* `unzip`"),
        (["crow/0.jpg", "wren/test/1.jpg"], r"'.*/wren/test/1.jpg' is of a split inside a class, and no class holds"),
    ],
)
def test_splits_that_cannot_be_told_are_refused(tmp_path: Path, files: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        list_splits(plant(tmp_path, *files))


def test_without_images_it_is_said_what_is_there(tmp_path: Path) -> None:
    plant(tmp_path, "a/0.HEIC", "a/1.HEIC", "b/2.HEIC", content=b"\0\0\0\x18ftypheic")
    with pytest.raises(UsageError, match=r"no images under .* 3, e.g. 'a/0.HEIC' \(by ending: .heic 3\)"):
        list_splits(tmp_path)


def tar(file: Path, *members: tuple[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as shard:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(
    ("shards", "train", "test", "beside"),
    [
        (["birds-train-0.tar", "birds-test-0.tar"], 1, 1, 0),
        (["train.tar", "test.tar", "val.tar"], 1, 1, 1),
        (["contest-0.tar", "strain-0.tar"], 2, 0, 0),  # no word of the names
    ],
)
def test_the_split_of_a_shard_is_a_word_of_its_name(
    tmp_path: Path, shards: list[str], train: int, test: int, beside: int
) -> None:
    for name in shards:
        tar(tmp_path / name, ("0.jpg", picture()), ("0.cls", b"1"))
    plant(tmp_path, "._train-0.tar", content=b"\0\5\26\7")
    splits, said = list_splits(tmp_path)
    assert (len(splits.train), len(splits.test or ())) == (train, test)
    assert numbers(said) == {HIDDEN: 1} | ({BESIDE: beside} if beside else {})
    assert splits.train.rgb(0).size == (8, 8)


def test_a_dot_in_a_key_is_refused_where_it_hides_the_image(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", ("0.seg.png", picture()), ("0.jpg", picture()))
    assert list_splits(tmp_path)[0].train.files == ("train-0.tar/0.jpg",)
    tar(tmp_path / "train-1.tar", ("v1.0.jpg", picture()))
    with pytest.raises(UsageError, match=r"the key of 'v1.0.jpg' ends at its first dot"):
        list_splits(tmp_path)


def test_copies_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First those in another class, then those in another split; each once, by its bytes rather than by its looks."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    scenes = [Image.fromarray(each).resize((90, 70), Image.Resampling.BICUBIC) for each in noise]
    for image, name in zip(scenes, ["train/a/0.png", "train/b/1.png", "test/a/2.png"], strict=True):
        plant(tmp_path, name)
        image.save(tmp_path / name)
    plant(tmp_path, "train/a/black.jpg", "test/b/black.jpg")
    for name, shade in (("train/b/flat.png", 20), ("test/b/flat.png", 30)):  # these look like any other
        flat = Image.new("L", (8, 8), shade)
        flat.putpixel((3, 3), shade + 1)
        flat.save(tmp_path / name)
    main([str(tmp_path)])
    assert re.findall(r"^(?:copies|test images).*", out := capsys.readouterr().out, re.MULTILINE) == [
        "copies of images of another class: 1"
    ], out
    for folder in ("train/b", "test/a"):
        shutil.copy(tmp_path / "train/a/0.png", tmp_path / folder / "copy.png")
    scenes[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "test/b/mirrored.jpg", quality=60)
    scenes[2].resize((50, 40)).save(tmp_path / "test/a/small.png")
    main([str(tmp_path)])
    said = capsys.readouterr().out.replace(str(tmp_path) + "/", "").splitlines()
    assert said[said.index("copies of images of another class: 3") :][:-1] == [
        "copies of images of another class: 3",
        "  'train/b/copy.png' is 'train/a/0.png'",
        "  'test/a/copy.png' is 'train/b/copy.png'",
        "  'test/b/black.jpg' is 'train/a/black.jpg'",
        "test images that also train: 1",
        "  'test/b/mirrored.jpg' looks like 'train/b/1.png'",
        "copies within a class and a split: 1",
        "  'test/a/small.png' looks like 'test/a/2.png'",
    ]
