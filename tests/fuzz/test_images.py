"""Broken images, and odd folders, lists and shards of them."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from tests.fuzz.damage import BYTES, NO_DAMAGE, ODD_WORDS, SHARE, Damage, text
from tests.fuzz.pictures import ANYTHING, IMAGE, NAMES, WHOLE, read_all, read_every
from tests.fuzz.properties import REFUSED, attempt, contents, fuzzed, reading

NOBODY = 65534


@fuzzed(
    sample=40,
    count=1850,
    image=IMAGE,
    tail=st.one_of(st.none(), st.none(), st.none(), st.tuples(SHARE, WHOLE, st.integers(0, 60))),
    damage=BYTES,
)
def test_image(folder: Path, image: tuple[str, bytes], tail: tuple[float, bytes, int] | None, damage: Damage) -> None:
    suffix, content = image
    if tail:  # one image goes on as another
        content = content[: int(tail[0] * len(content))] + tail[1][tail[2] :]
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
MODES = st.just({}) | st.dictionaries(st.integers(0, 20), st.sampled_from([0, 0o111, 0o444]), max_size=2)


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


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """root can read everything: be nobody for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@fuzzed(sample=40, count=1000, tree=st.one_of(TREE, SPLITS), modes=MODES, nobody=st.booleans())
def test_folder_of_images(folder: Path, tree: Mapping[str, Any], modes: Mapping[int, int], nobody: bool) -> None:
    grow(str(folder), tree)
    made = sorted(path for path in contents(folder) if not os.path.islink(path))
    for number, mode in modes.items():
        if number < len(made):
            os.chmod(made[number], mode)
    before = contents(folder)
    with without_privileges() if nobody else contextlib.nullcontext():
        attempt(lambda: read_all(folder))
    assert contents(folder) == before, "files have changed"


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
KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE,
         tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, b"?"]  # fmt: skip
EXTENSIONS = ["size", "GNU.sparse.major", "GNU.sparse.map", "path", "hdrcharset", "GNU.sparse.size"]
EXTENDED = st.dictionaries(
    st.sampled_from(EXTENSIONS), st.sampled_from(["-1", "x", "9" * 40, "1", "0,5,9"]), max_size=2
)
MEMBER = st.tuples(
    st.sampled_from(MEMBERS), st.one_of(WHOLE, ANYTHING, st.sampled_from(LABELS)),
    st.sampled_from([tarfile.REGTYPE] * 30 + KINDS), st.sampled_from(["a.jpg", "/etc/passwd", "../up.jpg"]),
    st.one_of(*[st.just({})] * 4, EXTENDED),
)  # fmt: skip


def tar_of(images: Sequence[bytes], members: Sequence[tuple[Any, ...]], layout: int, mode: str) -> bytes:
    """A shard of labelled images, and of members that are (name, content, kind, target of a link, extensions)."""
    pairs = [(f"{i:04d}{suffix}", part) for i, image in enumerate(images)
             for suffix, part in ((".jpg", image), (".cls", b"%d" % i))]  # fmt: skip
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=layout) as tar:  # type: ignore[call-overload]
        for name, content, *more in [*pairs, *members]:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if more:
                entry.type, entry.linkname, entry.pax_headers = more[0], more[1], dict(more[2])
            with contextlib.suppress(ValueError):  # USTAR cannot hold each name
                tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def with_size(content: bytes, where: float, size: bytes) -> bytes:
    """A member's size as GNU tar writes large ones, under a checksum that is right."""
    start = round(where * max(len(content) // 512 - 1, 0)) * 512
    header = bytearray(content[start : start + 512])
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:start] + bytes(header) + content[start + 512 :]


LAYOUTS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
TAR = st.builds(
    tar_of, st.lists(WHOLE, max_size=3), st.lists(MEMBER, max_size=4), LAYOUTS, st.sampled_from(["w"] * 4 + ["w:gz"])
)
SIZES = st.sampled_from([b"\x80" + b"\x7f" * 11, b"\xff" * 11 + b"\0", b"\x80" + bytes(7) + b"\x7f" * 4])
SPOILT = st.builds(lambda tar, damage: damage(tar), TAR, BYTES)
SHARD = st.one_of(TAR, SPOILT, st.builds(with_size, TAR, SHARE, SIZES))
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
