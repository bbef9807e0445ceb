"""Does the attention lie on the object? Share inside its box, and the pointing game, beside maps that know nothing."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcr.config import UsageError
from fastcr.folders import ImageList

COLUMNS = ["path", "left", "top", "right", "bottom"]


class Localisation(NamedTuple):
    """Scores of one kind of map, percent."""

    inside: float  # share of the attention inside the box
    pointing: float  # images whose most attended place lies inside the box
    image_count: int


def read_boxes(source: Path, images: ImageList) -> Tensor:
    """Boxes `[N,4]` (left, top, right, bottom) of `images` as fractions of width and height; NaN where there is none.

    `source` is a CSV with the columns path, left, top, right, bottom. Paths are those of the list's files, or end
    in them (as `test/<class>/a.jpg` where the list holds `<class>/a.jpg`).
    Raises `UsageError` for another file, or if it has a box for none of the images.
    """
    try:
        with source.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if table.fieldnames is None or not set(COLUMNS) <= set(table.fieldnames):
                raise UsageError(f"{source} must have the columns {', '.join(COLUMNS)}")
            boxes = {row["path"]: [float(row[name]) for name in COLUMNS[1:]] for row in table}
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UsageError(f"{source} holds no boxes: {error}") from None
    split = images.root.name  # <class>/a.jpg of the folder test is test/<class>/a.jpg of the data set
    found = [boxes.get(f"{split}/{name}") or boxes.get(name) or [math.nan] * 4 for name in images.files]
    table_of_boxes = torch.tensor(found, dtype=torch.float64)
    if table_of_boxes.isnan().all():
        raise UsageError(f"{source} has a box for none of the images, e.g. not for {images.files[0]!r}")
    return table_of_boxes


def boxes_in_crop(boxes: Tensor, sizes: Tensor, image_size: int) -> Tensor:
    """Boxes `[N,4]`, fractions of the image, as fractions of the square that evaluation cuts, clipped to it.

    `sizes` `[N,2]` are (height, width) in pixels. Evaluation resizes the shorter side to `round(image_size*8/7)`, then
    cuts the central square.
    """
    short = round(image_size * 8 / 7)
    height, width = sizes.double().unbind(1)
    # torchvision's rounding: the longer side down to a whole pixel, the crop's corner to the nearest
    scale = short / torch.minimum(height, width)
    resized = torch.stack([(width * scale + 1e-9).floor(), (height * scale + 1e-9).floor()], 1)
    corner = torch.from_numpy(np.round((resized - image_size).numpy() / 2))
    moved = boxes.view(-1, 2, 2) * resized[:, None] - corner[:, None]
    return (moved / image_size).clamp(0, 1).view(-1, 4)


def covered(boxes: Tensor, side: int) -> Tensor:
    """Share `[N,side*side]` of each cell of a map that a box `[N,4]` of the crop covers."""
    edges = torch.arange(side, dtype=boxes.dtype) / side
    along = []
    for low, high in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        overlap = torch.minimum(high[:, None], edges + 1 / side) - torch.maximum(low[:, None], edges)
        along.append(overlap.clamp_min(0) * side)
    x, y = along
    return (y[:, :, None] * x[:, None, :]).flatten(1)


def localisation(attention: Tensor, boxes: Tensor) -> dict[str, Localisation]:
    """Scores of maps `[N,S]` (S square) on boxes `[N,4]` of the crop, beside two maps that do not look.

    "uniform": the same everywhere; its pointing is the chance of a random place. "gaussian": centred, round, as wide as
    gives each image's own entropy; it points at the centre. Images without a box (NaN) are left out.
    """
    known = ~boxes.isnan().any(1)
    attention, boxes = attention[known].double(), boxes[known].double()
    attention = attention / attention.sum(1, keepdim=True)  # the released branch's do not sum to 1
    side = math.isqrt(attention.shape[1])
    cells = covered(boxes, side)
    centres = _centres(side)
    uniform = torch.full_like(attention, 1 / attention.shape[1])
    centre = torch.full((len(boxes), 2), 0.5, dtype=torch.float64)
    at_random = _inside(centres[None], boxes).double().mean(1)
    hits = {
        "attention": _inside(centres[attention.argmax(1)][:, None], boxes)[:, 0].double(),
        "gaussian": _inside(centre[:, None], boxes)[:, 0].double(),
        "uniform": at_random,
    }
    maps = {"attention": attention, "gaussian": gaussian_of_entropy(_entropy(attention), side), "uniform": uniform}
    return {
        name: Localisation(
            100 * (maps[name] * cells).sum(1).mean().item(), 100 * hits[name].mean().item(), len(attention)
        )
        for name in maps
    }


def gaussian_of_entropy(entropy: Tensor, side: int) -> Tensor:
    """Centred Gaussian maps `[N,side*side]` of the given entropies `[N]`, nats; found by bisection of log sigma."""
    distance = (_centres(side) - 0.5).square().sum(1)
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


def _centres(side: int) -> Tensor:
    """(x, y) `[side*side,2]` of the cells of a map, row by row, as fractions."""
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points `[N or 1,P,2]` lie in boxes `[N,4]`: `[N,P]`."""
    return ((points >= boxes[:, None, :2]) & (points <= boxes[:, None, 2:])).all(2)
