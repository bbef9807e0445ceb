"""Attention drawn over the image it belongs to, and sheets of such images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from fastcr.data.crops import centre_crop

COLD, WARM, HOT = "#1b1044", "#e0483e", "#fdf3a0"
Named = tuple[str, Image.Image]  # an image as evaluation sees it, after its class, or else its file
STRENGTH = 0.75  # how far the most attended position is covered
LEAST_SIDE, GAP, LINE, FONT_SIZE = 112, 8, 20, 14  # of a sheet, pixels


def as_evaluated(image: Image.Image, image_size: int) -> Image.Image:
    """What evaluation sees of an RGB image: a square of `image_size` pixels from its centre."""
    return Image.fromarray(centre_crop(image, image_size).contiguous().numpy())


def overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """`image` with a map `[H,W]` of the same crop over it: warm where the map is high, bare where it is low.

    The map is scaled to its own maximum, so that flat maps look flat and warm throughout.
    """
    scaled = attention.detach().cpu().double() / attention.max().clamp_min(1e-12).item()
    heat = Image.fromarray((scaled * 255).round().byte().numpy())
    heat = heat.resize(image.size, Image.Resampling.BICUBIC)
    colours = ImageOps.colorize(heat, black=COLD, mid=WARM, white=HOT)
    return Image.composite(colours, image.convert("RGB"), heat.point(lambda value: round(value * STRENGTH)))


class Tile(NamedTuple):
    """Square images side by side, all of one size, with a caption below."""

    caption: str
    images: Sequence[Image.Image]


def attention_sheet(images: Sequence[Named], attention: Tensor, columns: int) -> Image.Image:
    """Each image beside its overlay; `attention` `[N,H,W]`."""
    pairs = zip(images, attention, strict=True)
    tiles = [Tile(name, [image, overlay(image, map_)]) for (name, image), map_ in pairs]
    return contact_sheet([("", tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def contact_sheet(rows: Sequence[tuple[str, Sequence[Tile]]]) -> Image.Image:
    """Rows of tiles on white, each below its heading, if it has one. Captions are cut to the width of their tile."""
    first = rows[0][1][0].images
    side = max(first[0].width, LEAST_SIDE)
    tile_width, row_height = side * len(first), side + LINE + GAP
    width = GAP + max(len(tiles) for _, tiles in rows) * (tile_width + GAP)
    height = GAP + sum(row_height + LINE * bool(heading) for heading, _ in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE), GAP
    for heading, tiles in rows:
        if heading:
            draw.text((GAP, top), fitted(heading, font, width - 2 * GAP), "black", font)
            top += LINE
        for column, tile in enumerate(tiles):
            left = GAP + column * (tile_width + GAP)
            for i, image in enumerate(tile.images):
                sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left + i * side, top))
            draw.text((left, top + side + 2), fitted(tile.caption, font, tile_width), "black", font)
        top += row_height
    return sheet


def fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text` on one line of at most `width` pixels; what cannot be printed is escaped, what is too long is cut."""
    text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    if font.getlength(text) <= width:
        return text
    text = text[:width]  # a letter is a pixel wide at least
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
