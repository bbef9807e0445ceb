"""The embedded data set: 16 classes of drawn birds that differ only in four small parts.

A class is a combination of two beaks, crowns, wings and tails; it shares three of its parts with each of four
others. All the rest (pose, size, plumage, light, scenery, clutter) is drawn alike for every class: what fills
most of an image says nothing about its class.
"""

import itertools
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from fastcr.errors import UsageError
from fastcr.runs.log import progress
from fastcr.runs.machine import cache_folder

VERSION = 1  # part of the cache folder's name: raise it whenever a drawn image changes
TRAIN, TEST = 100, 25  # images in each class
WIDTHS, HEIGHT, SUPERSAMPLING = (96, 128), 96, 3
Array = NDArray[np.float64]
Colour = tuple[int, ...]
Draw = ImageDraw.ImageDraw


class Parts(NamedTuple):
    """What makes a class: one value of each small part."""

    beak: str
    crown: str
    wing: str
    tail: str

    @property
    def name(self) -> str:
        """Folder name of the class, such as `hooked_beak-red_crown-barred_wing-forked_tail`."""
        return "-".join(f"{value}_{part}" for part, value in zip(self._fields, self, strict=True))


_VALUES = ("dagger", "hooked"), ("red", "crested"), ("plain", "barred"), ("forked", "fan")
CLASSES = tuple(Parts(*values) for values in itertools.product(*_VALUES))


def _hex(colours: str) -> list[Colour]:
    return [tuple(bytes.fromhex(colour)) for colour in colours.split()]


# no red and nothing as light as a wing bar: plumage must not look like a part
BACKS = _hex("805c3c 4e70a0 78823e c4963a 70767e 388484 54465c 3e4048")
BELLIES = _hex("e2ccaa d6dce2 e4d680 f0dea8 deded8 cedec4 c4b0ba b0b2b2")
BEAKS = _hex("2e2c30 eca02c f4d678 d69684")
LEAVES = _hex("46762e 70983c 305632 b08e38 965c30")
SCENES = (  # a colour ramp, the grid of the finest noise (columns, rows), the weight of the vertical gradient
    (_hex("70a4d8 bed6e8 f6eede"), (7, 5), 0.7),  # sky
    (_hex("e8aa7e f0cea0 969cbe"), (5, 9), 0.8),  # dusk
    (_hex("223e24 567e3a b0be68"), (16, 12), 0.2),  # foliage
    (_hex("603c28 a8703e e8ba70"), (14, 12), 0.2),  # autumn wood
    (_hex("28586c 5c96a4 bed8d4"), (4, 30), 0.5),  # water
    (_hex("c4ce96 96a852 5c7436"), (34, 4), 0.4),  # reeds
)
# outlines in the frame of the head or, for tails, of the body
SHAPES = {
    "dagger": [(0.12, -0.05), (0.62, 0.06), (0.12, 0.08)],
    "hooked": [(0.1, -0.15), (0.28, -0.14), (0.42, 0.02), (0.39, 0.26), (0.28, 0.11), (0.1, 0.15)],
    "red": [(-0.19, -0.02), (-0.14, -0.16), (0, -0.21), (0.12, -0.16), (0.16, -0.06), (0.02, -0.07)],
    "crested": [(0.1, -0.14), (-0.26, -0.34), (-0.15, -0.18), (-0.38, -0.22), (-0.15, -0.02)],
    "forked": [(-0.4, -0.08), (-1, -0.24), (-0.6, 0.04), (-1, 0.32), (-0.4, 0.16)],
    "fan": [(-0.36, -0.06), (-0.81, -0.24), (-0.9, -0.05), (-0.9, 0.15), (-0.81, 0.34), (-0.36, 0.14)],
}
_CIRCLE = np.array([(np.cos(angle), np.sin(angle)) for angle in np.arange(20) * np.pi / 10])


def _shade(colour: Colour, factor: float) -> Colour:
    return tuple(round(min(channel * factor, 255)) for channel in colour)


def _smooth(points: ArrayLike, steps: int = 5) -> Array:
    """A closed Catmull-Rom curve through the points."""
    p1 = np.asarray(points, dtype=np.float64)
    p0, p2, p3 = (p1[np.arange(shift, shift + len(p1)) % len(p1)] for shift in (-1, 1, 2))
    t = (np.arange(steps) / steps)[:, None, None]
    curve = p1 + t / 2 * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return np.reshape(np.swapaxes(curve, 0, 1), (-1, 2))


class _Pen:
    """Draws in a turned frame of its own, x forward and y down (times `stretch`), lengths in units."""

    def __init__(self, draw: Draw, at: ArrayLike, unit: float, angle: float = 0, stretch: float = 1) -> None:
        self.draw, self.at, self.unit = draw, np.asarray(at, dtype=np.float64), unit
        cos, sin = unit * np.cos(angle), unit * np.sin(angle)
        self.axes: Array = np.array([(cos, sin), (-stretch * sin, stretch * cos)])

    def pixels(self, points: ArrayLike) -> Array:
        return np.asarray(points, dtype=np.float64) @ self.axes + self.at

    def fill(self, points: ArrayLike, colour: Colour, edge: Colour | None = None) -> None:
        outline = self.pixels(points).ravel().tolist()
        self.draw.polygon(outline, fill=colour)
        if edge:
            self.draw.line(outline + outline[:2], fill=edge, width=2)

    def dot(self, at: ArrayLike, radii: ArrayLike, colour: Colour, edge: Colour | None = None) -> None:
        self.fill(_CIRCLE * radii + np.asarray(at, dtype=np.float64), colour, edge)

    def line(self, points: ArrayLike, colour: Colour, width: float) -> None:
        self.draw.line(self.pixels(points).ravel().tolist(), fill=colour, width=round(width * self.unit))


def _noise(rng: Generator, cells: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float32]:
    grid = Image.fromarray(rng.random(cells[::-1], dtype=np.float32))
    return np.asarray(grid.resize(size, Image.Resampling.BICUBIC))


def _backdrop(rng: Generator, size: tuple[int, int]) -> Image.Image:
    """Scenery out of focus: smooth noise through a colour ramp, and blurred discs."""
    ramp, cells, slope = SCENES[rng.integers(len(SCENES))]
    fine = _noise(rng, cells, size)
    field = (1 - slope) * 0.65 * _noise(rng, (4, 3), size) + (0.47 - 0.35 * slope) * fine - 0.06
    field = field + slope * np.linspace(rng.uniform(-0.2, 0.2), rng.uniform(0.8, 1.2), size[1])[:, None]
    channels = [np.interp(field, (0, 0.5, 1), channel) for channel in zip(*ramp, strict=True)]
    backdrop = Image.fromarray(np.stack(channels, -1).astype(np.uint8))
    for _ in range(rng.integers(4, 14)):
        pen = _Pen(ImageDraw.Draw(backdrop), rng.random(2) * size, rng.uniform(2, 9))
        pen.dot((0, 0), (1, 1), _shade(ramp[rng.integers(3)], rng.uniform(0.7, 1.3)))
    return backdrop.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 2.5)))


def _clutter(draw: Draw, rng: Generator, at: ArrayLike, unit: float) -> None:
    """A leaf, or what resembles a part: berries a crown, catkins a wing bar, thorns a beak, a fork a tail."""
    pen = _Pen(draw, at, unit * rng.uniform(0.7, 1.3), rng.uniform(0, 2 * np.pi))
    leaf = _shade(LEAVES[rng.integers(len(LEAVES))], rng.uniform(0.75, 1.25))
    wood, red = _shade((112, 84, 62), rng.uniform(0.6, 1.3)), _shade((214, 38, 40), rng.uniform(0.8, 1.1))
    kind = rng.integers(5)
    pen.line([(-0.5, 0), (0.2, 0)], wood, 0.035)
    if kind == 0:
        half = rng.uniform(0.08, 0.16)
        pen.fill(_smooth([(0, 0), (0.2, half), (0.5, 0), (0.2, -half)]), leaf, _shade(leaf, 0.7))
        pen.line([(0, 0), (0.45, 0)], _shade(leaf, 0.75), 0.02)
    elif kind == 1:
        for x, y in rng.uniform((-0.25, -0.15), (0.25, 0.15), (rng.integers(2, 5), 2)):
            pen.dot((x, y), (0.075, 0.075), red, _shade(red, 0.65))
            pen.dot((x - 0.02, y - 0.02), (0.02, 0.02), (255, 226, 220))
    elif kind == 2:
        for x in np.arange(rng.integers(1, 4)) * 0.17 - 0.25:
            pen.dot((x, rng.choice((-0.11, 0.11))), (0.04, 0.11), (244, 238, 218), (196, 184, 150))
    elif kind == 3:
        for x in rng.uniform(-0.4, 0.1, 2):
            pen.fill([(x - 0.06, 0), (x + 0.06, 0), (x + rng.uniform(-0.05, 0.05), -0.28)], wood)
    else:
        pen.fill([(0, -0.04), (0.5, -0.22), (0.14, 0), (0.5, 0.22), (0, 0.04)], leaf, _shade(leaf, 0.7))


def _draw_parts(body: _Pen, head: _Pen, parts: Parts, rng: Generator) -> None:
    """The bird from back to front."""
    plumage, tone = rng.integers(len(BACKS)), rng.uniform(0.85, 1.15)
    back, belly = _shade(BACKS[plumage], tone), _shade(BELLIES[plumage], tone)
    wing, edge = _shade(back, 0.66), _shade(back, 0.45)
    beak = _shade(BEAKS[rng.integers(len(BEAKS))], rng.uniform(0.9, 1.1))
    red = _shade((222, 36, 38), rng.uniform(0.85, 1.1))  # drawn for every bird, so that parts alter nothing else
    body.fill(SHAPES[parts.tail], wing, edge)
    for tip in SHAPES[parts.tail][1:-1]:
        body.line([(-0.4, 0.05), tip], edge, 0.02)
    nape, throat = (head.pixels([(-0.17, 0.05), (0.12, 0.12)]) - body.at) @ np.linalg.inv(body.axes)
    breast = [throat, (0.46, 0.05), (0.3, 0.26), (0, 0.32), (-0.32, 0.2)]
    body.fill(_smooth([(-0.55, 0.02), (-0.25, -0.17), nape, *breast]), back, edge)
    body.fill(_smooth([*np.multiply(breast, 0.93), (0.1, 0.12), (0.3, 0)]), belly)
    if rng.random() < 0.4:
        for x, y in rng.uniform((0.18, 0.02), (0.38, 0.2), (7, 2)):
            body.dot((x, y), (0.018, 0.018), edge)
    body.fill(_smooth([(0.24, -0.1), (0.16, 0.12), (-0.2, 0.17), (-0.62, 0.08), (-0.25, -0.12)]), wing, edge)
    for y in (0.03, 0.1):
        body.line([(-0.05, y), (-0.5, y * 0.4 + 0.05)], edge, 0.02)
    if parts.wing == "barred":
        for x in (0.1, -0.1):
            body.line([(x + 0.04, -0.09), (x - 0.03, 0.14)], (250, 244, 226), 0.075)
    if parts.crown == "crested":
        head.fill(SHAPES["crested"], wing, edge)
    head.fill(SHAPES[parts.beak], beak, _shade(beak, 0.6))
    head.dot((0, 0), (0.185, 0.175), back, edge)
    if parts.crown == "red":
        head.fill(_smooth(SHAPES["red"]), red)
    if rng.random() < 0.4:
        head.line([(-0.14, 0.03), (0.16, 0)], edge, 0.04)
    head.dot((0.06, -0.01), (0.05, 0.05), (236, 228, 206))
    head.dot((0.06, -0.01), (0.036, 0.036), (20, 18, 20))


def draw_bird(parts: Parts, rng: Generator) -> Image.Image:
    """One RGB image of a bird with these parts; everything else comes from `rng`."""
    size = int(rng.integers(WIDTHS[0], WIDTHS[1] + 1)), HEIGHT
    width, height = size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING
    canvas = _backdrop(rng, size).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    unit = height * rng.uniform(0.39, 0.48)
    for at in rng.random((rng.integers(5, 13), 2)) * (width, height):
        _clutter(draw, rng, at, unit)

    angle, stretch = np.radians(rng.uniform(-25, 25)), rng.uniform(0.85, 1.2)
    body = _Pen(draw, (0, 0), unit, angle, stretch)
    head = _Pen(draw, body.pixels(rng.uniform((0.37, -0.35), (0.47, -0.25))), unit, angle)
    # of the largest parts, whatever parts this bird has: its position must not tell its class
    box = [*body.pixels([(-1, -0.24), (-1, 0.34), (0, 0.42)]), *head.pixels([(0.62, 0.26), (-0.38, -0.34)])]
    low, high = 4 - np.min(box, 0), (width - 4, height - 4) - np.max(box, 0)
    shift = low + rng.random(2) * (high - low)
    body.at, head.at = body.at + shift, head.at + shift

    (x, y), slope = body.pixels((0.06, 0.4)), rng.uniform(-0.3, 0.3)
    bark = _shade((112, 86, 66), rng.uniform(0.6, 1.3))
    if rng.random() < 0.7:
        perch = [0, y - slope * x, x, y + 0.03 * unit, width, y + slope * (width - x)]
        for shade, thickness in ((0.6, 0.13), (1, 0.09)):
            draw.line(perch, fill=_shade(bark, shade), width=round(thickness * unit), joint="curve")
    for foot in (0, 0.12):
        body.line([(foot - 0.03, 0.2), (foot, 0.42)], _shade(bark, 0.5), 0.03)
    _draw_parts(body, head, parts, rng)

    keep_off = np.concatenate([head.pixels([(0.1, 0)]), body.pixels([(-0.05, 0), (-0.75, 0.05)])])
    for at in rng.random((rng.integers(0, 5), 2)) * (width, height):
        if (np.hypot(*(keep_off - at).T) > np.array([0.85, 0.4, 0.4]) * unit).all():
            _clutter(draw, rng, at, unit)
    if rng.random() < 0.5:
        canvas = ImageOps.mirror(canvas)
    light = rng.uniform(0.84, 1.1) * (0.85 + 0.3 * _noise(rng, (4, 3), size))[..., None]
    pixels = np.asarray(canvas.reduce(SUPERSAMPLING)) * light * rng.uniform(0.9, 1.1, 3)
    return Image.fromarray((pixels + rng.normal(0, 2, (*size[::-1], 1))).clip(0, 255).astype(np.uint8))


def default_root(seed: int = 0, train_per_class: int = TRAIN, test_per_class: int = TEST) -> Path:
    """The set's folder in the user's cache; its name holds all that the images depend on."""
    return cache_folder() / f"synthetic-v{VERSION}-seed{seed}-{train_per_class}x{test_per_class}"


def write_synthetic(
    root: Path | None = None, *, seed: int = 0, train_per_class: int = TRAIN, test_per_class: int = TEST
) -> Path:
    """Write the set as `root/{train,test}/<class>/<nnnn>.jpg` unless it is there, and return its folder.

    Image i of a class and split depends only on these three and the seed. A folder with the same file names
    is used as it is; any other that holds something raises `UsageError`.
    """
    root = Path(root or default_root(seed, train_per_class, test_per_class))
    images = {
        Path(split, parts.name, f"{i:04d}.jpg"): (parts, [seed, s, c, i])
        for s, (split, count) in enumerate((("train", train_per_class), ("test", test_per_class)))
        for c, parts in enumerate(CLASSES)
        for i in range(count)
    }
    if _is_complete(root, images):
        return root
    if root.exists() and any(root.iterdir()):
        raise UsageError(f"{root} is not a complete synthetic set: remove it or name another folder")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write the synthetic images to {root}: {error.strerror}") from None
    # drawn beside the final folder and renamed: a killed run leaves no half set, two runs at once do not meet
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        draft = Path(scratch, root.name)
        for file, (parts, seeds) in progress(images.items(), "drawing the synthetic birds", len(images)):
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            draw_bird(parts, np.random.default_rng(seeds)).save(draft / file, quality=90)
        try:
            draft.rename(root)
        except OSError:
            if not _is_complete(root, images):
                raise
    return root


def _is_complete(root: Path, images: Collection[Path]) -> bool:
    return {file.relative_to(root) for file in root.glob("*/*/*.jpg")} == set(images)
