"""Which embeddings of a set are near copies of each other, how alone each one is, and which groups they form.

Embeddings `[N,C]` are fp32 and of unit length; similar is meant by the cosine. Some rows at
a time are compared with the others: nothing of size `[N,N]` is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # compared with all others at once
ROUNDS = 10  # of the search for groups
Show = Callable[[Sequence[int]], Iterable[int]]  # hands on its items, with a bar


def copies(vectors: Tensor, threshold: float, show: Show = iter) -> list[list[int]]:
    """Groups of two or more rows that are connected by pairs at least so similar, the largest group first."""
    root = torch.arange(len(vectors), device=vectors.device)  # the smallest row known to be in an embedding's group
    for first in show(range(0, len(vectors), ROWS)):
        rows = vectors[first : first + ROWS]
        left, right = (rows @ vectors[: first + ROWS].T >= threshold).nonzero().unbind(1)
        left = left + first
        while bool((root[left] != root[right]).any()):
            ends = root[left], root[right]
            root.scatter_reduce_(0, torch.maximum(*ends), torch.minimum(*ends), "amin")
            while not torch.equal(root, further := root[root]):
                root = further
    order = root.argsort(stable=True)
    groups = order.cpu().split(root[order].unique_consecutive(return_counts=True)[1].tolist())
    return sorted((group.tolist() for group in groups if len(group) > 1), key=len, reverse=True)


def nearest_other(vectors: Tensor, show: Show = iter) -> tuple[Tensor, Tensor]:
    """Similarity `[N]` to the most similar other one, and its row `[N]`; of two or more embeddings."""
    best, at = vectors[:, 0].clone(), torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    for first in show(range(0, len(vectors), ROWS)):
        similar = vectors[first : first + ROWS] @ vectors.T
        similar[:, first:].fill_diagonal_(-2)
        best[first : first + ROWS], at[first : first + ROWS] = similar.max(1)
    return best, at


def groups(vectors: Tensor, count: int) -> list[list[int]]:
    """Up to `count` groups of rows, by spherical k-means, the largest first; in each the most typical row first."""
    centres = vectors[torch.linspace(0, len(vectors) - 1, min(count, len(vectors))).long()]
    for _ in range(ROUNDS):
        found = [(part @ centres.T).max(1) for part in vectors.split(ROWS)]
        similar, which = (torch.cat(column) for column in zip(*found, strict=True))
        sums = torch.zeros_like(centres).index_add_(0, which, vectors)
        centres = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), centres)
    order = similar.argsort(descending=True)
    members = [order[which[order] == group].tolist() for group in range(len(centres))]
    return sorted(filter(None, members), key=len, reverse=True)
