"""Deep descriptor transformation (Wei et al. 2017, arXiv 1705.02758): where objects are, without labels or training.

The features of all positions of all images have one direction of largest variance. On images of one kind of object it
tells the object from the surroundings, and an image's positions are weighted with their projection on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.data.crop_loader import in_batches, load_crops
from fastcr.data.images import ImageList
from fastcr.encoders.encoder import Encoder
from fastcr.runs.context import Context

AXIS_IMAGES = 2048  # whose positions DDT's axis is of: far more than it takes


class Axis(NamedTuple):
    """The direction, and the point from which positions are projected on it."""

    direction: Tensor  # [C], unit length
    centre: Tensor  # [C]: mean of all positions' features of unit length

    def scores(self, features: Tensor) -> Tensor:
        """Features `[B,C,h,w]` to the projection of each position `[B,h,w]` in fp32; above 0 speaks for the object."""
        unit = F.normalize(features.float(), dim=1)
        return torch.einsum("bchw,c->bhw", unit, self.direction) - self.centre @ self.direction

    def attention(self, features: Tensor) -> Tensor:
        """Features `[B,C,h,w]` to weights `[B,h,w]` that sum to 1: positive scores; uniform where there are none."""
        weights = self.scores(features).clamp(min=0).flatten(1)
        total = weights.sum(1, keepdim=True)
        uniform = torch.full_like(weights, 1 / weights.shape[1])
        return torch.where(total > 0, weights / total.clamp(min=1e-30), uniform).view(-1, *features.shape[2:])


class Moments:
    """Mean and covariance of the positions of many images, taken in a batch at a time; sums are fp64."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.inside, self.border = torch.zeros(2, channels + 1, dtype=torch.float64, device=device)
        self.products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Take in a batch of features `[B,C,h,w]`."""
        unit = F.normalize(features.float(), dim=1).double()
        at_border = torch.ones(features.shape[2:], dtype=torch.bool, device=features.device)
        at_border[1:-1, 1:-1] = False
        for total, where in ((self.inside, ~at_border), (self.border, at_border)):
            positions = unit[:, :, where]
            total[:-1] += positions.sum((0, 2))
            total[-1] += positions.shape[0] * positions.shape[2]
        every = unit.flatten(2).transpose(1, 2).flatten(0, 1)
        self.products += every.T @ every

    def axis(self) -> Axis:
        """First principal component of the positions, in the direction in which the border scores lower than the rest.

        Maps without an inside (up to two positions high or wide) keep whatever direction comes out.
        """
        total = self.inside + self.border
        centre = total[:-1] / total[-1].clamp(min=1)
        covariance = self.products / total[-1].clamp(min=1) - centre.outer(centre)
        direction = torch.linalg.eigh(covariance).eigenvectors[:, -1]
        inside, border = (each[:-1] / each[-1].clamp(min=1) for each in (self.inside, self.border))
        if (inside - border) @ direction < 0:
            direction = -direction
        return Axis(direction.float(), centre.float())


FIT_STEPS, FIT_RATE, FIT_BATCH = 200, 0.1, 128
NOISE = 0.1  # length of what tells the detectors apart, in lengths of what they share


def detectors_like(axis: Axis, features: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Detectors `weight [count,C]`, `bias [count]` whose softmax, at temperature 1, pools nearly as DDT does.

    They see features `[N,C,h,w]` as they are, not at unit length. One detector is fitted, and each gets noise of its
    own; the biases give all of them scores of mean 0 over the sample. The result depends on nothing but the arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = features.float().flatten(2).transpose(1, 2)
    detector = fit_detector(maps, axis.attention(features).flatten(1), axis.direction, generator)
    noise = torch.randn(count, len(detector), generator=generator) / len(detector) ** 0.5
    weight = detector + NOISE * detector.norm() * noise
    return weight, -(weight @ maps.mean((0, 1)))


@torch.enable_grad()
def fit_detector(maps: Tensor, wanted: Tensor, direction: Tensor, generator: torch.Generator) -> Tensor:
    """A detector `[C]`: softmax over positions of features `[N,S,C]` that pools as the weights `wanted [N,S]` do.

    From `direction [C]`, at the scale at which the logits have a standard deviation of 1, Adam brings the products of
    all pairs of pooled embeddings close to the wanted ones. Fitting the maps instead, by their divergence, cost
    retrieval with the features of a ResNet-18.
    """
    deviation = (maps @ direction).std(correction=0)
    scale = torch.where(deviation > 1e-30, 1 / deviation, 1.0)  # nothing, or a single position, has none
    unit = direction.clone().requires_grad_()
    rate = FIT_RATE / len(direction) ** 0.5
    optimizer = torch.optim.Adam([unit], lr=rate)
    for step in range(FIT_STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / FIT_STEPS)
        batch = torch.randint(len(maps), (FIT_BATCH,), generator=generator)
        seen = maps[batch]
        loss = pair_error((seen @ (scale * unit)).softmax(1), wanted[batch], seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scale * unit.detach()


def pair_error(weights: Tensor, wanted: Tensor, maps: Tensor) -> Tensor:
    """Squared error of the products of all pairs of embeddings, in units of the squares of the wanted ones.

    Embeddings are features `maps [N,S,C]` pooled with weights `[N,S]`, at unit length; a scalar.
    """

    def products(each: Tensor) -> Tensor:
        pooled = F.normalize(torch.einsum("ns,nsc->nc", each, maps), dim=1)
        pooled = pooled - pooled.mean(0)
        return pooled @ pooled.T

    goal = products(wanted)
    return (products(weights) - goal).square().sum() / goal.square().sum().clamp(min=1e-30)


def features_of(
    encoder: Encoder,
    images: ImageList,
    batches: Sequence[list[int]],
    context: Context,
    title: str,
    load: Callable[..., Iterator[Any]] = load_crops,
    image_size: int | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """The readable images of each batch, and their features on the context's device; by default in the usual size."""
    crops = load([images], batches, image_size or encoder.image_size, context)
    shown = context.progress(crops, title, len(batches))
    for batch, (pixels, _, readable) in zip(batches, shown, strict=True):
        if readable:
            yield [batch[place] for place in readable], encoder.of_crops(pixels.to(context.device), context.dtype)[0]


@torch.inference_mode()
def ddt_axis(
    encoder: Encoder,
    images: ImageList,
    context: Context,
    load: Callable[..., Iterator[Any]] = load_crops,
) -> Axis:
    """DDT's axis of an encoder's features of `images`, or of `AXIS_IMAGES` of them taken evenly."""
    processes, moments = context.processes, None
    own = in_batches(evenly(len(images), AXIS_IMAGES))[processes.rank :: processes.ranks]
    with encoder.evaluating():
        for _, features in features_of(encoder, images, own, context, "axis of DDT", load):
            moments = moments or Moments(features.shape[1], context.device)
            moments.add(features)
    if not (channels := processes.most(len(moments.products) if moments else 0)[0]):
        raise images.none_readable()
    moments = moments or Moments(channels, context.device)
    for name in ("inside", "border", "products"):
        setattr(moments, name, processes.total(getattr(moments, name)))
    return moments.axis()


def evenly(count: int, most: int) -> list[int]:
    """The indices of all of `count` images, or of `most` taken evenly."""
    taken = min(count, most)
    return (torch.arange(taken) * count // max(taken, 1)).tolist()
