"""Drawn birds for the embedded data set: 20 species, and how one is drawn.

Four species share each of five body plans, which differ in proportions, bill, tail and crest. The species of a plan
differ in the colours and marks of their plumage.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import ImageDraw

Array = NDArray[np.float64]
Colour = tuple[int, ...]
Points = Sequence[tuple[float, float]]


_COLOURS = """black=26262a slate=4e5862 grey=8e9296 white=e8e8e4 umber=4c3a2a brown=80603e rust=a8562c buff=d8b47c
    cream=ecdcb4 yellow=e6c83c orange=e08a2c red=c4342e rose=d88a8e olive=75793e green=3e7a4e blue=3c66a8 horn=c8aa86"""
COLOURS: dict[str, Colour] = {
    name: tuple(bytes.fromhex(value)) for name, _, value in (pair.partition("=") for pair in _COLOURS.split())
}


class Plan(NamedTuple):
    """The body of a family: outlines of bill and crest in units of the head's radius, tail in those of the body."""

    tilt: float  # posture, degrees; below 0: head up
    depth: float  # of the body, relative to its length
    head: tuple[float, float]  # its centre
    radius: float  # of the head
    bill: Points
    tail: Points
    crest: Points = ()


PLANS = {
    "finch": Plan(-22, 1.12, (0.36, -0.27), 0.2, [(0.8, -0.65), (1.75, 0.15), (0.8, 0.7)],
                  [(-0.4, -0.08), (-0.86, -0.1), (-0.78, 0.02), (-0.86, 0.14), (-0.4, 0.14)]),
    "warbler": Plan(-8, 0.85, (0.42, -0.2), 0.165, [(0.8, -0.22), (2.1, 0.12), (0.8, 0.3)],
                    [(-0.4, -0.06), (-0.9, -0.3), (-0.95, -0.16), (-0.4, 0.12)]),
    "jay": Plan(-30, 0.9, (0.42, -0.3), 0.19, [(0.8, -0.35), (1.5, -0.25), (2, 0.2), (0.8, 0.45)],
                [(-0.36, -0.08), (-1.05, -0.18), (-1.2, -0.02), (-1.18, 0.14), (-1, 0.24), (-0.36, 0.12)],
                [(0.5, -0.8), (-1, -2), (-1.6, -1.7), (-0.9, -0.1)]),
    "hawk": Plan(-58, 1.05, (0.46, -0.16), 0.19,
                 [(0.7, -0.6), (1.45, -0.5), (1.75, 0.35), (1.6, 0.75), (1.25, 0.35), (0.7, 0.5)],
                 [(-0.36, -0.1), (-1.05, -0.12), (-1.05, 0.1), (-0.36, 0.14)]),
    "kingfisher": Plan(-38, 0.95, (0.36, -0.28), 0.24, [(0.8, -0.35), (3.1, 0.1), (0.8, 0.45)],
                       [(-0.36, -0.08), (-0.7, -0.08), (-0.7, 0.12), (-0.36, 0.14)],
                       [(0.6, -0.75), (-0.2, -1.5), (-0.5, -1.15), (-1.1, -1.4), (-1, -0.95), (-1.5, -0.8), (-0.9, 0)]),
}  # fmt: skip


class Species(NamedTuple):
    """A class: its name, the body of its family, the colours of its parts (keys of `COLOURS`), and its marks."""

    name: str
    plan: Plan
    colours: list[str]  # of back, wing, belly, throat, crown and bill, in the order they are drawn from `rng`
    marks: list[str]


_CLASSES = """
    finch-redcap       brown umber cream  buff   red    horn   streaks
    finch-rosy         grey  slate white  rose   grey   horn   bars
    finch-masked       olive umber yellow yellow olive  black  mask
    finch-spotted      brown umber cream  white  brown  orange spots ring
    warbler-golden     olive slate yellow yellow yellow black  bars
    warbler-bluecap    olive blue  yellow white  blue   black  stripe
    warbler-streaked   grey  slate white  white  black  black  streaks bars
    warbler-rufous     brown umber buff   cream  rust   horn   stripe
    jay-azure          blue  blue  grey   white  blue   black  bars collar
    jay-blackhead      blue  slate blue   black  black  black
    jay-rusty          rust  umber rose   white  rust   horn   patch
    jay-green          green green yellow black  blue   black  mask
    hawk-barred        slate slate rust   white  slate  black  barring
    hawk-brown         brown umber cream  cream  umber  yellow streaks
    hawk-pale          grey  grey  white  white  white  yellow stripe
    hawk-hooded        umber umber buff   white  black  yellow spots mask
    kingfisher-belted  slate slate white  white  slate  black  collar bars
    kingfisher-orange  blue  blue  orange white  blue   black  stripe
    kingfisher-emerald green green rust   white  green  black  collar
    kingfisher-pied    black black white  white  black  black  spots patch
"""
CLASSES = tuple(
    Species(name, PLANS[name.split("-")[0]], rest[:6], rest[6:])
    for name, *rest in map(str.split, _CLASSES.strip().splitlines())
)
PATTERNS = ("spots", "streaks", "barring")
_CIRCLE = np.array([(np.cos(angle), np.sin(angle)) for angle in np.arange(20) * np.pi / 10])


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made lighter or darker."""
    return tuple(round(min(channel * factor, 255)) for channel in colour)


def smooth(points: ArrayLike, steps: int = 5) -> Array:
    """A closed Catmull-Rom curve through the points."""
    p1 = np.asarray(points, dtype=np.float64)
    p0, p2, p3 = (p1[np.arange(shift, shift + len(p1)) % len(p1)] for shift in (-1, 1, 2))
    t = (np.arange(steps) / steps)[:, None, None]
    curve = p1 + t / 2 * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return np.reshape(np.swapaxes(curve, 0, 1), (-1, 2))


class Pen:
    """Draws in a turned frame of its own, x forward and y down (times `stretch`), lengths in units."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, at: ArrayLike, unit: float, angle: float = 0, stretch: float = 1
    ) -> None:
        self.draw, self.at, self.unit = draw, np.asarray(at, dtype=np.float64), unit
        cos, sin = unit * np.cos(angle), unit * np.sin(angle)
        self.axes: Array = np.array([(cos, sin), (-stretch * sin, stretch * cos)])

    def pixels(self, points: ArrayLike) -> Array:
        """Where points `[N,2]` of the frame lie in the picture."""
        return np.asarray(points, dtype=np.float64) @ self.axes + self.at

    def fill(self, points: ArrayLike, colour: Colour, edge: Colour | None = None) -> None:
        """A polygon."""
        outline = self.pixels(points).ravel().tolist()
        self.draw.polygon(outline, fill=colour)
        if edge:
            self.draw.line(outline + outline[:2], fill=edge, width=2)

    def dot(self, at: ArrayLike, radii: ArrayLike, colour: Colour, edge: Colour | None = None) -> None:
        """An ellipse."""
        self.fill(_CIRCLE * radii + np.asarray(at, dtype=np.float64), colour, edge)

    def line(self, points: ArrayLike, colour: Colour, width: float) -> None:
        """A line through the points."""
        self.draw.line(self.pixels(points).ravel().tolist(), fill=colour, width=round(width * self.unit))

    def pattern(self, rng: Generator, kind: str, at: ArrayLike, radii: ArrayLike, colour: Colour) -> None:
        """One of `PATTERNS` in an ellipse: fourteen spots, as many streaks along it, or six bars across."""
        at, radii = np.asarray(at, dtype=np.float64), np.asarray(radii, dtype=np.float64)
        if kind == "barring":
            for x in np.linspace(-0.85, 0.85, 6):
                half = np.sqrt(1 - x * x)
                self.line(np.array([(x, -half), (x + 0.1, 0), (x, half)]) * radii + at, colour, 0.028)
            return
        distance, angle = np.sqrt((np.arange(14) + rng.random(14)) / 14), np.arange(14) * 2.4 + rng.uniform(0, 6)
        for x, y in np.stack([np.cos(angle), np.sin(angle)], 1) * distance[:, None] * radii + at:
            if kind == "spots":
                self.dot((x, y), (0.022, 0.022), colour)
            else:
                self.line([(x - 0.045, y - 0.012), (x + 0.045, y + 0.012)], colour, 0.026)


def perched(
    draw: ImageDraw.ImageDraw, kind: Species, rng: Generator, unit: float, size: ArrayLike
) -> tuple[Pen, Pen, list[float]]:
    """Pens for the body and the head of a bird that is anywhere in the picture of `size`, but whole; and its box."""
    plan = kind.plan
    angle = np.radians(plan.tilt + rng.uniform(-14, 14))
    body = Pen(draw, (0, 0), unit, angle, plan.depth * rng.uniform(0.9, 1.12))
    neck, turn = rng.uniform(-0.04, 0.04, 2), 0.15 * angle + np.radians(rng.uniform(-14, 14))
    head = Pen(draw, body.pixels(plan.head + neck), unit * plan.radius, turn)
    outline = np.concatenate([head.pixels([*plan.bill, *plan.crest, (0, -1)]), body.pixels([*plan.tail, (0, 0.42)])])
    low, high = outline.min(0), outline.max(0)
    place = rng.random(2) * (size - (high - low)) - low
    body.at, head.at = body.at + place, head.at + place
    return body, head, (np.concatenate([low + place, high + place]) / np.tile(size, 2)).tolist()


def draw_body(body: Pen, head: Pen, kind: Species, rng: Generator) -> None:
    """A bird of this species from back to front; `body` and `head` are pens in their frames."""
    plan, tone, marks = kind.plan, rng.uniform(0.88, 1.12), kind.marks
    back, wing, belly, chin, crown, bill = (
        shade(COLOURS[each], tone * rng.uniform(0.94, 1.06)) for each in kind.colours
    )
    dark, ink, pale = shade(wing, 0.6), shade(COLOURS["umber"], 0.7), COLOURS["white"]
    body.fill(plan.tail, wing, dark)
    for tip in plan.tail[1:-1]:
        body.line([(-0.4, 0.03), tip], dark, 0.02)
    nape, throat = (head.pixels([(-0.9, 0.3), (0.6, 0.75)]) - body.at) @ np.linalg.inv(body.axes)
    breast = [throat, (0.46, 0.05), (0.3, 0.26), (0, 0.32), (-0.32, 0.2)]
    body.fill(smooth([(-0.55, 0.02), (-0.25, -0.17), nape, *breast]), back, shade(back, 0.55))
    body.fill(smooth([*np.multiply(breast, 0.95), (-0.05, 0.14), (0.28, 0)]), belly)
    for mark in marks:
        if mark in PATTERNS:
            body.pattern(rng, mark, (0.2, 0.16), (0.22, 0.1), ink)
    body.fill(smooth([(0.24, -0.1), (0.16, 0.1), (-0.2, 0.15), (-0.62, 0.08), (-0.25, -0.12)]), wing, dark)
    for y in (0.02, 0.08):
        body.line([(-0.05, y), (-0.5, y * 0.4 + 0.05)], dark, 0.02)
    if "bars" in marks:
        for x in (0.1, -0.06):
            body.line([(x + 0.03, -0.08), (x - 0.03, 0.11)], pale, 0.05)
    if "patch" in marks:
        body.dot((-0.08, 0), (0.15, 0.05), pale)
    if plan.crest:
        head.fill(plan.crest, crown, shade(crown, 0.6))
    head.fill(plan.bill, bill, shade(bill, 0.55))
    head.dot((0, 0), (1, 0.95), chin, shade(crown, 0.55))
    head.fill(smooth([(-0.98, 0.25), (-0.75, -0.65), (0, -0.97), (0.75, -0.6), (0.92, -0.1), (0, -0.1)]), crown)
    if "collar" in marks:
        head.line([(-0.95, 0.45), (-0.3, 0.95), (0.6, 0.85)], pale, 0.3)
    if "mask" in marks:
        head.fill(smooth([(1, -0.25), (0.2, -0.3), (-0.5, -0.1), (-0.3, 0.3), (0.9, 0.25)]), COLOURS["black"])
    if "stripe" in marks:
        head.line([(-0.95, 0.05), (0.9, -0.05)], ink, 0.22)
    if "ring" in marks:
        head.dot((0.3, -0.1), (0.34, 0.34), pale)
    head.dot((0.3, -0.1), (0.2, 0.2), (20, 18, 20))
    head.dot((0.35, -0.16), (0.06, 0.06), (236, 236, 236))
