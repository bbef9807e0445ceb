"""What an objective takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Keys(NamedTuple):
    """Unit keys that a batch of queries is compared with; none carries a gradient."""

    own: Tensor  # [B,D]: of the queries' own images
    batch: Tensor  # [B*ranks,D]: of all processes' images, those of `own` among them
    queue: Tensor  # [N,D], N 0 for none
    first: int = 0  # where `own` begins in `batch`
    images: Tensor | None = None  # [B]: indices of the queries' images, int64; None if not known
    queue_images: Tensor | None = None  # [N]: those of the queue's keys, None like `images`


class Compared(NamedTuple):
    """What an objective makes of queries and keys."""

    loss: Tensor  # [B], carries the gradient
    positive: Tensor  # [B,D], constant: what GradCAM's similarity is the similarity to


Objective = Callable[[Tensor, Keys], Compared]  # unit queries [B,D], and the keys
