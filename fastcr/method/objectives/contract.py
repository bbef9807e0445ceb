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
    mine: Tensor | None = None  # [B,N]: which of the queue are earlier keys of a query's own image; None if not known

    def others(self, similarities: Tensor) -> Tensor:
        """Similarities `[B,N]` to the queue, those to keys of the own image so low that they do not count."""
        return similarities if self.mine is None else similarities.masked_fill(self.mine, -1e9)


class Compared(NamedTuple):
    """What an objective makes of queries and keys."""

    loss: Tensor  # [B], carries the gradient
    positive: Tensor  # [B,D], constant: what GradCAM's similarity is the similarity to


Objective = Callable[[Tensor, Keys], Compared]  # unit queries [B,D], and the keys
