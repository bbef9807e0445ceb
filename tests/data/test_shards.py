"""Tar shards: the same images and labels as the files they were packed from."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.pixel_cache import measure
from fastcr.errors import UsageError
from fastcr.runs.context import Context

CONTEXT = Context(workers=2)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def packed(birds: Path, tmp_path: Path) -> Path:
    """Every image with its label beside it, in the order of the list, 20 to a shard."""
    root, splits = tmp_path / "shards", read_splits(birds)
    root.mkdir()
    for name, images in (("train", splits.train), ("test", splits.test)):
        assert images
        assert images.labels
        for start in range(0, len(images), 20):
            with tarfile.open(root / f"{name}-{start:04d}.tar", "w") as tar:
                for i in range(start, min(start + 20, len(images))):
                    add(tar, f"birds/{i:06d}.jpg", images.read(i))
                    add(tar, f"birds/{i:06d}.cls", b"%d\n" % images.labels[i])
    return root


def same(first: ImageList | None, second: ImageList | None) -> bool:
    assert first is not None
    assert second is not None
    return first.labels == second.labels and all(first.read(i) == second.read(i) for i in range(len(second)))


def test_shards_hold_what_was_packed(packed: Path, birds: Path) -> None:
    splits, files = read_splits(packed), read_splits(birds)
    assert same(splits.train, files.train)
    assert same(splits.test, files.test)
    assert splits.train.classes == tuple(str(label) for label in range(16))
    assert splits.train.path(21) == str(packed / "train-0020.tar" / "birds" / "000021.jpg")
    assert same(pickle.loads(pickle.dumps(splits.train)), files.train)
    assert np.array_equal(measure(splits.train, 32, CONTEXT), measure(files.train, 32, CONTEXT))


def test_a_stamp_changes_with_the_shard(packed: Path) -> None:
    images = read_splits(packed).train
    before = [images.stamp(i) for i in range(len(images))]
    assert len(set(before)) == len(images)
    os.utime(packed / "train-0000.tar", (1, 1))
    changed = [stamp != images.stamp(i) for i, stamp in enumerate(before)]
    assert changed == [True] * 20 + [False] * 44


ODD = ("plain", "with space", "ü and \\", "tab\tand\nnewline", "deep/er/x", "long/" + "n" * 150)


def test_members_of_every_kind(tmp_path: Path, birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Odd names; components without an image; hidden files; a second image of a sample."""
    files = read_splits(birds).train
    with tarfile.open(tmp_path / "train-0.v1.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i, key in enumerate(ODD):
            add(tar, f"./{key}.json", json.dumps({"label": f"class {i % 2}", "text": "a bird"}).encode())
            add(tar, f"./{key}.mask.png", b"no picture of the sample")
            add(tar, f"./{key}.JPG", files.read(i))
            add(tar, f"./{key}.png", b"the second image of the sample")
        add(tar, "no-image.json", b'{"label": "class 0"}')
        add(tar, "deep/._hidden.jpg", b"")
        add(tar, "README", b"no extension")
    images = read_splits(tmp_path).train
    assert "samples in shards that hold no image: 1, e.g. 'train-0.v1.tar/no-image'" in capsys.readouterr().err
    assert [images.read(i) for i in range(len(images))] == [files.read(i) for i in range(len(ODD))]
    assert images.classes == ("class 0", "class 1")
    assert images.labels == (0, 1, 0, 1, 0, 1)


def test_mistakes_are_named(tmp_path: Path, packed: Path, birds: Path) -> None:
    images = read_splits(birds).train

    def shard(name: str, **members: bytes) -> Path:
        root = tmp_path / name
        root.mkdir()
        with tarfile.open(root / "train-0.tar", "w") as tar:
            for member, content in members.items():
                add(tar, member.replace("_", "."), content)
        return root

    picture = images.read(0)
    for root, words in (
        (shard("none", a_txt=b"", b_cls=b"1"), "no images in the shards"),
        (shard("list", a_jpg=picture, a_json=b"[1]"), "'a.json' holds no object"),
        (shard("nested", a_jpg=picture, a_json=b'{"label": [1]}'), "neither a number nor text"),
        (shard("partly", a_jpg=picture, a_cls=b"1", b_jpg=picture), "e.g. '.*/partly/train-0.tar/b.jpg', have none"),
    ):
        with pytest.raises(UsageError, match=words):
            read_splits(root)
    assert read_splits(shard("unlabelled", a_jpg=picture, a_json=b'{"caption": "wren"}')).train.labels is None
    alike = shard("alike", a_jpg=picture, a_cls=b"1", b_jpg=picture, b_json=b'{"label": "1"}')
    assert (read_splits(alike).train.labels, read_splits(alike).train.classes) == ((0, 0), ("1",))
    (packed / "train-0000.tar").write_bytes((packed / "train-0000.tar").read_bytes()[:2000])
    with pytest.raises(UsageError, match=r"train-0000.tar is not a whole, uncompressed tar: unexpected end of data"):
        read_splits(packed)
