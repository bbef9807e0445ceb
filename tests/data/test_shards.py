"""Tar shards: the same images, labels and views as the files they were packed from; indexes that DALI reads."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from fastcr.data.images import BadFiles, ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.pixel_cache import measure
from fastcr.data.shards import index_of, list_samples, read_index, write_index
from fastcr.data.torch_views import TorchViews
from fastcr.data.views import Batch, Loading
from fastcr.errors import UsageError
from fastcr.folders import main


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def pack(images: ImageList, root: Path, name: str, per_shard: int = 20) -> None:
    """Every image with its label beside it, in the order of the list."""
    root.mkdir(exist_ok=True)
    assert images.labels
    for start in range(0, len(images), per_shard):
        with tarfile.open(root / f"{name}-{start:04d}.tar", "w") as tar:
            for i in range(start, min(start + per_shard, len(images))):
                add(tar, f"birds/{i:06d}.jpg", images.read(i))
                add(tar, f"birds/{i:06d}.cls", b"%d\n" % images.labels[i])


@pytest.fixture
def packed(birds: Path, tmp_path: Path) -> Path:
    splits = read_splits(birds)
    assert splits.test
    pack(splits.train, tmp_path / "shards", "train")
    pack(splits.test, tmp_path / "shards", "test")
    return tmp_path / "shards"


def same(first: ImageList | None, second: ImageList | None) -> bool:
    assert first is not None
    assert second is not None
    return first.labels == second.labels and all(first.read(i) == second.read(i) for i in range(len(second)))


def test_shards_hold_what_was_packed(packed: Path, birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits, files = read_splits(packed), read_splits(birds)
    assert same(splits.train, files.train)
    assert same(splits.test, files.test)
    assert splits.train.classes == tuple(str(label) for label in range(16))
    assert splits.train.path(21) == str(packed / "train-0020.tar" / "birds" / "000021.jpg")
    assert "6 shards have no index" in capsys.readouterr().err
    main([str(packed), "--index"])
    assert "6 indexes written" in capsys.readouterr().out
    indexed = read_splits(packed)
    assert "index" not in capsys.readouterr().err
    assert indexed == splits
    assert np.array_equal(indexed.train.extents, splits.train.extents)  # type: ignore[attr-defined]
    assert same(pickle.loads(pickle.dumps(indexed.train)), files.train)


def test_a_stamp_changes_with_the_shard(packed: Path) -> None:
    images = read_splits(packed).train
    before = [images.stamp(i) for i in range(len(images))]
    assert len(set(before)) == len(images)
    os.utime(packed / "train-0000.tar", (1, 1))
    changed = [stamp != images.stamp(i) for i, stamp in enumerate(before)]
    assert changed == [True] * 20 + [False] * 44


def test_the_pixel_cache_holds_the_same_images(packed: Path, birds: Path) -> None:
    console = Console(quiet=True)
    tars, files = (measure(read_splits(root).train, 32, 2, console) for root in (packed, birds))
    assert (files > 0).all()
    assert np.array_equal(tars, files)


def test_bare_shards_are_one_split(packed: Path, birds: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for shard in packed.glob("train-*.tar"):
        shard.rename(bare / shard.name.removeprefix("train-"))
    splits = read_splits(bare)
    assert splits.test is None
    assert same(splits.train, read_splits(birds).train)
    (bare / "a class").mkdir()  # archives that lie beside what they were unpacked to are left alone
    (packed / "test-0000.tar").rename(bare / "a class" / "x.jpg")
    assert read_splits(bare).train.classes == ("a class",)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_views_are_those_of_the_files_from_any_step_on(packed: Path, birds: Path, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
        from fastcr.data.dali_views import DaliViews as Views
    else:
        Views = TorchViews  # type: ignore[misc, assignment]  # noqa: N806
    loading = Loading(image_size=32, batch_size=8, seed=3, device=torch.device("cpu"), dtype=torch.float32, workers=2)

    def batches(root: Path, start: int) -> Iterator[Batch]:
        images = read_splits(root).train
        views = Views(images, loading, BadFiles(images, "fail"))
        return islice(views.batches(start), 10 - start)

    for tar, file in zip(batches(packed, 6), list(batches(birds, 0))[6:], strict=True):  # into the second epoch
        assert all(torch.equal(a, b) for a, b in zip(tar, file, strict=True))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_read_at_random(packed: Path, birds: Path, context: str) -> None:
    """Handles that processes share would give one the other's place in the file."""
    images, files = read_splits(packed).train, read_splits(birds).train
    order = np.random.default_rng(0).permutation(len(images)).tolist() * 4
    images.read(0)
    loader = DataLoader(_Bytes(images), batch_size=None, sampler=order, num_workers=2, multiprocessing_context=context)  # type: ignore[arg-type]
    assert list(loader) == [files.read(index) for index in order]


class _Bytes:
    def __init__(self, images: ImageList) -> None:
        self.images = images

    def __getitem__(self, index: int) -> bytes:
        return self.images.read(index)


ODD = ("plain", "with space", "ü and \\", "tab\tand\nnewline", "deep/er/x", "long/" + "n" * 150)


def odd_shard(root: Path, birds: Path) -> Path:
    """Names of every kind; components without an image; hidden files; a second image of a sample."""
    images = read_splits(birds).train
    with tarfile.open(root / "train-0.v1.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i, key in enumerate(ODD):
            add(tar, f"./{key}.json", json.dumps({"label": f"class {i % 2}", "text": "a bird"}).encode())
            add(tar, f"./{key}.mask.png", b"no picture of the sample")
            add(tar, f"./{key}.JPG", images.read(i))
            add(tar, f"./{key}.png", b"the second image of the sample")
        add(tar, "only.json", b'{"label": "class 0"}')
        add(tar, "deep/._hidden.jpg", b"")
        add(tar, "README", b"no extension")
    return root / "train-0.v1.tar"


def test_odd_names_survive_the_index(tmp_path: Path, birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = odd_shard(tmp_path, birds)
    listed = list_samples(shard)
    write_index(shard, listed)
    assert read_index(shard) == listed
    assert index_of(shard).name == "train-0.v1.idx"
    splits, files = read_splits(tmp_path), read_splits(birds).train
    assert "samples in shards that hold no image: 1, e.g. 'train-0.v1.tar/only.json'" in capsys.readouterr().err
    assert [splits.train.read(i) for i in range(len(splits.train))] == [files.read(i) for i in range(len(ODD))]
    assert splits.train.classes == ("class 0", "class 1")
    assert splits.train.labels == (0, 1, 0, 1, 0, 1)


def test_dali_reads_the_index(tmp_path: Path, birds: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    shard = odd_shard(tmp_path, birds)
    write_index(shard, list_samples(shard))

    @dali.pipeline_def(batch_size=len(ODD), num_threads=1, device_id=None)
    def pipeline():  # type: ignore[no-untyped-def]
        return dali.fn.readers.webdataset(
            paths=[str(shard)], index_paths=[str(index_of(shard))], ext="JPG", missing_component_behavior="skip"
        )

    (read,) = pipeline().run()
    files = read_splits(birds).train
    assert [bytes(np.asarray(sample)) for sample in read] == [files.read(i) for i in range(len(ODD))]


def test_the_index_is_that_of_wds2idx(packed: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    shard = packed / "train-0000.tar"
    with wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    write_index(shard, list_samples(shard))
    assert index_of(shard).read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.parametrize("change", ["newer", "another", "shorter", "garbled", "other version", "empty"])
def test_an_old_index_is_not_used(packed: Path, birds: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    shard = packed / "train-0000.tar"
    main([str(packed), "--index"])
    index, date = index_of(shard), shard.stat().st_mtime
    text = index.read_text()
    if change == "newer":
        os.utime(index, (date - 100, date - 100))
    elif change in ("another", "shorter"):  # with its old date: the index alone does not show it
        with tarfile.open(shard, "w") as tar:
            images = read_splits(birds).train
            for i in range(20 if change == "another" else 1):
                add(tar, f"birds/{i:06d}.cls", b"0")
                add(tar, f"birds/{i:06d}.jpg", images.read(i) + b"\0" * 600)
        os.utime(shard, (date, date))
    else:
        broken = {"garbled": text[: len(text) // 2], "other version": text.replace("v1.2", "v9"), "empty": ""}
        index.write_text(broken[change])
    assert read_index(shard) is None
    capsys.readouterr()
    assert read_splits(packed).train.rgb(0).size[0] > 8
    assert "1 shards have no index, or an old one" in capsys.readouterr().err
    main([str(packed), "--index"])
    assert capsys.readouterr().out.startswith("1 indexes written")
    assert read_index(shard) == list_samples(shard)


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
        (shard("word", a_jpg=picture, a_cls=b"wren"), "'a.cls' holds no number"),
        (shard("list", a_jpg=picture, a_json=b"[1]"), "'a.json' holds no object"),
        (shard("nested", a_jpg=picture, a_json=b'{"label": [1]}'), "neither a number nor text"),
        (shard("partly", a_jpg=picture, a_cls=b"1", b_jpg=picture), "e.g. '.*/partly/train-0.tar/b.jpg', have none"),
    ):
        with pytest.raises(UsageError, match=words):
            read_splits(root)
    assert read_splits(shard("unlabelled", a_jpg=picture, a_json=b'{"caption": "wren"}')).train.labels is None
    (packed / "train-0000.tar").write_bytes((packed / "train-0000.tar").read_bytes()[:2000])
    with pytest.raises(UsageError, match=r"train-0000.tar is not a whole, uncompressed tar: unexpected end of data"):
        read_splits(packed)
    for shard_ in packed.glob("train-*.tar"):
        shard_.unlink()
    with pytest.raises(UsageError, match=r"shards like test-0000.tar but none named train"):
        read_splits(packed)


def test_a_broken_image_in_a_shard_is_named_and_replaced(tmp_path: Path, birds: Path) -> None:
    images = read_splits(birds).train
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, content in enumerate([images.read(0), images.read(1)[:300], b"", images.read(3)]):
            add(tar, f"{i}.jpg", content)
    shards = read_splits(tmp_path).train
    with pytest.raises(OSError, match=r"a.tar/1.jpg' is not a readable image"):
        shards.rgb(1)
    picture, bad = shards.rgb_or_next(1)
    assert bad == [1, 2]
    assert picture.tobytes() == images.rgb(3).tobytes()
