"""Sheets: pictures, tables and charts under headings, written as an HTML page or as one picture.

A page needs no other file: its pictures are in it, nothing is fetched, no script runs, and all text is escaped. A
picture holds the headings and the tiles only.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import StrictUndefined, Template
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole

GENERATOR = "fastcr, which may replace this file"  # in all that is written, so that no other file is ever replaced
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no script is run, nothing is fetched
# what no page may hold: control characters, and halves of characters from file names that are not UTF-8
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
PAGE, PICTURES = ".html", (".jpg", ".jpeg", ".png")
ROW = 6  # tiles side by side in a picture; a page has as many as there is room for
LEAST_SIDE, GAP, LINE, FONT_SIZE = 112, 8, 20, 14  # of a picture, pixels
SMALL = 144  # of the pictures on a page, pixels
QUALITY = 82  # of JPEGs


class Tile(NamedTuple):
    """Square pictures side by side, all of one size, with a caption below."""

    caption: str
    images: Sequence[Image.Image]
    mark: str = ""  # "right" or "wrong": the colour of its frame on a page


class Table(NamedTuple):
    """A table of text; the first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Chart(NamedTuple):
    """A curve."""

    title: str
    points: Sequence[tuple[float, float]]  # x and y, the latter upwards


class Section(NamedTuple):
    """A part of a sheet, in the order in which it is shown."""

    heading: str = ""
    text: str = ""
    code: str = ""  # a command to copy
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    rows: Sequence[Sequence[Tile]] = ()


def check_out(out: Path, endings: Sequence[str] = (PAGE, *PICTURES)) -> None:
    """`UsageError` where no sheet with one of these endings can be written, or where another file would be lost."""
    if out.suffix.lower() not in endings:
        raise UsageError(f"--out {out} must end in {' or '.join(endings)}")
    if not out.parent.is_dir() or (not out.is_file() and (out.exists() or out.is_symlink())):
        raise UsageError(f"--out {out} names no file in a folder that is there")
    if out.is_file():
        with out.open("rb") as file:
            if GENERATOR.encode() not in file.read(1000):
                raise UsageError(f"{out} was not written by this command, so it is left as it is: name another --out")


def write_sheet(out: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page or a picture, as the ending of `out` says, whole or not at all."""
    if out.suffix.lower() == PAGE:
        page = html_page(title, sections)
        write_whole(out, lambda file: file.write_text(page, encoding="utf-8"))
        return
    sheet, note = contact_sheet(sections), PngInfo()
    note.add_text("Software", GENERATOR)
    kind = "PNG" if out.suffix.lower() == ".png" else "JPEG"  # each takes what is meant for it
    write_whole(out, lambda file: sheet.save(file, kind, pnginfo=note, quality=QUALITY, comment=GENERATOR))


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    text = Path(__file__).parents[1].joinpath("sheet.html.jinja").read_text(encoding="utf-8")
    template = Template(text, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    functions = {"uri": data_uri, "polyline": polyline}
    page = template.render(title=title, sections=sections, generator=GENERATOR, policy=POLICY, **functions)
    return UNPRINTABLE.sub("\ufffd", page)


def data_uri(picture: Image.Image) -> str:
    """A picture, as a small JPEG, as an address that needs no file."""
    (small := picture.copy()).thumbnail((SMALL, SMALL))
    small.save(held := io.BytesIO(), "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """The points of a curve as SVG has them, scaled to a box of 500 by 250."""
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    across, up = (right - left) or 1, (high - low) or 1
    shown = [f"{500 * (x - left) / across:.1f},{250 * (high - y) / up:.1f}" for x, y in points]
    return " ".join(shown if len(shown) > 1 else shown * 2)  # a line of one point would not be seen


def contact_sheet(sections: Sequence[Section]) -> Image.Image:
    """Headings and tiles on white; text is cut to the width of what it belongs to."""
    parts = [[row[at : at + ROW] for row in section.rows for at in range(0, len(row), ROW)] for section in sections]
    rows = [tiles for part in parts for tiles in part]
    side = max(rows[0][0].images[0].width, LEAST_SIDE)
    tile_width, row_height = side * max(len(tile.images) for tiles in rows for tile in tiles), side + LINE + GAP
    width = GAP + max(map(len, rows)) * (tile_width + GAP)
    height = GAP + len(rows) * row_height + LINE * sum(bool(section.heading) for section in sections)
    sheet, top = Image.new("RGB", (width, height), "white"), GAP
    for section, part in zip(sections, parts, strict=True):
        if section.heading:
            sheet.paste(line_of(section.heading, width - 2 * GAP), (GAP, top))
            top += LINE
        for tiles in part:
            for column, tile in enumerate(tiles):
                left = GAP + column * (tile_width + GAP)
                for i, image in enumerate(tile.images):
                    sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left + i * side, top))
                sheet.paste(line_of(tile.caption, tile_width), (left, top + side))
            top += row_height
    return sheet


def line_of(text: str, width: int) -> Image.Image:
    """A line of text, cut at `width` pixels; what cannot be printed is escaped."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[:width])
    line = Image.new("RGB", (width, LINE), "white")
    ImageDraw.Draw(line).text((0, 2), shown, "black", ImageFont.load_default(FONT_SIZE))
    return line
