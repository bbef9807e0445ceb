"""Small images of every format: whole, broken, or no images at all; and reading whatever holds them."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

from hypothesis import strategies as st
from PIL import Image

from fastcr.data.images import ImageList, Splits
from fastcr.data.layouts import read_splits
from tests.fuzz.damage import BYTES

KINDS = [
    (".jpg", "JPEG", "RGB", {}), (".jpg", "JPEG", "RGB", {"progressive": True}), (".jpg", "JPEG", "CMYK", {}),
    (".jpeg", "JPEG", "L", {"exif": True}), (".png", "PNG", "RGB", {}), (".png", "PNG", "P", {}),
    (".png", "PNG", "RGBA", {}), (".png", "PNG", "1", {}), (".webp", "WEBP", "RGB", {}),
    (".webp", "WEBP", "RGBA", {"lossless": True}), (".webp", "WEBP", "RGB", {"save_all": True}),
    (".gif", "GIF", "P", {}), (".gif", "GIF", "RGB", {"save_all": True}), (".bmp", "BMP", "RGB", {}),
    (".bmp", "BMP", "P", {}), (".tif", "TIFF", "RGB", {}), (".tif", "TIFF", "RGB", {"compression": "tiff_lzw"}),
    (".tif", "TIFF", "RGB", {"compression": "tiff_deflate"}), (".tiff", "TIFF", "RGB", {"compression": "jpeg"}),
    (".tif", "TIFF", "F", {}), (".tiff", "TIFF", "1", {"compression": "group4"}), (".ppm", "PPM", "RGB", {}),
    (".png", "PNG", "I;16", {}), (".tif", "TIFF", "I;16", {}),
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
        if said := what_is_wrong(images, index):
            assert repr(images.path(index)) in said, f"{said} does not name the image"
            assert len(said.splitlines()) == 1, f"several lines: {said!r}"


def what_is_wrong(images: ImageList, index: int) -> str:
    try:
        assert images.rgb(index).mode == "RGB"
    except OSError as error:
        return str(error)
    return ""


def read_all(root: Path) -> Splits:
    splits = read_splits(root)
    for images in (splits.train, *([splits.test] if splits.test else [])):
        assert len(images) == len(images.files) > 0
        if images.labels is not None:
            assert len(images.labels) == len(images)
            assert all(0 <= label < len(images.classes) for label in images.labels)
        read_every(images)
    return splits
