"""Does the attention lie on the object, its box or its parts? Compared with maps that ignore the image."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcr.data.crops import centres_of, in_crop
from fastcr.data.images import ImageList
from fastcr.data.text_lists import read_text
from fastcr.errors import UsageError

CUB_BOXES, CUB_PARTS = "bounding_boxes.txt", "parts/part_locs.txt"
SLACK = 1.05  # fractions above it are none: a box may be drawn a little beyond the image
MOST_PARTS = 1000  # CUB has 15; a broken table may name the billionth
COLUMNS = ["path", "left", "top", "right", "bottom"]


class Localisation(NamedTuple):
    """Scores of one kind of map, percent."""

    inside: float  # share of the attention inside the box
    pointing: float  # images whose most attended position lies inside the box
    parts: float | None  # images whose most attended position lies within a cell's width of a part that is seen
    image_count: int


class Objects(NamedTuple):
    """Where the object of each image lies; NaN where it is not known."""

    boxes: Tensor  # [N,4] left, top, right, bottom
    parts: Tensor | None  # [N,P,2] x, y of its parts; NaN where one is not seen
    in_pixels: bool  # else: fractions of width and height


def read_objects(source: Path | None, images: ImageList) -> Objects | None:
    """Boxes of `images` from a CSV, or boxes and parts from the tables of the CUB-200-2011 archive.

    `source` is a CSV with the columns path, left, top, right, bottom, in fractions of width and height, or in pixels;
    its paths are those of the list's files, or these below the folder of their split (`test/<class>/a.jpg`). Or it is
    the archive's folder. None: that of `images`, if they are the archive's; else nothing is known.
    Raises `UsageError` for anything else, for boxes that are none, or if no image has a box.
    """
    if source is None:
        return _cub_objects(images.root.parent, images) if (images.root.parent / CUB_BOXES).is_file() else None
    folder = source.parent if source.name == CUB_BOXES else source
    return _cub_objects(folder, images) if folder.is_dir() else _csv_objects(source, images)


def _csv_objects(source: Path, images: ImageList) -> Objects:
    try:
        text = read_text(source)
        separator = max(",;\t", key=text.partition("\n")[0].count)
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
        if not set(COLUMNS) <= set(table.fieldnames):
            found = ", ".join(table.fieldnames)
            raise UsageError(f"{source} must have the columns {', '.join(COLUMNS)}; found: {found[:100] or 'nothing'}")
        # where commas do not separate, they may be those of decimals
        rows = [(_plain(row["path"]), [float(row[name].replace(",", ".")) for name in COLUMNS[1:]]) for row in table]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(f"{source} holds no boxes: {error}") from None
    boxes = dict(rows)
    if len(boxes) < len(rows):
        twice, _ = Counter(path for path, _ in rows).most_common(1)[0]
        raise UsageError(f"{source} has more than one box for {len(rows) - len(boxes)} images, e.g. {twice!r}")
    split = images.root.name
    names = [_plain(name) for name in images.files]
    found_boxes = [boxes.get(f"{split}/{name}") or boxes.get(name) or [math.nan] * 4 for name in names]
    known = _known(torch.tensor(found_boxes, dtype=torch.float64), source, images)
    return Objects(known, None, _in_pixels(known, source))


def _plain(path: str) -> str:
    """A path as it is compared: Windows' separators turned, and no `./` before it."""
    return path.strip().replace("\\", "/").removeprefix("./")


def _in_pixels(boxes: Tensor, source: Path) -> bool:
    """Whether boxes `[N,4]` are in pixels, not in fractions. `UsageError` where they are neither."""
    known = boxes[~boxes.isnan().any(1)]
    if bad := ((known[:, 2] <= known[:, 0]) | (known[:, 3] <= known[:, 1]) | known.isinf().any(1)).nonzero().tolist():
        box = " ".join(f"{value:g}" for value in known[bad[0][0]].tolist())
        raise UsageError(f"{source}: in {len(bad)} boxes left is not below right, or top not below bottom, e.g. {box}")
    beyond = (known > SLACK).any(1)
    if beyond.any() and not beyond.all():
        raise UsageError(
            f"{source}: {int(beyond.sum())} of {len(known)} boxes reach beyond 1, the others do not: "
            "write all in fractions of width and height, or all in pixels"
        )
    return bool(beyond.any())


def _cub_objects(folder: Path, images: ImageList) -> Objects:
    """Boxes and parts as the archive's tables give them: `bounding_boxes.txt`, `parts/part_locs.txt`, in pixels."""
    try:
        lines = (line.split(None, 1) for line in read_text(folder / "images.txt").splitlines() if line.strip())
        files = {_plain(name): id_ for id_, name in lines}
        rows = _numbers(folder / CUB_BOXES)
        boxes = {int(row[0]): [row[1], row[2], row[1] + row[3], row[2] + row[4]] for row in rows}
        ids = [int(files.get(name, -1)) for name in images.files]
        found = torch.tensor([boxes.get(id_, [math.nan] * 4) for id_ in ids], dtype=torch.float64)
        parts = None
        if (folder / CUB_PARTS).is_file():
            rows = _numbers(folder / CUB_PARTS)
            if not np.isin(rows[:, 1], np.arange(1, MOST_PARTS + 1)).all():
                raise ValueError(f"parts are numbered from 1 to at most {MOST_PARTS}")
            parts = torch.full((len(ids), int(rows[:, 1].max()), 2), math.nan, dtype=torch.float64)
            row_of = {id_: row for row, id_ in enumerate(ids)}
            for id_, part, x, y, seen in rows:
                if seen and int(id_) in row_of:
                    parts[row_of[int(id_)], int(part) - 1] = torch.tensor([x, y], dtype=torch.float64)
    except (OSError, ValueError, IndexError, OverflowError) as error:
        raise UsageError(f"{folder} does not hold CUB's tables of boxes and parts: {error}") from None
    known = _known(found, folder, images)
    in_pixels = _in_pixels(known, folder / CUB_BOXES)
    if parts is not None and in_pixels != bool((parts > SLACK).any()):
        raise UsageError(f"{folder}: of boxes and parts, one is in pixels and one in fractions of width and height")
    return Objects(known, parts, in_pixels)


def _numbers(file: Path) -> np.ndarray:
    return np.loadtxt(read_text(file).splitlines(), ndmin=2)


def _known(boxes: Tensor, source: Path, images: ImageList) -> Tensor:
    if boxes.isnan().all():
        raise UsageError(f"{source} has a box for none of the images, e.g. not for {images.files[0]!r}")
    return boxes


def objects_in_crop(objects: Objects, sizes: Tensor, image_size: int) -> Objects:
    """Objects as fractions of the square that evaluation cuts; boxes are clipped to it. As `in_crop`.

    `UsageError` for boxes in pixels of which most reach beyond their images: they are of images of other sizes.
    """
    unit = sizes.double().flip(1)[:, None] if objects.in_pixels else torch.ones(1, 1, 2, dtype=torch.float64)
    reach = (objects.boxes[:, 2:] / unit[:, 0]).amax(1)
    if objects.in_pixels and (reach[~reach.isnan()] > SLACK).double().mean() > 0.1:
        raise UsageError(
            f"boxes in pixels reach to {reach.nan_to_num(0).max():.1f} times the size of their images: they are of "
            "images of other sizes (fractions of width and height fit any size)"
        )
    boxes = in_crop(objects.boxes.view(-1, 2, 2) / unit, sizes, image_size).clamp(0, 1).view(-1, 4)
    parts = None if objects.parts is None else in_crop(objects.parts / unit, sizes, image_size)
    return Objects(boxes, parts, False)


def covered(boxes: Tensor, side: int) -> Tensor:
    """Share `[N,side*side]` of each cell of a map that a box `[N,4]` of the crop covers."""
    edges = torch.arange(side, dtype=boxes.dtype) / side
    along = []
    for low, high in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        overlap = torch.minimum(high[:, None], edges + 1 / side) - torch.maximum(low[:, None], edges)
        along.append(overlap.clamp_min(0) * side)
    x, y = along
    return (y[:, :, None] * x[:, None, :]).flatten(1)


def localisation(attention: Tensor, objects: Objects) -> dict[str, Localisation]:
    """Scores of maps `[N,S]` (S square) on objects given in fractions of the crop, and of three maps for comparison.

    None of the three looks at the image. "average": the average of all the maps; what a map scores above it was found
    in its own image. "gaussian": centred and round, with the entropy of each image's own map; it points at the centre.
    "uniform": the same at every position; any position counts as its most attended.
    Images without a box are left out.
    """
    known = ~objects.boxes.isnan().any(1)
    attention, boxes = attention[known].double(), objects.boxes[known]
    attention = attention / attention.sum(1, keepdim=True)  # the released branch's do not sum to 1
    side = math.isqrt(attention.shape[1])
    average = attention.mean(0, keepdim=True)
    maps = {
        "attention": attention,
        "average": average.expand_as(attention),
        "gaussian": gaussian_of_entropy(_entropy(attention), side),
        "uniform": torch.full_like(attention, 1 / attention.shape[1]),
    }
    centres = centres_of(side, side)
    peaks = {  # [N or 1,P,2], any of P
        "attention": centres[attention.argmax(1)][:, None],
        "average": centres[average.argmax(1)][:, None],
        "gaussian": torch.full((1, 1, 2), 0.5, dtype=torch.float64),
        "uniform": centres[None],
    }
    cells, scores = covered(boxes, side), {}
    for name, weights in maps.items():
        inside = (weights * cells).sum(1).mean().item()
        pointing = _inside(peaks[name], boxes).double().mean().item()
        near = None
        if objects.parts is not None:
            parts = objects.parts[known]
            seen = ~parts.isnan().all(2).all(1)
            near = 100 * _near(peaks[name], parts, 1 / side)[seen].double().mean().item() if seen.any() else None
        scores[name] = Localisation(100 * inside, 100 * pointing, near, len(boxes))
    return scores


def gaussian_of_entropy(entropy: Tensor, side: int) -> Tensor:
    """Centred Gaussian maps `[N,side*side]` of the given entropies `[N]`, nats; found by bisection of log sigma."""
    distance = (centres_of(side, side) - 0.5).square().sum(1)
    low = torch.full_like(entropy, math.log(1e-3))
    high = torch.full_like(entropy, math.log(1e3))
    for _ in range(60):
        middle = (low + high) / 2
        too_narrow = _entropy(_gaussian(middle, distance)) < entropy
        low, high = torch.where(too_narrow, middle, low), torch.where(too_narrow, high, middle)
    return _gaussian((low + high) / 2, distance)


def _gaussian(log_sigma: Tensor, distance: Tensor) -> Tensor:
    return torch.softmax(-distance / (2 * (2 * log_sigma).exp()[:, None]), dim=1)


def _entropy(maps: Tensor) -> Tensor:
    return -torch.xlogy(maps, maps).sum(1)


def _near(points: Tensor, parts: Tensor, reach: float) -> Tensor:
    """Whether points `[N or 1,P,2]` lie within `reach` of one of the parts `[N,Q,2]` of their image: `[N,P]`."""
    points = points.expand(len(parts), -1, -1)
    distance = (points[:, :, None] - parts[:, None]).square().sum(3).sqrt()
    return (distance <= reach).any(2)  # False where a part is NaN


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points `[N or 1,P,2]` lie in boxes `[N,4]`: `[N,P]`."""
    return ((points >= boxes[:, None, :2]) & (points <= boxes[:, None, 2:])).all(2)
