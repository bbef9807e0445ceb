"""The embedded data set, a demonstration: drawn birds of 20 species (`fastcr.data.birds`) among clutter.

A bird fills a part of the picture, anywhere. Place, size, pose and light vary from bird to bird; scenery and clutter
are drawn alike for every species, the clutter in the colours of plumage and with its spots, streaks and bars.
"""

from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from fastcr.config import Config
from fastcr.data.birds import CLASSES, COLOURS, PATTERNS, Pen, Species, draw_body, perched, shade, smooth
from fastcr.data.images import Splits
from fastcr.data.layouts import read_splits
from fastcr.errors import UsageError
from fastcr.runs.checkpoint import new_folder
from fastcr.runs.context import progress
from fastcr.runs.machine import cache_folder

VERSION = 3  # part of the cache folder's name: raise it whenever what is written changes
BOXES = "boxes.csv"  # of the birds, for `fastcr evaluate --data.boxes`
TRAIN, TEST = 60, 30  # images of each species
WIDTHS, HEIGHT, SUPERSAMPLING = (128, 152), 128, 2
SCENES = (  # a colour ramp, the grid of the finest noise (columns, rows), the weight of the vertical gradient
    ("70a4d8 bed6e8 f6eede", (7, 5), 0.7),  # sky
    ("e8aa7e f0cea0 969cbe", (5, 9), 0.8),  # dusk
    ("223e24 567e3a b0be68", (16, 12), 0.2),  # foliage
    ("603c28 a8703e e8ba70", (14, 12), 0.2),  # autumn wood
    ("28586c 5c96a4 bed8d4", (4, 30), 0.5),  # water
    ("c4ce96 96a852 5c7436", (34, 4), 0.4),  # reeds
    ("4c4a48 8a8680 c8c4ba", (12, 16), 0.3),  # rock
)


def _noise(rng: Generator, cells: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float32]:
    grid = Image.fromarray(rng.random(cells[::-1], dtype=np.float32))
    return np.asarray(grid.resize(size, Image.Resampling.BICUBIC))


def _scene(rng: Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """Smooth noise through a colour ramp, `[H,W,3]`."""
    ramp, cells, slope = SCENES[rng.integers(len(SCENES))]
    field = (1 - slope) * 0.65 * _noise(rng, (4, 3), size) + (0.47 - 0.35 * slope) * _noise(rng, cells, size) - 0.06
    field = field + slope * np.linspace(rng.uniform(-0.2, 0.2), rng.uniform(0.8, 1.2), size[1])[:, None]
    return np.stack(
        [np.interp(field, (0, 0.5, 1), channel) for channel in zip(*map(bytes.fromhex, ramp.split()), strict=True)], -1
    )


def _backdrop(rng: Generator, size: tuple[int, int]) -> Image.Image:
    """Patches of several sceneries, out of focus: what is behind one place says little of what is behind another."""
    pixels = _scene(rng, size)
    for _ in range(3):
        share = np.clip(8 * (_noise(rng, (6, 5), size) - rng.uniform(0.4, 0.8)), 0, 1)[..., None]
        pixels = share * _scene(rng, size) + (1 - share) * pixels
    return Image.fromarray(pixels.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1)))


def _clutter(draw: ImageDraw.ImageDraw, rng: Generator, at: ArrayLike, unit: float) -> None:
    """A leaf, flower, berries, twig, or a fruit or stone, in the colours and with the marks of plumage."""
    pen = Pen(draw, at, unit * rng.uniform(0.6, 1.4), rng.uniform(0, 2 * np.pi))
    colour, other = (shade(each, rng.uniform(0.75, 1.2)) for each in rng.choice(list(COLOURS.values()), 2))
    wood, kind = shade((112, 84, 62), rng.uniform(0.6, 1.3)), rng.integers(6)
    if kind in (0, 1):  # a leaf; every second one in a plumage's colour
        half = rng.uniform(0.1, 0.2)
        blade = colour if kind else shade(COLOURS[("green", "olive")[rng.integers(2)]], rng.uniform(0.7, 1.3))
        pen.line([(-0.3, 0), (0.2, 0)], wood, 0.03)
        pen.fill(smooth([(0, 0), (0.25, half), (0.6, 0), (0.25, -half)]), blade, shade(blade, 0.7))
        pen.line([(0, 0), (0.55, 0)], shade(blade, 0.75), 0.02)
        for x in np.arange(0.12, 0.45, 0.08) if rng.random() < 0.5 else ():
            pen.line([(x, -half * 0.7), (x + 0.05, 0), (x, half * 0.7)], shade(blade, 0.7), 0.025)
    elif kind == 2:
        pen.line([(-0.5, 0), (0.2, 0)], wood, 0.035)
        for place in rng.uniform((-0.25, -0.15), (0.25, 0.15), (rng.integers(2, 6), 2)):
            pen.dot(place, (0.07, 0.07), colour, shade(colour, 0.65))
    elif kind == 3:
        for angle in np.arange(5) * 2 * np.pi / 5:
            pen.dot((0.13 * np.cos(angle), 0.13 * np.sin(angle)), (0.1, 0.1), colour, shade(colour, 0.75))
        pen.dot((0, 0), (0.08, 0.08), other)
    elif kind == 4:
        pen.line([(-0.8, 0), (-0.1, 0.06), (0.7, rng.uniform(-0.3, 0.3))], wood, 0.05)
        pen.line([(-0.2, 0.05), (0.2, rng.choice((-0.35, 0.35)))], wood, 0.035)
    else:
        radii = rng.uniform((0.18, 0.14), (0.32, 0.22))
        pen.dot((0, 0), radii, colour, shade(colour, 0.65))
        if rng.random() < 0.6:
            pen.pattern(rng, PATTERNS[rng.integers(3)], (0, 0), 0.75 * radii, other)


def draw_bird(kind: Species, rng: Generator) -> Image.Image:
    """One RGB image of a bird of this species; everything else comes from `rng`.

    Its `info["box"]` has the bird's left, top, right and bottom, fractions of the image's sides.
    """
    size = int(rng.integers(WIDTHS[0], WIDTHS[1] + 1)), HEIGHT
    width, height = size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING
    canvas = _backdrop(rng, (size[0] // 2, HEIGHT // 2)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    unit = height * rng.uniform(0.36, 0.48)
    for at in rng.random((rng.integers(8, 18), 2)) * (width, height):
        _clutter(draw, rng, at, 0.8 * unit)

    body, head, box = perched(draw, kind, rng, unit, (width, height))
    bark = shade((104, 78, 58), rng.uniform(0.7, 1.3))
    if rng.random() < 0.7:
        (x, y), slope = body.pixels((0.05, 0.42)), rng.uniform(-0.3, 0.3)
        perch = [0, y - slope * x, x, y, width, y + slope * (width - x)]
        for tone, thickness in ((0.6, 0.11), (1, 0.075)):
            draw.line(perch, fill=shade(bark, tone), width=round(thickness * unit), joint="curve")
    for foot in (0, 0.1):
        body.line([(foot - 0.02, 0.22), (foot, 0.42)], shade(bark, 0.5), 0.03)
    draw_body(body, head, kind, np.random.default_rng(rng.integers(2**32)))  # so that marks alter nothing else

    # what is in front of the bird leaves most of it to see
    keep_off = np.concatenate([head.pixels([(0.5, 0)]), body.pixels([(0.1, 0), (-0.5, 0.05)])])
    for at in rng.random((rng.integers(2, 7), 2)) * (width, height):
        if (np.hypot(*(keep_off - at).T) > np.array([0.75, 0.5, 0.4]) * unit).all():
            _clutter(draw, rng, at, 0.8 * unit)
    if rng.random() < 0.5:
        canvas, box = ImageOps.mirror(canvas), [1 - box[2], box[1], 1 - box[0], box[3]]
    light = rng.uniform(0.75, 1.15) * (0.8 + 0.4 * _noise(rng, (4, 3), size))[..., None]
    pixels = np.asarray(canvas.reduce(SUPERSAMPLING)) * light * rng.uniform(0.9, 1.1, 3)
    picture = Image.fromarray((pixels + rng.normal(0, 3, (*size[::-1], 1))).clip(0, 255).astype(np.uint8))
    picture.info["box"] = box
    return picture


def splits_of(config: Config) -> Splits:
    """The images of a run, the drawn birds unless it names others. `UsageError` where its preset has to."""
    if config.data.root is None and config.preset != "synthetic":
        raise UsageError(f"preset {config.preset} needs --data.root, the folder of its images")
    return read_splits(config.data.root or write_synthetic())


def write_synthetic(
    root: Path | None = None, *, seed: int = 0, train_per_class: int = TRAIN, test_per_class: int = TEST
) -> Path:
    """Write the set as `root/{train,test}/<class>/<nnnn>.jpg`, with `BOXES`, unless it is there; return its folder.

    Image i of a class and split depends only on these three and the seed. A folder with the same file names
    is used as it is; any other that holds something raises `UsageError`.
    """
    name = f"synthetic-v{VERSION}-seed{seed}-{train_per_class}x{test_per_class}"  # all that the images depend on
    root = Path(root or cache_folder() / name)
    images = {
        Path(split, kind.name, f"{i:04d}.jpg"): (kind, [seed, s, c, i])
        for s, (split, count) in enumerate((("train", train_per_class), ("test", test_per_class)))
        for c, kind in enumerate(CLASSES)
        for i in range(count)
    }
    if {file.relative_to(root) for file in root.glob("*/*/*.jpg")} == {*images}:
        return root
    if root.exists() and any(root.iterdir()):
        raise UsageError(f"{root} is not a complete synthetic set: remove it or name another folder")
    with new_folder(root) as draft:
        lines = ["path,left,top,right,bottom"]
        for file, (kind, seeds) in progress(images.items(), "drawing the synthetic birds", len(images)):
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            picture = draw_bird(kind, np.random.default_rng(seeds))
            picture.save(draft / file, quality=90)
            lines.append(",".join([file.as_posix(), *(f"{side:.4f}" for side in picture.info.get("box", ()))]))
        (draft / BOXES).write_text("\n".join(lines) + "\n")
    return root
