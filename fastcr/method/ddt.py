"""Deep descriptor transformation (Wei et al. 2017, arXiv 1705.02758): where objects are, without labels or training.

The features of all positions of all images have one direction of largest variance. On images of one kind of object it
tells the object from the surroundings, and an image's positions are weighted with their projection on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
