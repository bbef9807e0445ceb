"""Pages and grids: what is chosen, drawn and written; that no name breaks one, and that no other file is replaced."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from fastcr.errors import UsageError
from fastcr.output.gallery import overlay, spread
from fastcr.output.sheets import (
    GAP,
    GENERATOR,
    GRID,
    PAGE,
    POLICY,
    ROW,
    Section,
    Table,
    Tile,
    check_out,
    html_page,
    write_grid,
    write_page,
)  # fmt: skip
from tests.shared import decoded

NAMES = ["<script>alert(1)", "\"><img src=x onerror=alert('2')>&amp;", "</title></style><script>", "{{ 7 * 7 }}"]
TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "p", "pre", "code", "div", "table",
    "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img",
}  # fmt: skip
RED, BLUE = (Image.new("RGB", (120, 120), colour) for colour in ("red", "blue"))


class Page(HTMLParser):
    """A page read strictly, every tag closed in its order: its tags, and the words in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.words = list[str](), list[str]()
        self.tags = list[tuple[str, dict[str, str | None]]]()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_on_a_page_that_fetches_nothing(name: str) -> None:
    tiles = [Tile(name, [RED, BLUE]), Tile(name, [RED])]
    section = Section(name, name, name, [Table(name, [name, name], [(name, name)])], [tiles])
    text = html_page(name, [section])
    page = Page(text)
    assert page.words.count(name) == 2 + 3 + 5 + 2  # title twice; section; table; tiles
    assert {tag for tag, _ in page.tags} == TAGS
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on") or key in ("href", "srcset")]
    policies = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert policies == [POLICY] == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "http" not in re.sub('http-equiv|data:image/[^"]*', "", text)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert all(attrs["alt"] for attrs in images)
    colours = [Image.open(io.BytesIO(decoded(each["src"], "jpeg"))).getpixel((60, 60)) for each in images]
    assert np.allclose(colours, [(255, 0, 0), (0, 0, 255), (255, 0, 0)], atol=2)


def test_what_no_page_may_hold_is_replaced(tmp_path: Path) -> None:
    text = "a\x00b\x1b[1m caf\udce9 \ufffe"
    write_page(tmp_path / "page.html", text, [Section(rows=[[Tile(text, [RED])]])])
    written = (tmp_path / "page.html").read_text()
    assert written.count(re.sub("[\x00-\x1f\ud800-\udfff\ufffe]", "\ufffd", text)) == 4
    assert re.search("[\x00-\x09\x0b-\x1f\ud800-\udfff\ufffe]", written) is None


def test_a_grid_is_filled_row_by_row(tmp_path: Path) -> None:
    write_grid(tmp_path / "grid.png", [Tile("", [RED, BLUE])] * ROW + [Tile("", [BLUE, RED])])
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (GAP + ROW * (240 + GAP), GAP + 2 * (120 + GAP))
    for left, row, colour in ((0, 0, "red"), (120, 0, "blue"), (240 + GAP, 0, "red"), (0, 1, "blue"), (120, 1, "red")):
        place = (GAP + left + 60, GAP + row * (120 + GAP) + 60)
        assert grid.getpixel(place) == {"red": (255, 0, 0), "blue": (0, 0, 255)}[colour]
    assert grid.getpixel((GAP + 240 + GAP + 60, GAP + 120 + GAP + 60)) == (255, 255, 255)


@pytest.mark.parametrize("ending", [PAGE, GRID])
def test_only_files_of_fastcr_are_replaced(ending: str, tmp_path: Path) -> None:
    own, other, tiles = tmp_path / f"own{ending}", tmp_path / f"other{ending}", [Tile("a", [RED])]
    check_out(own, PAGE, GRID)
    write_grid(own, tiles) if ending == GRID else write_page(own, "title", [Section(rows=[tiles])])
    check_out(own, PAGE, GRID)
    for content in (b"<!DOCTYPE html>\n<p>fastcr", b"", (b"x" * 1000) + GENERATOR.encode()):
        other.write_bytes(content)
        with pytest.raises(UsageError, match="left as it is: name another --out"):
            check_out(other, PAGE, GRID)
    (tmp_path / f"link{ending}").symlink_to("nowhere")
    for out, message in (
        (tmp_path / f"link{ending}", "names no file in a folder"),
        (tmp_path / "nowhere" / f"a{ending}", "names no file in a folder"),
        (tmp_path / "a.gif", "must end in .html or .png"),
    ):
        with pytest.raises(UsageError, match=message):
            check_out(out, PAGE, GRID)


def test_overlay_is_warm_where_the_image_is_attended() -> None:
    picture, attention = Image.new("RGB", (112, 112), "#4080c0"), torch.zeros(7, 7)
    attention[1, 5] = 0.3
    moved = np.asarray(ImageChops.difference(overlay(picture, attention), picture)).max(2)
    assert moved[20:28, 84:92].min() > 50
    assert moved[:, :40].max() == 0
    assert moved[60:].max() == 0
    assert overlay(picture, torch.zeros(7, 7)).tobytes() == picture.tobytes()


def test_images_are_spread_evenly() -> None:
    assert spread(range(9), 3) == [1, 4, 7]
    assert spread("ab", 5) == ["a", "b"]
    assert spread(range(9), 0) == []
