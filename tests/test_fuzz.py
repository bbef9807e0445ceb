"""Broken inputs of every kind, 10,000 in all: each works or gives a clear error on one line, in time; no file is lost.

An input is a function of its kind and its number, so a failure that names them can be seen again:
`INPUTS[kind].attempt(Random(f"{kind} {number}"), an_empty_folder)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import runpy
import shutil
import signal
import stat
import tarfile
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from fastcr.config import Config, ModelConfig, RationaleConfig, ReleasedConfig, validate
from fastcr.data import archives
from fastcr.data.images import ImageList, Splits
from fastcr.data.layouts import read_splits
from fastcr.data.shards import index_of, list_samples, write_index
from fastcr.measures.embedding_files import Partial, check_unused, put_in_place
from fastcr.measures.evaluation import HISTORY, Measured, Measuring
from fastcr.measures.localisation import read_objects
from fastcr.method.backbone import build_backbone
from fastcr.method.encoder import build_branch, load, weights_facts, weights_of
from fastcr.presets import PRESETS
from fastcr.report import ReportConfig, write_report
from fastcr.runs.checkpoint import load_resume, load_weights, random_states, read_state_dict, save_resume, save_weights
from fastcr.runs.command_line import load_config, one_line_errors, read_command_line, save_config
from fastcr.runs.log import keep_records

SECONDS = 10.0  # that an input may take: far more than any needs, for the machine may be busy
NOBODY = 65534


class TooLongError(BaseException):
    """No `except Exception` of the code under test may catch it."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"not done within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


REFUSED = object()


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` gives, run as the commands do; REFUSED if it ends with status 2 and one line that says why."""
    out, error = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), time_limit():
        warnings.simplefilter("ignore")  # PIL's, of odd metadata
        try:
            with one_line_errors("fuzz"):
                return work()
        except SystemExit as stop:
            status = stop.code
    error.flush()
    said = error.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
    assert status == 2, f"exit status {status}"
    asides = [line for line in said if line.startswith("fastcr: ")]  # such as shards without an index
    assert len(said) == len(asides) + 1, f"{len(said)} lines: {said}"
    assert said[-1].startswith("fuzz: error: ")
    assert 20 < len(said[-1]) < 20_000
    return REFUSED


def contents(folder: Path) -> dict[str, object]:
    """Every entry below `folder`: the bytes of files, the target of links."""
    found: dict[str, object] = {}
    for base, folders, files in os.walk(folder):
        for path in (os.path.join(base, name) for name in folders + files):
            mode = os.lstat(path).st_mode
            found[path] = mode
            if stat.S_ISREG(mode):
                with open(path, "rb") as file:
                    found[path] = file.read()
            elif stat.S_ISLNK(mode):
                found[path] = os.readlink(path)
    return found


def reading(work: Callable[[], Any], folder: Path) -> Any:
    """`attempt`, and nothing in `folder` may change."""
    before = contents(folder)
    result = attempt(work)
    assert contents(folder) == before, "files have changed"
    return result


# --- damage ---


def damaged(random: Random, content: bytes) -> bytes:
    """A few bits flipped, or bytes set, zeroed, left out, doubled, moved, added; or the end cut off."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 5, 20])):
        at = random.randrange(len(data) + 1)
        if random.random() < 0.3:
            at = min(at, random.choice([8, 64, 512]))  # headers come first
        size = min(random.choice([1, 2, 4, 16, 300]), max(len(data) - at, 0))
        kind = random.randrange(9)
        if kind < 3 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 3:
            data[at : at + size] = random.randbytes(size)
        elif kind == 4:
            data[at : at + size] = bytes(size)
        elif kind == 5:
            data[at : at + 4] = random.choice([b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\0\0\0\x80", b"\xff" * 8])
        elif kind == 6:
            del data[at : at + size]
        elif kind == 7:
            start = random.randrange(len(data) + 1)
            data[at:at] = data[start : start + size] or random.randbytes(size)
        elif random.random() < 0.5:
            del data[at:]
        else:
            data += random.randbytes(size) or b"\n"
    return bytes(data)


ODD_NUMBERS = ["nan", "inf", "-inf", "-1", "0", "1e400", "9" * 30, "9" * 5000, "1_0", "0x1f", "1e-320", "-0.0", "2.5",
               str(2**63), str(10**9), str(-(2**63) - 1), "١٢"]  # fmt: skip
ODD_WORDS = ["", " ", "None", "null", "True", "[]", "{}", "--", "-", "~", "a\tb", "ä鸟\u202e", "%s {0}", "'\"", "\\",
             "../..",
             "/dev/null", "x" * 5000, "a\nb", "[bold]x[/]", "\x1b[31m", "\u2028", "\udc80", "\r"]  # fmt: skip
ODD_YAML = ["!!python/object/apply:os.system ['true']", "&a [*a]", "*nobody", "{" * 500, "[" * 500, "- - -",
            "2020-13-45",
            "!!int x", "!!float x", "0b", "!!binary x", "!!set {a}", "1:99:99", "? x", "<<: 3", "|\n    x\n    y",
            "@", '"\\0"',
            '"\\uD800"', "{run: {dir: x}}", "2020-01-01", "0o9", "!!timestamp x", "=", "!!omap [1]"]  # fmt: skip
LAUGHS = "run:\n  a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(  # each key holds nine times the one before
    f"  {new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcde", "bcdef", strict=True)
)


def damaged_text(random: Random, content: bytes, words: Sequence[str]) -> bytes:
    """Lines doubled, left out or moved, words replaced by odd ones; or damage to the bytes."""
    if random.random() < 0.25:
        return damaged(random, content)
    lines = content.decode(errors="surrogateescape").split("\n")
    for _ in range(random.choice([1, 1, 2, 4])):
        at, word = random.randrange(len(lines)), random.choice(words)
        kind = random.randrange(6)
        if kind == 0:
            lines.insert(random.randrange(len(lines) + 1), lines[at])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines.insert(at, word)
        else:
            parts = lines[at].split(" ")
            parts[random.randrange(len(parts))] = word
            lines[at] = " ".join(parts)
    return "\n".join(lines).encode(errors="surrogateescape" if random.random() < 0.9 else "backslashreplace")


ODD_VALUES: list[Any] = [None, True, -1, 0, 2.5, 1e308, float("nan"), float("inf"), 10**30, 2**63, -(2**40), 10**9,
                         "", "5", "ä",
                         "\udc80", "\ud800", "a\nb", "/etc/passwd", "../x", "a\0b", "x" * 3000, [], {}, [[]], [1, 2],
                         {"rank1": 3},
                         {"mean": {"rank1": None}}, {"a": []}, "DEEP"]  # fmt: skip


def damaged_json(random: Random, content: bytes) -> bytes:
    """Values replaced by odd ones, keys left out or renamed; or damage to the text."""
    if random.random() < 0.3:
        return damaged(random, content)
    tree = json.loads(content)
    for _ in range(random.choice([1, 1, 2, 4])):
        holder = place = None
        inner: Any = tree
        while isinstance(inner, (dict, list)) and inner and (holder is None or random.random() < 0.8):
            holder, place = inner, random.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = inner[place]
        if holder is None or random.random() < 0.03:
            tree = random.choice(ODD_VALUES)
        elif random.random() < 0.7:
            holder[place] = random.choice(ODD_VALUES)
        elif isinstance(holder, dict) and random.random() < 0.5:
            holder[random.choice(["x", "", "a\n", "\udc80", *map(str, range(3))])] = holder.pop(place)
        else:
            del holder[place]
    deep = random.choice(['{"a":', "["]) * 100_000
    return json.dumps(tree).replace('"DEEP"', deep).encode()


# --- command lines and config.yaml ---

FLAGS = [
    f"--{section.name}.{each.name}"
    for section in dataclasses.fields(Config)
    if section.name != "preset"
    for each in dataclasses.fields(section.default_factory())  # type: ignore[misc,operator,arg-type]
]
# argv holds neither NUL nor, where the terminal is UTF-8, half characters other than those of file names
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
SOUND = ["2", "64", "0.5", "auto", "True", "False", "cpu", "resnet18", "none", "off", "layer3", "timm:resnet10t"]
VALUE = st.one_of(
    st.sampled_from([*ODD_NUMBERS, *ODD_WORDS, *SOUND, "HERE", "HERE/file", "HERE/run", "HERE/missing"]),
    st.integers().map(str), st.floats().map(str), TEXT,
)  # fmt: skip
FLAG = st.one_of(
    st.sampled_from(FLAGS), TEXT.map("--".__add__), st.sampled_from(["--run", "--preset", "-h", "--data.rot"])
)
RESUME = st.tuples(st.just("--resume"), st.one_of(VALUE, st.sampled_from(["auto", "HERE/run"])))
PIECE = st.one_of(
    st.tuples(FLAG, VALUE), st.tuples(st.sampled_from(FLAGS), VALUE), st.tuples(FLAG,
    VALUE).map(lambda both: ("=".join(both),)),
    st.tuples(FLAG), st.tuples(VALUE), RESUME, RESUME.map(lambda both: ("=".join(both),)), st.just(("--resume",)),
)  # fmt: skip
FIRST = st.one_of(st.just(()), st.sampled_from(list(PRESETS)).map(lambda name: (name,)), st.tuples(VALUE))
COMMAND = st.tuples(FIRST, st.lists(PIECE, max_size=4)).map(
    lambda parts: [*parts[0], *(arg for piece in parts[1] for arg in piece)]
)


def kept(config: Config, folder: Path) -> bool:
    """Whether `config` is the same after a resume has read it back."""
    file = folder / "kept" / "config.yaml"
    file.parent.mkdir(exist_ok=True)
    save_config(config, file)
    return load_config(file) == config


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    (folder / "file").write_text("no run")
    (folder / "run").mkdir()
    save_config(PRESETS["synthetic"](), folder / "run" / "config.yaml")
    return folder


def given_commands(count: int) -> Callable[[Any], Any]:
    how = settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    return lambda test: how(given(command=COMMAND)(test))


def command_line(here: Path, command: list[str]) -> None:
    args = [arg.replace("HERE", str(here)) for arg in command]

    def work() -> Config:
        try:
            return read_command_line(args)[0]
        except SystemExit as stop:
            if stop.code == 0 and {"-h", "--help"} & set(args):
                return Config()
            raise

    config = attempt(work)
    if config is not REFUSED:
        assert validate(config) == config
        assert kept(config, here), "config.yaml does not bring it back"


@pytest.mark.slow
@given_commands(50)
def test_sample_of_command_lines(here: Path, command: list[str]) -> None:
    command_line(here, command)


@pytest.mark.slow
@given_commands(1500)
def test_command_lines(here: Path, command: list[str]) -> None:
    command_line(here, command)


def config_file(random: Random, folder: Path) -> None:
    file = folder / "config.yaml"
    save_config(PRESETS[random.choice(list(PRESETS))](), file)
    text = file.read_bytes()
    if random.random() < 0.03:
        text = random.choice([LAUGHS.encode(), b"run: " + text, yaml.dump(random.choice(ODD_VALUES)).encode()])
    else:
        text = damaged_text(random, text, [*ODD_YAML, *ODD_YAML, *ODD_NUMBERS, *ODD_WORDS])
    file.write_bytes(text)
    config = reading(lambda: load_config(file), folder)
    if config is not REFUSED:
        assert isinstance(config.preset, str), "the preset is no name"
        if attempt(lambda: validate(config)) is not REFUSED:
            assert kept(config, folder), "config.yaml does not bring it back"


# --- images ---


@cache
def pictures() -> tuple[tuple[str, bytes], ...]:
    """Small sound images: suffix and bytes."""
    random = Random(0)
    small = Image.frombytes("RGB", (7, 5), random.randbytes(105)).resize((40, 30))
    deep = Image.frombytes("I;16", (20, 20), random.randbytes(800))
    frames = [small, small.rotate(90), small.rotate(180)]
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a picture"
    found = []
    for suffix, format_, mode, options in (
        ("jpg", "JPEG", "RGB", {}), ("jpg", "JPEG", "RGB", {"progressive": True}), ("jpg", "JPEG", "CMYK", {}),
        ("jpeg", "JPEG", "L", {"exif": exif}), ("png", "PNG", "RGB", {}), ("png", "PNG", "P", {}), ("png", "PNG",
        "RGBA", {}),
        ("png", "PNG", "1", {}), ("webp", "WEBP", "RGB", {}), ("webp", "WEBP", "RGBA", {"lossless": True}),
        ("webp", "WEBP", "RGB", {"save_all": True, "append_images": frames}), ("gif", "GIF", "P", {}),
        ("gif", "GIF", "RGB", {"save_all": True, "append_images": frames}), ("bmp", "BMP", "RGB", {}), ("bmp", "BMP",
        "P", {}),
        ("tif", "TIFF", "RGB", {}), ("tif", "TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("tif", "TIFF", "RGB", {"compression": "tiff_deflate"}), ("tiff", "TIFF", "RGB", {"compression": "jpeg"}),
        ("tif", "TIFF", "F", {}), ("tiff", "TIFF", "1", {"compression": "group4"}), ("ppm", "PPM", "RGB", {}),
    ):  # fmt: skip
        file = io.BytesIO()
        small.convert(mode).save(file, format_, **options)
        found.append((f".{suffix}", file.getvalue()))
    for suffix, format_ in ((".png", "PNG"), (".tif", "TIFF")):
        file = io.BytesIO()
        deep.save(file, format_)
        found.append((suffix, file.getvalue()))
    return tuple(found)


def what_is_wrong(images: ImageList, index: int) -> str | None:
    try:
        assert images.rgb(index).mode == "RGB"
    except OSError as error:
        return str(error)
    return None


def read_every(images: ImageList) -> None:
    """Each image is RGB or an `OSError` that names it on one line."""
    for index in range(len(images)):
        said = what_is_wrong(images, index)
        if said is not None:
            assert repr(images.path(index)) in said, f"{said} does not name the image"
            assert len(said.splitlines()) == 1, f"several lines: {said!r}"


def image(random: Random, folder: Path) -> None:
    suffix, content = random.choice(pictures())
    if random.random() < 0.1:
        content = content[: random.randrange(len(content))] + random.choice(pictures())[1][random.randrange(60) :]
    (folder / f"a{suffix}").write_bytes(damaged(random, content))
    reading(lambda: read_every(ImageList(folder, (f"a{suffix}",), None, ())), folder)


# --- folders, lists, shards ---

STEMS = ["a", "b", "train", "test", "-x", ".hidden", "line\nbreak", "'q'", '"', "ü鸟", "\udcff\udcfe", "sp ace",
         "x" * 200, "%s", "[b]",
         "a.b", "images", "cars_train", "images.txt", "train2019.json", "data", "CUB_200_2011", "\x1b[31m", "\\",
         "train-0",
         "test-1"]  # fmt: skip
SUFFIXES = [".jpg", ".jpg", ".JPG", ".Png", ".gif", ".webp", "", "", ".txt", ".tar", ".idx"]


def odd_content(random: Random) -> bytes:
    _, content = random.choice(pictures())
    return random.choice(
        [content, content, damaged(random, content), b"", random.randbytes(300), b"1 a.jpg\n2 b.jpg\n"]
    )


def grow(random: Random, folder: Path, deep: int) -> None:
    """Random entries in `folder`, down to `deep` levels."""
    for _ in range(random.choice([0, 1, 3, 6])):
        path = os.path.join(folder, random.choice(STEMS) + random.choice(SUFFIXES))
        if os.path.lexists(path):
            continue
        kind = random.randrange(14)
        if kind == 0:
            target = random.choice(
                [".", "..", path, "nowhere", "/dev/null", "/dev/zero", os.fspath(folder), "a.jpg", "a\nb.jpg"]
            )
            os.symlink(target, path)
        elif kind == 1:
            os.mkfifo(path)
        elif kind < 6 and deep:
            os.mkdir(path)
            grow(random, Path(path), deep - 1)
        else:
            with open(path, "wb") as file:
                file.write(odd_content(random))
        if kind and random.random() < 0.03:
            os.chmod(path, random.choice([0, 0o111, 0o444]))


def read_all(root: Path) -> Splits:
    splits = read_splits(root)
    for images in (splits.train, *([splits.test] if splits.test else [])):
        assert len(images) == len(images.files) > 0
        if images.labels is not None:
            assert len(images.labels) == len(images)
            assert all(0 <= label < len(images.classes) for label in images.labels)
        read_every(images)
    return splits


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


def folder_of_images(random: Random, folder: Path) -> None:
    # pytest's own folders are closed to others
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    try:
        if random.random() < 0.4:
            for split in random.choice([("train",), ("train", "test"), ("test",)]):
                for name in random.choice([("a", "b"), ("a", "-x"), ()]):
                    (root / split / name).mkdir(parents=True)
                    (root / split / name / "1.jpg").write_bytes(odd_content(random))
                    grow(random, root / split / name, 1)
        else:
            grow(random, root, 3)
        before, unreadable = contents(root), random.random() < 0.5
        with without_privileges() if unreadable else contextlib.nullcontext():
            attempt(lambda: read_all(root))
        assert contents(root) == before, "files have changed"
    finally:
        for base, folders, _ in os.walk(root):
            for name in folders:
                if not os.path.islink(os.path.join(base, name)):
                    os.chmod(os.path.join(base, name), 0o755)
        shutil.rmtree(root)


def list_of_images(random: Random, folder: Path) -> None:
    names = ["a.jpg", "ü b.png", "tab\tname.jpg", "new\nline.gif", "\udcff.jpg", "deep/c.jpg"]
    (folder / "deep").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    for name in names:
        with open(folder / name, "wb") as file:
            file.write(odd_content(random))
    words = [*names, "pipe.jpg", "deep", "/dev/zero", "/etc/passwd", "../x.jpg", "# c", "\t", "\ta", "a.jpg\t",
             "a.jpg\ta\tb", "\0",
             *ODD_WORDS]  # fmt: skip
    lines = [name + random.choice(["", "", "", "\tx"]) for name in random.choices(names, k=3)]
    text = "\n".join(random.choice([lines, random.choices(words, k=random.randrange(5))]))
    file = folder / random.choice(["list.txt", "train.tar", "a.jpg"])
    file.write_bytes(damaged_text(random, text.encode(errors="surrogateescape"), words))
    reading(lambda: read_all(file), folder)


def hostile_member(random: Random) -> tuple[tarfile.TarInfo, bytes]:
    stems = ["a", "a/b", "../up", "/abs", "x" * 120, "deep/" * 60 + "y", "ü鸟", "new\nline", "sp ace", "", ".hidden",
             "\udcff",
             "\\101"]  # fmt: skip
    suffixes = [".jpg", ".jpg", ".png", ".cls", ".json", "", ".", ".tar.gz", ".a.jpg"]
    entry = tarfile.TarInfo(random.choice(stems) + random.choice(suffixes))
    content = random.choice(
        [random.choice(pictures())[1], odd_content(random), b"3", b'{"label": "wren"}', b'{"label": [1]}',
         b"[" * 100_000, b"nan",
         b"9" * 5000, b"\xff", b'{"label": 1e400}', b'{"label": true}', b'{"label": "\\ud800"}']
    )  # fmt: skip
    if random.random() < 0.2:
        entry.type = random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
                                    tarfile.CHRTYPE,
                                    tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, b"?"])  # fmt: skip
        entry.linkname = random.choice(["a.jpg", "/etc/passwd", "../up.jpg"])
    entry.size = len(content)
    if random.random() < 0.1:
        entry.pax_headers = {random.choice(["size", "GNU.sparse.major", "GNU.sparse.map", "path", "hdrcharset",
                             "GNU.sparse.size"]):
                             random.choice(["-1", "x", "9" * 40, "1", "0,5,9"])}  # fmt: skip
    return entry, content


def shard(random: Random, file: Path) -> None:
    tar_bytes = io.BytesIO()
    layout = random.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=tar_bytes, mode=random.choice(["w", "w", "w", "w", "w:gz"]), format=layout) as tar:
        for number in range(random.choice([0, 1, 3])):
            for suffix, content in ((".jpg", random.choice(pictures())[1]), (".cls", b"%d" % number)):
                entry = tarfile.TarInfo(f"{number:04d}{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        for _ in range(random.choice([0, 0, 1, 4])):
            entry, content = hostile_member(random)
            with contextlib.suppress(ValueError):  # USTAR cannot hold each name
                tar.addfile(entry, io.BytesIO(content))
    content = tar_bytes.getvalue()
    if random.random() < 0.5:
        content = content[: random.randrange(len(content) + 1)] if random.random() < 0.3 else damaged(random, content)
    if random.random() < 0.1 and len(content) > 512:  # a size as GNU tar writes large ones, under a sum that is right
        start = 512 * random.randrange(len(content) // 512)
        header = bytearray(content[start : start + 512])
        header[124:136] = random.choice(
            [b"\x80" + b"\x7f" * 11, b"\xff" * 11 + b"\0", b"\x80" + bytes(7) + b"\x7f" * 4]
        )
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content = content[:start] + bytes(header) + content[start + 512 :]
    file.write_bytes(content)


def folder_of_shards(random: Random, folder: Path) -> None:
    for name in random.choice([("train-0",), ("train-0", "train-1", "test-0"), ("a", "b"), ("test-0",)]):
        file = folder / f"{name}.tar"
        shard(random, file)
        if random.random() < 0.05:
            file.unlink()
            random.choice([lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to(path)])(file)  # type: ignore[operator]
        elif random.random() < 0.5:
            with contextlib.suppress(Exception):
                write_index(file, list_samples(file))
                rows = ["v1.2 1", "jpg 512 99999999999999999999 a.jpg", "jpg -1 5 a.jpg", "", "jpg 512 -5 a.jpg",
                        "v1.2 0",
                        "jpg 999999999 5 a.jpg", "jpg 0 5 a.jpg cls 512 9 a.cls", *ODD_NUMBERS]  # fmt: skip
                if random.random() < 0.8:
                    index_of(file).write_bytes(damaged_text(random, index_of(file).read_bytes(), rows))
    if random.random() < 0.1:
        (folder / "aside.jpg").write_bytes(odd_content(random))
    reading(lambda: read_all(folder), folder)


# --- the original archives and the objects' boxes ---


@cache
def archive(name: str) -> Path:
    """One archive of that kind, sound; to be copied."""
    root = Path(tempfile.mkdtemp())
    runpy.run_path(str(Path(__file__).with_name("data") / "test_archives.py"))["ARCHIVES"][name][0](root)
    if name == "cub":
        (root / "parts").mkdir()
        (root / "bounding_boxes.txt").write_text("".join(f"{i} 1.0 2.0 5.0 5.0\n" for i in range(1, 5)))
        (root / "parts/part_locs.txt").write_text(
            "".join(f"{i} {k} {k}.0 3.5 1\n" for i in range(1, 5) for k in (1, 2))
        )
        rows = [f"{file},0.1,0.2,0.8,0.9\n" for file in ("001.Wren/a.jpg", "002.Robin/c.jpg", "test/001.Wren/b.jpg")]
        (root / "boxes.csv").write_text("path,left,top,right,bottom\n" + "".join(rows))
    return root


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    """Remove what is kept for the whole module."""
    made, plain = list[str](), tempfile.mkdtemp

    def noted(*args: Any, **kwargs: Any) -> str:
        made.append(plain(*args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", noted)
        yield
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)
    for kept_here in (archive, weights_file, checkpoints, run_folder, partial_folder):
        kept_here.cache_clear()


def archive_tables(random: Random, folder: Path) -> None:
    name = random.choice(["cub", "cub", "cars", "cars in one folder", "aircraft", "inat"])
    root = folder / "archive"
    shutil.copytree(archive(name), root)
    tables = [path for path in sorted(root.rglob("*")) if path.suffix in (".txt", ".mat", ".json", ".csv")]
    for table in random.sample(tables, min(len(tables), random.choice([1, 1, 2]))):
        content = table.read_bytes()
        if random.random() < 0.08:
            table.unlink()
            random.choice([lambda path: path.mkdir(), lambda path: path.symlink_to(path), lambda path: None])(table)  # type: ignore[operator]
        elif table.suffix == ".json":
            table.write_bytes(damaged_json(random, content))
        elif table.suffix == ".mat":
            table.write_bytes(damaged(random, content))
        else:
            rows = ["1 2 3 4 5 6", "1", "1 1 nan nan 1", "1 -5 1 1 1", "inf inf inf inf inf"]
            words = [*ODD_NUMBERS, *ODD_WORDS, *rows]
            table.write_bytes(damaged_text(random, content, words))

    def work() -> None:
        splits = read_all(root)
        images = splits.test or splits.train
        for source in (None, root / "boxes.csv") if name == "cub" else (None,):
            objects = read_objects(source, images)
            if objects is not None:
                assert objects.boxes.shape == (len(images), 4)

    reading(work, folder)
    if name == "cub":  # whatever became of its images
        reading(lambda: read_objects(root, ImageList(root / "images", ("001.Wren/a.jpg",), (0,), ("a", "b"))), folder)
        reading(
            lambda: read_objects(root / "boxes.csv", ImageList(root / "images", ("001.Wren/a.jpg",), (0,), ("a",))),
            folder,
        )


# --- checkpoints ---


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and list(first) == list(second)
            and all(same(first[key], second[key]) for key in first)
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


FACTS = {"backbone": "resnet18", "detectors": 4, "mean": [0.5, 0.25, 0.125], "temperature": 0.4}


@cache
def checkpoints() -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """Folder with small checkpoints, and what the first two hold."""
    folder, generator = Path(tempfile.mkdtemp()), torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(8, 4, generator=generator),
        "b.num": torch.tensor(7),
        "c": torch.randn(40, generator=generator),
    }
    content = {"step": 5, "model": state, "optimizer": {"state": {0: {"momentum_buffer": state["a"] * 2}},
               "param_groups": []},
               "scaler": {}, "random": random_states(), "images": 123456}  # fmt: skip
    save_resume(folder / "resume.pt", content)
    save_weights(folder / "weights.safetensors", state, FACTS)
    torch.save(
        {"state_dict": {f"module.{key}": value.half() for key, value in state.items()}, "epoch": 3}, folder / "a.pth"
    )
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({"backbone.a": torch.ones(3)}, folder / "foreign.safetensors")
    torch.save(
        {"conv16.weight": torch.ones(4, 2, 1, 1), "encoder_q.conv1.weight": torch.ones(2)}, folder / "released.pth"
    )
    return folder, content, state


def damaged_zip(random: Random, content: bytes) -> bytes:
    """Half of the damage goes into the tensors, which are most of a real file."""
    if random.random() < 0.5:
        return damaged(random, content)
    at = random.randrange(len(content) // 8, len(content) - len(content) // 8)
    return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]


def resume_file(random: Random, folder: Path) -> None:
    source, content, _ = checkpoints()
    (folder / "resume.pt").write_bytes(damaged_zip(random, (source / "resume.pt").read_bytes()))
    loaded = reading(lambda: load_resume(folder / "resume.pt"), folder)
    assert loaded is REFUSED or same(content, loaded[0]), "accepted, but not what was saved"


def damaged_safetensors(random: Random, content: bytes) -> bytes:
    if random.random() < 0.7:
        return damaged_zip(random, content)
    size = int.from_bytes(content[:8], "little")
    header = damaged_json(random, content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def weights(random: Random, folder: Path) -> None:
    source, _, state = checkpoints()
    file = folder / "weights.safetensors"
    file.write_bytes(damaged_safetensors(random, (source / file.name).read_bytes()))
    loaded = reading(lambda: load_weights(file), folder)
    if loaded is not REFUSED and b"crc32" in file.read_bytes():  # it still says that it is one of ours
        found, facts = loaded
        assert found.keys() == state.keys(), "accepted with other keys"
        assert all(same(state[key], found[key]) for key in state), "accepted, but the weights are not what was saved"
        assert facts == FACTS, f"accepted, but the facts are not what was saved: {facts}"


def foreign_weights(random: Random, folder: Path) -> None:
    file = folder / random.choice(["a.pth", "a.pth", "old.pth", "foreign.safetensors", "released.pth"])
    content = (checkpoints()[0] / file.name).read_bytes()
    file.write_bytes((damaged_safetensors if file.suffix == ".safetensors" else damaged_zip)(random, content))
    state = reading(lambda: read_state_dict(file), folder)
    if state is not REFUSED:
        assert all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())


@cache
def weights_file() -> bytes:
    """Of an encoder, whole."""
    file = Path(tempfile.mkdtemp()) / "weights.safetensors"
    model, rationale, released = (
        ModelConfig(backbone="resnet18", last_stage="layer3"),
        RationaleConfig(detectors=4),
        ReleasedConfig(),
    )
    backbone, channels = build_backbone(model.backbone, model.last_stage)
    branch = build_branch(channels, rationale, released)
    save_weights(file, weights_of(backbone, branch), weights_facts(model, rationale, released, 32))
    return file.read_bytes()


def encoder(random: Random, folder: Path) -> None:
    """Damage to the header, to the facts in it, or to files that are quickly refused."""
    file, kind = folder / "weights.safetensors", random.random()
    if kind < 0.3:
        file = folder / random.choice(["released.pth", "foreign.safetensors", "weights.safetensors", "a.pth"])
        file.write_bytes(damaged_zip(random, (checkpoints()[0] / file.name).read_bytes()))
    else:
        content = weights_file()
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size]
        if kind < 0.5:
            header = damaged_json(random, header)
        else:
            described = json.loads(header)
            facts = json.loads(described["__metadata__"]["fastcr"])
            facts.pop("crc32", None)  # which would notice
            changed = damaged_json(random, json.dumps(facts).encode())
            described["__metadata__"]["fastcr"] = changed.decode(errors="replace")
            header = json.dumps(described).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])

    def work() -> None:
        loaded = load(file if random.random() < 0.5 else folder)
        picture = loaded.transform(Image.new("RGB", (50, 40)))
        assert picture.shape == (3, loaded.image_size, loaded.image_size)
        assert loaded(picture[None]).embedding.shape[0] == 1

    reading(work, folder)


# --- what a run leaves: results, metrics, evaluations, half-written embeddings ---


@cache
def run_folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    save_config(dataclasses.replace(PRESETS["synthetic"](), preset="synthetic"), folder / "config.yaml")
    scores = {"retrieval": {name: {"rank1": 31.25, "rank5": 50.0, "mAP": 22.5} for name in ("mean", "rationale")},
              "knn": {"mean": {"top1": 20.0}, "rationale": {"top1": 25.0}}, "few_label": {"mean": {"1": 3.0,
              "10": 7.5}},
              "localisation": {"attention": {"inside": 50.0, "pointing": 60.0}}}  # fmt: skip
    results = {"folder": "/data/birds/test", "images": 32, "unreadable": 0, "skipped": 1, "classes": 16, **scores,
               "frozen_init": scores,
               "best_epoch": {"epoch": 1, "folder": "/data/birds/test", "retrieval": scores["retrieval"]}}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    metrics = [{"step": step, "epoch": step / 4, "loss": 3.0, "contrast_loss": 2.5, "fit_loss": 0.1, "lr": 0.03,
                "data_wait": 0.1,
                "images_per_second": 70.5, "attention_entropy": 3.1, "effective_detectors": 4.0} for step in (4, 8,
                12)]  # fmt: skip
    history = [{"epoch": epoch, "folder": "/data/birds/test", "retrieval": scores["retrieval"]} for epoch in (1, 2)]
    for name, records in (("metrics.jsonl", metrics), (HISTORY, history)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def damaged_records(random: Random, content: bytes) -> bytes:
    if random.random() < 0.3:
        return damaged_text(random, content, [*ODD_NUMBERS, *ODD_WORDS])
    lines = content.splitlines()
    at = random.randrange(len(lines))
    lines[at] = damaged_json(random, lines[at])
    return b"\n".join(lines) + b"\n"


def report_of_run(random: Random, folder: Path) -> None:
    runs = [folder / "run"] if random.random() < 0.7 else [folder / "run", folder / "other"]
    for run in runs:
        shutil.copytree(run_folder(), run)
    for name, damage in (("results.json", damaged_json), ("metrics.jsonl", damaged_records)):
        if random.random() < 0.6:
            file = runs[0] / name
            file.write_bytes(damage(random, file.read_bytes()))
    out, before = folder / "page.html", contents(folder)
    settings_ = ReportConfig(tuple(runs), out=out, gallery=0, queries=0)
    written = attempt(lambda: write_report(settings_, Console(file=io.StringIO())))
    after = contents(folder)
    if written is not REFUSED:
        assert str(after.pop(str(out)).decode()).endswith("</html>\n")  # type: ignore[attr-defined]
    assert after == before, "files have changed"


def history_of_run(random: Random, folder: Path) -> None:
    """What a later evaluation, and a resume, make of the records that are there."""
    shutil.copytree(run_folder(), folder, dirs_exist_ok=True)
    for name in (HISTORY, "metrics.jsonl"):
        (folder / name).write_bytes(damaged_records(random, (folder / name).read_bytes()))
    measuring = Measuring(Splits(IMAGES, None), IMAGES, torch.device("cpu"), 0, Console(file=io.StringIO()))
    with pytest.MonkeyPatch.context() as patch:
        scores = {"retrieval": {"mean": {"rank1": 1.0}}}
        patch.setattr(Measuring, "weights", lambda *args: Measured(scores, 0, []))  # type: ignore[arg-type]
        reading(lambda: measuring.results(folder / "weights.safetensors", None), folder)
    for name, key, last in ((HISTORY, "epoch", 1.5), ("metrics.jsonl", "step", 8)):
        file, before = folder / name, contents(folder)
        result, after = attempt(lambda file=file, key=key, last=last: keep_records(file, key, last)), contents(folder)
        if result is not REFUSED:
            before.pop(str(file))
            for line in after.pop(str(file)).decode().splitlines():  # type: ignore[attr-defined]
                assert json.loads(line)[key] <= last
        assert after == before, "files have changed"


IMAGES = ImageList(Path("/data/birds/test"), ("a.jpg",), (0,), ("a", "b"))
KEY = {"weights": "ab", "images": "cd", "settings": "ef"}


def add_rows(partial: Partial, batch: int) -> None:
    values = torch.arange(12.0).view(3, 4) + 100 * batch
    arrays = {"mean": values, "attention": values.view(3, 2, 2).half()}
    partial.add(arrays, [(f"{batch} {i}.jpg", "", "x", 5, 6) for i in range(3)], 1)


@cache
def partial_folder() -> tuple[Path, bytes, bytes]:
    """A folder that a job left after two batches, and the files it comes to after a third."""
    folder = Path(tempfile.mkdtemp())
    partial = Partial(folder / "out" / "partial", KEY)
    for batch in range(2):
        add_rows(partial, batch)
    partial.commit()
    shutil.copytree(folder / "out", folder / "left")
    add_rows(partial, 2)
    partial.commit()
    put_in_place(partial, folder / "out", "safetensors", {"a": 1})
    return (
        folder / "left",
        (folder / "out" / "embeddings.safetensors").read_bytes(),
        (folder / "out" / "images.csv").read_bytes(),
    )


def half_written_embeddings(random: Random, folder: Path) -> None:
    """Lengths may be anything; of what is in the rows nothing is known but their number."""
    left, embeddings, table = partial_folder()
    shutil.copytree(left, folder / "out")
    file = folder / "out" / "partial" / "state.json"
    if random.random() < 0.75:
        file.write_bytes(damaged_json(random, file.read_bytes()))
    else:
        file = random.choice(sorted(file.parent.iterdir()))
        content = file.read_bytes()
        if random.random() < 0.3:
            file.unlink()
            random.choice([lambda path: path.mkdir(), lambda path: None])(file)  # type: ignore[operator]
        else:
            short = content[: random.randrange(len(content) + 1)]
            file.write_bytes(short if random.random() < 0.5 else content + random.randbytes(99))
    before = contents(folder)

    def work() -> None:
        check_unused(folder / "out")
        with contextlib.closing(Partial(folder / "out" / "partial", KEY)._handles):  # as the end of the process does
            pass

    if attempt(work) is REFUSED:
        lock = str(folder / "out" / "partial" / "lock")
        after = contents(folder)
        assert after | {lock: before.get(lock)} == before | {lock: before.get(lock)}, "files have changed"
        return
    partial = Partial(folder / "out" / "partial", KEY)
    while partial.state.batches < 3:
        add_rows(partial, partial.state.batches)
    partial.commit()
    put_in_place(partial, folder / "out", "safetensors", {"a": 1})
    partial.remove()
    assert {path.name for path in (folder / "out").iterdir()} == {"embeddings.safetensors", "images.csv"}
    out = folder / "out"
    assert (out / "embeddings.safetensors").read_bytes() == embeddings, "other embeddings came of it"
    assert (folder / "out" / "images.csv").read_bytes() == table, "another table came of it"


class Inputs(NamedTuple):
    """A kind of input."""

    attempt: Callable[[Random, Path], None]
    sample: int
    count: int  # in all, the sample among them


INPUTS = {
    "config.yaml": Inputs(config_file, 40, 1000),
    "folder of images": Inputs(folder_of_images, 40, 1000),
    "list of images": Inputs(list_of_images, 40, 800),
    "folder of shards": Inputs(folder_of_shards, 40, 1000),
    "archive's tables": Inputs(archive_tables, 20, 800),
    "image": Inputs(image, 100, 1850),
    "resume.pt": Inputs(resume_file, 30, 400),
    "weights.safetensors": Inputs(weights, 30, 400),
    "foreign weights": Inputs(foreign_weights, 30, 400),
    "encoder": Inputs(encoder, 5, 100),
    "report": Inputs(report_of_run, 10, 300),
    "history": Inputs(history_of_run, 30, 200),
    "half-written embeddings": Inputs(half_written_embeddings, 30, 200),
}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", ["sample", "rest"])
@pytest.mark.parametrize("kind", INPUTS)
def test_fuzz(kind: str, part: str, tmp_path: Path) -> None:
    if kind == "archive's tables":
        pytest.importorskip("scipy")
        faulthandler.disable()  # scipy crashes in a process of its own, which nobody needs to hear of
    one, sample, count = INPUTS[kind]
    problems: dict[str, list[int]] = {}
    for number in range(sample) if part == "sample" else range(sample, count):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            one(Random(f"{kind} {number}"), folder)
        except (Exception, TooLongError) as error:
            where = [f"{Path(step.filename).name}:{step.lineno}" for step in traceback.extract_tb(error.__traceback__)]
            problem = f"{type(error).__name__}: {str(error)[:300]} ({' '.join(where[-6:])})"
            problems.setdefault(problem, []).append(number)
        finally:
            shutil.rmtree(folder)
    lines = [f"{len(numbers)}, e.g. {numbers[:5]}: {problem}" for problem, numbers in problems.items()]
    assert not problems, "\n".join(lines)


# --- some of what it has found, small enough for every run ---


def test_a_pipe_named_like_a_shard_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train-0.tar")
    assert attempt(lambda: read_splits(tmp_path)) is REFUSED


def test_a_table_that_crashes_its_reader_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    shutil.copytree(archive("cars"), tmp_path / "cars")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "_variable", crash)
        assert attempt(lambda: read_splits(tmp_path / "cars")) is REFUSED
    assert attempt(lambda: read_splits(tmp_path / "cars")) is not REFUSED


def crash(file: Path, name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_billion_parts_are_refused(tmp_path: Path) -> None:
    shutil.copytree(archive("cub"), tmp_path / "cub")
    table = tmp_path / "cub" / "parts" / "part_locs.txt"
    table.write_text(table.read_text().replace(" 2 2.0", " 1000000000 2.0"))
    images = ImageList(tmp_path / "cub" / "images", ("001.Wren/a.jpg",), (0,), ("001.Wren",))
    assert attempt(lambda: read_objects(None, images)) is REFUSED


@pytest.mark.parametrize(
    "change",
    [{"backbone": 5}, {"detectors": 10**7}, {"image_size": -1}, {"std": [1]}, {"temperature": "1"}, {"mean": 0}],
)
def test_facts_that_no_encoder_can_have_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(weights_file())
    state, facts = load_weights(file)
    save_weights(file, state, facts | change)
    assert attempt(lambda: load(tmp_path)) is REFUSED


def test_a_report_passes_over_records_without_a_step_and_values_that_are_none(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder(), run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4}\n[1]\n{"step": 16, "epoch": "x", "loss": {}, "images_per_second": 1e-300}\n')
    (run / "results.json").write_text(
        '{"retrieval": {"mean": {"rank1": 1e400, "rank5": "x"}}, "images": [], "best_epoch": 3}'
    )
    assert (
        attempt(lambda: write_report(ReportConfig((run,), gallery=0, queries=0), Console(file=io.StringIO())))
        is not REFUSED
    )


def test_a_changed_count_of_rows_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(partial_folder()[0], tmp_path / "out")
    file = tmp_path / "out" / "partial" / "state.json"
    file.write_text(file.read_text().replace('"rows": 6', '"rows": 5'))
    assert attempt(lambda: Partial(tmp_path / "out" / "partial", KEY)) is REFUSED
