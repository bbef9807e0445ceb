"""Does the attention lie on the object's box? It stands beside maps that do not look at the image."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.special import entr

from fastcr.data.archives import read_text
from fastcr.data.crops import centres_of, in_crop
from fastcr.data.images import ImageList, composed
from fastcr.errors import UsageError

SLACK = 1.05  # fractions above it are none: a box may be drawn a little beyond the image


def read_objects(source: Path, images: ImageList) -> Tensor:
    """Boxes `[N,4]` of `images`, left, top, right, bottom, from a CSV with the columns path and these.

    They are in fractions of width and height, or in pixels; paths are those of the list's files, or these below the
    folder of their split (`test/<class>/a.jpg`). A box that is not known is NaN.
    Raises `UsageError` for anything else, for boxes that are none, or if no image has a box.
    """
    try:
        table = [*csv.DictReader(io.StringIO(read_text(source), newline=""), skipinitialspace=True)]
        boxes = {
            _plain(row["path"]): [float(row[side]) for side in ("left", "top", "right", "bottom")] for row in table
        }
        if len(boxes) < len(table):
            raise ValueError(f"it has {len(table)} for {len(boxes)} images, where each image can have one")
        names = [_plain(name) for name in images.files]
        found = [boxes.get(f"{images.root.name}/{name}") or boxes.get(name) or [math.nan] * 4 for name in names]
        known = torch.tensor(found, dtype=torch.float64)
        if known.isnan().all():
            raise ValueError(f"there is one for none of the images, e.g. not for {images.files[0]!r}")
        if wrong := [box for box in found if not (box[0] < box[2] and box[1] < box[3]) and box[0] == box[0]]:
            raise ValueError(f"left is not below right, or top not below bottom, in {wrong[0]}")
        beyond = (known[~known.isnan().any(1)] > SLACK).any(1)
        if beyond.any() and not beyond.all():
            raise ValueError(f"{int(beyond.sum())} of {len(beyond)} are in pixels, the others in fractions")
    except KeyError as error:
        raise UsageError(f"{source} holds no boxes: there is no {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(f"{source} holds no boxes: {error}") from None
    return known


def _plain(path: str) -> str:
    """A path as it is compared: Windows' separators turned, accents composed, and no `./` before it."""
    return composed(path.strip().replace("\\", "/").removeprefix("./"))


def objects_in_crop(boxes: Tensor, sizes: Tensor, image_size: int) -> Tensor:
    """Boxes `[N,4]` as fractions of the square that evaluation cuts, clipped to it. As `in_crop`.

    `UsageError` for boxes in pixels of which most reach beyond their images: they are of images of other sizes.
    """
    in_pixels = bool((boxes > SLACK).any())
    unit = sizes.double().flip(1)[:, None] if in_pixels else torch.ones(1, 1, 2, dtype=torch.float64)
    reach = (boxes[:, 2:] / unit[:, 0]).amax(1)
    if in_pixels and (reach[~reach.isnan()] > SLACK).double().mean() > 0.1:
        raise UsageError(
            f"boxes in pixels reach to {reach.nan_to_num(0).max():.1f} times the size of their images: they are of "
            "images of other sizes (fractions of width and height fit any size)"
        )
    return in_crop(boxes.view(-1, 2, 2) / unit, sizes, image_size).clamp(0, 1).view(-1, 4)


def covered(boxes: Tensor, side: int) -> Tensor:
    """Share `[N,side*side]` of each cell of a map that a box `[N,4]` of the crop covers."""
    edges = torch.arange(side, dtype=boxes.dtype) / side
    overlap = torch.minimum(boxes[:, 2:, None], edges + 1 / side) - torch.maximum(boxes[:, :2, None], edges)
    x, y = (overlap.clamp_min(0) * side).unbind(1)
    return (y[:, :, None] * x[:, None, :]).flatten(1)


def localisation(attention: Tensor, boxes: Tensor) -> dict[str, dict[str, float]]:
    """Scores of maps `[N,S]` (S square) on boxes `[N,4]` in fractions of the crop, and of three maps for comparison.

    By the name of each map: "inside", the share of it inside the box, and "pointing", images whose most attended
    position lies inside the box; percent.

    None of the three looks at the image. "average": the average of all the maps; what a map scores above it was found
    in its own image. "gaussian": centred and round, with the entropy of each image's own map; it points at the centre.
    "uniform": the same at every position; any position counts as its most attended.
    Images without a box are left out.
    """
    known = ~boxes.isnan().any(1)
    boxes, attention = boxes[known], attention[known].double()
    attention = attention / attention.sum(1, keepdim=True)  # a released checkpoint's do not sum to 1
    side = math.isqrt(attention.shape[1])
    average, centres = attention.mean(0, keepdim=True), centres_of(side, side)
    middle = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    shown = {  # each map [N,S], and its peaks [N or 1,P,2]: any of P
        "attention": (attention, centres[attention.argmax(1)][:, None]),
        "average": (average.expand_as(attention), centres[average.argmax(1)][:, None]),
        "gaussian": (gaussian_of_entropy(entr(attention).sum(1), side), middle),
        "uniform": (torch.full_like(attention, 1 / attention.shape[1]), centres[None]),
    }
    cells, scores = covered(boxes, side), {}
    for name, (weights, peaks) in shown.items():
        inside = (weights * cells).sum(1).mean()
        pointing = ((peaks >= boxes[:, None, :2]) & (peaks <= boxes[:, None, 2:])).all(2).double().mean()
        scores[name] = {"inside": 100 * inside.item(), "pointing": 100 * pointing.item()}
    return scores


def gaussian_of_entropy(entropy: Tensor, side: int) -> Tensor:
    """Centred Gaussian maps `[N,side*side]` of the given entropies `[N]`, nats; found by bisection of log sigma."""
    distance = (centres_of(side, side) - 0.5).square().sum(1)
    low, high = (torch.full_like(entropy, math.log(sigma)) for sigma in (1e-3, 1e3))
    for _ in range(60):
        middle = (low + high) / 2
        too_narrow = entr(_gaussian(middle, distance)).sum(1) < entropy
        low, high = torch.where(too_narrow, middle, low), torch.where(too_narrow, high, middle)
    return _gaussian((low + high) / 2, distance)


def _gaussian(log_sigma: Tensor, distance: Tensor) -> Tensor:
    return torch.softmax(-distance / (2 * (2 * log_sigma).exp()[:, None]), dim=1)
