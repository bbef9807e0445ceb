"""Broken images, and odd folders, lists and shards of them."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from hypothesis import strategies as st
from PIL import Image

from fastcr.data.images import ImageList, Splits
from fastcr.data.layouts import read_splits
from tests.fuzz.damage import BYTES, NO_DAMAGE, ODD_WORDS, Damage, text
from tests.fuzz.properties import REFUSED, attempt, fuzzed, reading

KINDS = [
    (".jpg", "JPEG", "RGB", {}), (".jpg", "JPEG", "RGB", {"progressive": True}), (".jpg", "JPEG", "CMYK", {}),
    (".jpeg", "JPEG", "L", {"exif": True}), (".png", "PNG", "RGB", {}), (".png", "PNG", "P", {}),
    (".png", "PNG", "RGBA", {}), (".webp", "WEBP", "RGB", {}), (".gif", "GIF", "RGB", {"save_all": True}),
    (".bmp", "BMP", "P", {}), (".tif", "TIFF", "RGB", {"compression": "tiff_lzw"}), (".tif", "TIFF", "F", {}),
    (".tiff", "TIFF", "1", {"compression": "group4"}), (".ppm", "PPM", "RGB", {}), (".png", "PNG", "I;16", {}),
]  # fmt: skip


def _draw(format_: str, mode: str, options: dict[str, object]) -> bytes:
    random, file = Random(0), io.BytesIO()
    small = Image.frombytes("RGB", (7, 5), random.randbytes(105)).resize((40, 30))
    image = Image.frombytes(mode, (20, 20), random.randbytes(800)) if mode == "I;16" else small.convert(mode)
    if "exif" in options:
        exif = Image.Exif()
        exif[274], exif[270] = 6, "an image"
        options = {"exif": exif}
    if "save_all" in options:
        options = {"save_all": True, "append_images": [small, small.rotate(90), small.rotate(180)]}
    image.save(file, format_, **options)  # type: ignore[arg-type]
    return file.getvalue()


IMAGES = [(suffix, _draw(format_, mode, options)) for suffix, format_, mode, options in KINDS]
# by their number, so that hypothesis does not print them all
IMAGE = st.integers(0, len(IMAGES) - 1).map(lambda number: IMAGES[number])
WHOLE = IMAGE.map(lambda one: one[1])
BROKEN = st.builds(lambda content, damage: damage(content), WHOLE, BYTES)
TEXTS = st.sampled_from([b"", b"1 a.jpg\n2 b.jpg\n"])
ANYTHING = st.one_of(WHOLE, WHOLE, BROKEN, st.binary(max_size=300), TEXTS)
STEMS = ["a", "b", "train", "test", "-x", ".hidden", "line\nbreak", "'q'", '"', "ü鸟", "\udcff\udcfe", "sp ace",
         "x" * 200, "%s", "[b]", "a.b", "images", "cars_train", "images.txt", "train2019.json", "data", "CUB_200_2011",
         "\x1b[31m", "\\", "train-0", "test-1"]  # fmt: skip
SUFFIXES = [".jpg", ".jpg", ".JPG", ".Png", ".gif", ".webp", "", "", ".txt", ".tar"]
NAMES = st.builds(str.__add__, st.sampled_from(STEMS), st.sampled_from(SUFFIXES))


def read_every(images: ImageList) -> None:
    """Each image is RGB or an `OSError` that names it on one line."""
    for index in range(len(images)):
        try:
            assert images.rgb(index).mode == "RGB"
        except OSError as error:
            said = str(error)
        else:
            continue
        assert repr(images.path(index)) in said, f"{said} does not name the image"
        assert len(said.splitlines()) == 1, f"several lines: {said!r}"


def read_all(root: Path) -> Splits:
    splits = read_splits(root)
    for images in (splits.train, *([splits.test] if splits.test else [])):
        assert len(images) == len(images.files) > 0
        if images.labels is not None:
            assert len(images.labels) == len(images)
            assert all(0 <= label < len(images.classes) for label in images.labels)
        read_every(images)
    return splits


@fuzzed(sample=40, count=1850, image=IMAGE, damage=BYTES)
def test_image(folder: Path, image: tuple[str, bytes], damage: Damage) -> None:
    suffix, content = image
    (folder / f"a{suffix}").write_bytes(damage(content))
    reading(lambda: read_every(ImageList(folder, (f"a{suffix}",), None, ())), folder)


# --- folders ---


class Link(NamedTuple):
    target: str


PIPE = object()
ENTRY = st.one_of(
    ANYTHING, ANYTHING, ANYTHING, st.just(PIPE),
    st.sampled_from([".", "..", "PATH", "nowhere", "/dev/null", "/dev/zero", "FOLDER", "a.jpg", "a\nb.jpg"]).map(Link),
)  # fmt: skip
INNER = st.recursive(ENTRY, lambda inner: st.dictionaries(NAMES, inner, max_size=6), max_leaves=12)
TREE = st.dictionaries(NAMES, INNER, max_size=6)
CLASS = st.builds(lambda more, image: {**more, "1.jpg": image}, st.dictionaries(NAMES, ENTRY, max_size=3), ANYTHING)
SPLIT = st.dictionaries(st.sampled_from(["a", "b", "-x"]), CLASS, max_size=2)
SPLITS = st.dictionaries(st.sampled_from(["train", "test"]), SPLIT, min_size=1)


def grow(folder: str, tree: Mapping[str, Any]) -> None:
    """Make the entries of `tree` in `folder`."""
    for name, entry in tree.items():
        path = os.path.join(folder, name)
        if isinstance(entry, Link):
            os.symlink({"PATH": path, "FOLDER": folder}.get(entry.target, entry.target), path)
        elif entry is PIPE:
            os.mkfifo(path)
        elif isinstance(entry, dict):
            os.mkdir(path)
            grow(path, entry)
        else:
            with open(path, "wb") as file:
                file.write(entry)


@fuzzed(sample=40, count=1000, tree=st.one_of(TREE, SPLITS))
def test_folder_of_images(folder: Path, tree: Mapping[str, Any]) -> None:
    grow(str(folder), tree)
    reading(lambda: read_all(folder), folder)


# --- lists ---

LISTED = ["a.jpg", "ü b.png", "tab\tname.jpg", "new\nline.gif", "\udcff.jpg", "deep/c.jpg"]
LIST_WORDS = [*LISTED, "pipe.jpg", "deep", "/dev/zero", "/etc/passwd", "../x.jpg", "# c", "\t", "\ta", "a.jpg\t",
              "a.jpg\ta\tb", "\0", *ODD_WORDS]  # fmt: skip


@fuzzed(
    sample=40,
    count=800,
    images=st.tuples(*[ANYTHING] * len(LISTED)),
    lines=st.one_of(
        st.lists(st.builds(str.__add__, st.sampled_from(LISTED), st.sampled_from(["", "", "", "\tx"])), max_size=4),
        st.lists(st.sampled_from(LIST_WORDS), max_size=4),
    ),
    name=st.sampled_from(["list.txt", "train.tar", "a.jpg"]),
    damage=st.one_of(text(LIST_WORDS), NO_DAMAGE),
)
def test_list_of_images(folder: Path, images: Sequence[bytes], lines: Sequence[str], name: str, damage: Damage) -> None:
    (folder / "deep").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    grow(str(folder), dict(zip(LISTED, images, strict=True)))
    (folder / name).write_bytes(damage("\n".join(lines).encode(errors="surrogateescape")))
    reading(lambda: read_all(folder / name), folder)


# --- shards ---

MEMBERS = [
    *(f"{stem}.jpg" for stem in ["a", "a/b", "../up", "/abs", "x" * 120, "deep/" * 60 + "y", "ü鸟", "new\nline",
                                 "sp ace", "", ".hidden", "\udcff", "\\101"]),
    *(f"a{suffix}" for suffix in [".png", ".cls", ".cls", ".json", ".json", "", ".", ".tar.gz", ".a.jpg"]),
]  # fmt: skip
LABELS = [b"3", b'{"label": "wren"}', b'{"label": [1]}', b"[" * 100_000, b"nan", b"9" * 5000, b"\xff",
          b'{"label": 1e400}', b'{"label": true}', b'{"label": "\\ud800"}']  # fmt: skip
MEMBER = st.tuples(st.sampled_from(MEMBERS), st.one_of(WHOLE, ANYTHING, st.sampled_from(LABELS)))


def tar_of(images: Sequence[bytes], members: Sequence[tuple[str, bytes]], layout: int) -> bytes:
    """A shard of labelled images, and of members that are (name, content)."""
    pairs = [(f"{i:04d}{suffix}", part) for i, image in enumerate(images)
             for suffix, part in ((".jpg", image), (".cls", b"%d" % i))]  # fmt: skip
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as tar:
        for name, content in [*pairs, *members]:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            with contextlib.suppress(ValueError):  # USTAR cannot hold each name
                tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


LAYOUTS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
TAR = st.builds(tar_of, st.lists(WHOLE, max_size=3), st.lists(MEMBER, max_size=4), LAYOUTS)
SHARD = st.one_of(TAR, st.builds(lambda tar, damage: damage(tar), TAR, BYTES))
NO_SHARD = st.sampled_from([{}, PIPE, Link("PATH")])
SHARDS = [
    st.fixed_dictionaries({f"{name}.tar": st.one_of(*[SHARD] * 19, NO_SHARD) for name in names})
    for names in (["train-0"], ["train-0", "train-1", "test-0"], ["a", "b"], ["test-0"])
]


@fuzzed(sample=40, count=1000, shards=st.one_of(SHARDS), aside=st.one_of(*[st.none()] * 9, ANYTHING))
def test_folder_of_shards(folder: Path, shards: Mapping[str, Any], aside: bytes | None) -> None:
    grow(str(folder), shards)
    if aside is not None:
        (folder / "aside.jpg").write_bytes(aside)
    reading(lambda: read_all(folder), folder)


def test_a_pipe_named_like_a_shard_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train-0.tar")
    assert attempt(lambda: read_splits(tmp_path)) is REFUSED
