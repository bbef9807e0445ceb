"""Every format, mode and orientation to its right picture; every name, in every form of a label, to its right class."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcr.data import depth
from fastcr.data.images import ImageList, read_rgb
from fastcr.data.layouts import read_splits
from fastcr.data.pixel_cache import measure
from fastcr.runs.context import Context

MODES = {
    "jpg": "L RGB CMYK", "png": "1 L LA P RGB RGBA I;16", "webp": "RGB RGBA", "avif": "RGB RGBA", "gif": "L P",
    "tif": "1 L LA P RGB RGBA CMYK YCbCr I;16 I F", "bmp": "1 L P RGB", "jp2": "L LA RGB RGBA I;16", "ppm": "1 L I RGB",
}  # fmt: skip
DEEP = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
_T = Image.Transpose
STORED = {1: None, 2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_90,
          7: _T.TRANSVERSE, 8: _T.ROTATE_270}  # how a camera turns an upright picture, by EXIF's standard  # fmt: skip


@pytest.mark.parametrize("kind", MODES)
def test_pictures(kind: str, tmp_path: Path) -> None:
    if f".{kind}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {kind}")
    y, x = np.mgrid[0:48, 0:64]
    scene = Image.fromarray(np.stack([x * 255 / 64, y * 255 / 48, (x > 32) * 200.0], 2).astype(np.uint8))
    for mode in MODES[kind].split():
        image = scene.convert("L" if mode in DEEP else mode)
        seen = np.asarray(image.convert("RGB"), dtype=int)
        if mode in DEEP:
            image = Image.fromarray((np.asarray(image) * (1 / 255 if mode == "F" else 257.0)).astype(DEEP[mode]))
        for orientation in STORED if kind in ("jpg", "png", "webp", "avif", "tif") else (1,):
            exif, turn = Image.Exif(), STORED[orientation]
            exif[0x0112] = orientation
            turned = image if turn is None else image.transpose(turn)
            turned.save(tmp_path / f"a.{kind}", **({} if turn is None else {"exif": exif}))
            found = np.asarray(read_rgb(str(tmp_path / f"a.{kind}")), dtype=int)
            assert found.shape == seen.shape
            assert measure(ImageList(tmp_path, (f"a.{kind}",), None, ()), 1000, Context()).tolist() == [[48, 64]]
            assert np.abs(found - seen).mean() < 6, (mode, orientation)


RAMP = np.linspace(0, 1, 1920).reshape(40, 48)
EDGE = RAMP < 0.1


def tiff(values: np.ndarray, order: str = "<", **tags: Any) -> bytes:
    """An uncompressed TIFF that holds these bytes; with further tags, such as `t281=2000`."""
    data, extra, directory = values.astype(values.dtype.newbyteorder(order)).tobytes(), b"", b""
    height, width, samples = (*values.shape, 1)[:3]
    entries: dict[int, Any] = {256: width, 257: height, 258: [8 * values.itemsize] * samples, 259: 1, 273: 8}
    entries |= {262: 1 if samples == 1 else 2, 277: samples, 278: height, 279: len(data)}
    entries |= {339: "uif".index(values.dtype.kind) + 1} | {int(name[1:]): value for name, value in tags.items()}
    for tag, value in sorted(entries.items()):
        raw = value.encode() if isinstance(value, str) else struct.pack(f"{order}{np.size(value)}I", *np.ravel(value))
        kind, count = (2, len(raw)) if isinstance(value, str) else (4, len(raw) // 4)
        place = struct.pack(f"{order}I", 8 + len(data) + len(extra)) if len(raw) > 4 else raw.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, count) + place
        extra += raw * (len(raw) > 4)
    head = struct.pack(f"{order}2sHI", {"<": b"II", ">": b"MM"}[order], 42, 8 + len(data) + len(extra))
    return head + data + extra + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)


def png(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits, of a colour type."""
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    parts = [name + content for name, content in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts
    )


def bits(count: int, *, colours: int = 0) -> np.ndarray:
    grey = np.rint(RAMP * (2**count - 1)).astype(np.uint16)
    return grey if not colours else np.stack([grey, grey[::-1], grey[:, ::-1], 0 * grey + 65_535][:colours], 2)


def packed(values: np.ndarray) -> np.ndarray:
    """Values of 12 bits, two in three bytes."""
    first, second = values[:, ::2], values[:, 1::2]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 2).reshape(40, -1).astype(np.uint8)


COLOURS = [  # of these, the upper bytes
    *((tiff(bits(16, colours=n), order), RAMP) for n in (3, 4) for order in "<>"),
    *((png(bits(16, colours=n), kind), RAMP) for n, kind in ((3, 2), (4, 6))),
    (png(bits(12, colours=3), 2), RAMP / 16),
    (png(np.stack([bits(16), bits(16)], 2), 4), RAMP),
]
PGM = b"P5 48 40 65535 " + bits(12).astype(">u2").tobytes()


@pytest.mark.parametrize(
    ("file", "seen"),
    [
        *((tiff(bits(count)), RAMP) for count in (8, 10, 12, 14, 16)),
        (tiff(bits(13)), RAMP / 2),
        (tiff(bits(12), ">"), RAMP),
        (tiff(bits(16), t262=0), 1 - RAMP),  # white is zero
        (tiff(bits(10), t281=2046), RAMP / 2),  # the greatest value, as the file says
        (tiff(bits(12), t281=65_535), RAMP),  # which says nothing
        (tiff(np.where(EDGE, 65_535, bits(12))), np.where(EDGE, 1, RAMP)),
        (tiff(bits(12).astype(np.int16)), RAMP),
        (tiff(np.full((40, 48), 7, np.int32)), np.full((40, 48), 7 / 255)),
        (tiff((RAMP * 255).astype(np.int32)), RAMP),
        (tiff((RAMP / 2).astype(np.float32)), RAMP / 2),  # dark stays dark
        (tiff((RAMP * 1e9).astype(np.float32)), RAMP),
        (tiff((RAMP * 1.02).astype(np.float32)), RAMP),
        (tiff((RAMP * 1023).astype(np.float32)), RAMP),
        (tiff((RAMP - 0.5).astype(np.float32)), RAMP),
        *(
            (tiff(np.where(EDGE, no_data, RAMP * 1023).astype(np.float32)), np.where(EDGE, 0, RAMP))
            for no_data in (-9999, -3.4e38, np.nan)
        ),
        (tiff(np.where(EDGE, 7e6, RAMP).astype(np.float32), t42113="7000000 "), np.where(EDGE, 0, RAMP)),
        (tiff(packed(np.rint(RAMP * 1000).astype(int)), t256=48, t258=12), RAMP * 1000 / 4095),
        (PGM, RAMP / 16),  # the file says what is white
        *COLOURS,
    ],
)
def test_depths(file: bytes, seen: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_bytes(file)
    depth.say.cache_clear()
    pictures = [read_rgb(each) for each in (str(tmp_path / "a"), io.BytesIO(file))]
    found = [np.asarray(each) for each in pictures]
    assert (found[0] == found[1]).all()
    assert np.abs(found[0][..., 0] - 255 * seen).max() < 1.6
    as_usual = pictures[0].info.get(depth.SCALED, depth.WHOLE) == depth.WHOLE
    assert len(capsys.readouterr().err.splitlines()) == (not as_usual)  # said once
    assert as_usual == (file in (tiff(bits(16)), tiff(bits(16), t262=0), PGM, *(each for each, _ in COLOURS)))


def test_colours_in_planes_are_refused_where_pil_would_scramble_them() -> None:
    planes, size = np.concatenate([*np.moveaxis(bits(12, colours=3), 2, 0)]), 2 * RAMP.size
    colours = {"t257": 40, "t258": [16] * 3, "t262": 2, "t277": 3, "t278": 40, "t279": [size] * 3, "t284": 2}
    file = tiff(planes, **colours, t273=[8, 8 + size, 8 + 2 * size])
    with pytest.raises(OSError, match="colours of 16 bits in planes"):
        read_rgb(io.BytesIO(file))


NAMES = (
    "crow",
    "12",
    "wood wren",
    "caf\u00e9",
    "cafe\u0301 noir",
    "\u9ce5 \U0001f426",
    '[b]it\'s 50 %: "&"',
    "a\\b",
    "#1",
)


def test_names(tmp_path: Path) -> None:
    """As class folders, in a list, and in shards as `.json` and, of numbers, as `.cls`."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as tar:
        for number, name in enumerate(NAMES):
            folder = tmp_path / "folders" / name
            folder.mkdir(parents=True)
            (folder / f"{number}.png").write_bytes(file.getvalue())
            texts = {"json": json.dumps({"label": name}), **({"cls": name} if name.isdecimal() else {})}
            for ending, content in {
                "png": file.getvalue(),
                **{key: text.encode() for key, text in texts.items()},
            }.items():
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    lines = [f"folders/{unicodedata.normalize('NFD', name)}/{number}.png\t{name}" for number, name in enumerate(NAMES)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    for form in ("folders", "list.txt", "shards"):
        images = read_splits(tmp_path / form).train
        found = {
            Path(file).stem: images.classes[label]
            for file, label in zip(images.files, images.labels or (), strict=True)
        }
        assert found == {str(number): unicodedata.normalize("NFC", name) for number, name in enumerate(NAMES)}, form
