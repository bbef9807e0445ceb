"""Pages of pictures and tables under headings, and grids of pictures.

A page needs no other file: its pictures are in it, nothing is fetched, no script runs, and all text is escaped.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import StrictUndefined, Template
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole

GENERATOR = "fastcr, which may replace this file"  # in all that is written, so that no other file is ever replaced
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no script is run, nothing is fetched
# what no page may hold: control characters, and halves of characters from file names that are not UTF-8
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
PAGE, GRID = ".html", ".png"
ROW, GAP = 6, 8  # tiles side by side in a grid, and pixels between them; a page has as many as there is room for
SMALL = 144  # of the pictures on a page, pixels
QUALITY = 82  # of JPEGs


class Tile(NamedTuple):
    """Square pictures side by side, all of one size, with a caption below."""

    caption: str
    images: Sequence[Image.Image]


class Table(NamedTuple):
    """A table of text; the first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A part of a page, in the order in which it is shown."""

    heading: str = ""
    text: str = ""
    code: str = ""  # a command to copy
    tables: Sequence[Table] = ()
    rows: Sequence[Sequence[Tile]] = ()


def check_out(out: Path, *endings: str) -> None:
    """`UsageError` where nothing with one of these endings can be written, or where another file would be lost."""
    if out.suffix.lower() not in endings:
        raise UsageError(f"--out {out} must end in {' or '.join(endings)}")
    if not out.parent.is_dir() or (not out.is_file() and (out.exists() or out.is_symlink())):
        raise UsageError(f"--out {out} names no file in a folder that is there")
    if out.is_file():
        with out.open("rb") as file:
            if GENERATOR.encode() not in file.read(1000):
                raise UsageError(f"{out} was not written by this command, so it is left as it is: name another --out")


def write_page(out: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page, whole or not at all."""
    page = html_page(title, sections)
    write_whole(out, lambda file: file.write_text(page, encoding="utf-8"))


def write_grid(out: Path, tiles: Sequence[Tile]) -> None:
    """Write a grid as PNG, whole or not at all."""
    picture, note = grid_of(tiles), PngInfo()
    note.add_text("Software", GENERATOR)
    write_whole(out, lambda file: picture.save(file, "PNG", pnginfo=note))


def grid_of(tiles: Sequence[Tile]) -> Image.Image:
    """The pictures of tiles, all of one size and number, on white."""
    wide, high = (sum(image.width for image in tiles[0].images) + GAP, tiles[0].images[0].height + GAP)
    grid = Image.new("RGB", (min(ROW, len(tiles)) * wide + GAP, -(-len(tiles) // ROW) * high + GAP), "white")
    for number, tile in enumerate(tiles):
        for place, image in enumerate(tile.images):
            grid.paste(image, (number % ROW * wide + GAP + place * image.width, number // ROW * high + GAP))
    return grid


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    told = {"title": title, "sections": sections, "generator": GENERATOR, "policy": POLICY, "uri": data_uri}
    page = template_of("sheet.html.jinja").render(told)
    return UNPRINTABLE.sub("\ufffd", page)


def template_of(name: str) -> Template:
    """One of the package's pages, which escapes whatever it is given."""
    text = files("fastcr").joinpath(name).read_text(encoding="utf-8")
    return Template(text, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def data_uri(picture: Image.Image) -> str:
    """A picture, as a small JPEG, as an address that needs no file."""
    (small := picture.copy()).thumbnail((SMALL, SMALL))
    small.save(held := io.BytesIO(), "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
