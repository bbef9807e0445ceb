"""Which embeddings of a set are near copies of each other, how alone each one is, and which groups they form.

Embeddings `[N,C]` are fp32 and of unit length; similar is meant by the cosine. Each pair is looked at once, in tiles:
nothing of size `[N,N]` is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 2048  # rows and columns of a tile
ROUNDS = 10  # of the search for groups
Show = Callable[[Sequence[tuple[int, int]]], Iterable[tuple[int, int]]]  # hands on its items, with a bar


def _tiles(vectors: Tensor, show: Show) -> Iterator[tuple[int, int, Tensor]]:
    """Every pair's similarity, once (but twice in the tiles of rows with themselves): first row, first column, tile."""
    starts = range(0, len(vectors), SIDE)
    for row, column in show([(row, column) for row in starts for column in starts if row <= column]):
        tile = vectors[row : row + SIDE] @ vectors[column : column + SIDE].T
        yield row, column, tile.fill_diagonal_(-1) if row == column else tile


def copies(vectors: Tensor, threshold: float, show: Show = iter) -> list[list[int]]:
    """Groups of two or more rows that are connected by pairs at least so similar, the largest group first."""
    root = torch.arange(len(vectors), device=vectors.device)  # the smallest row known to be in an embedding's group
    for row, column, tile in _tiles(vectors, show):
        left, right = (tile >= threshold).nonzero().unbind(1)
        left, right = left + row, right + column
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
    best, at = torch.full_like(vectors[:, 0], -2), torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    for row, column, tile in _tiles(vectors, show):
        for mine, others, similar in ((row, column, tile), (column, row, tile.T))[: 1 + (row != column)]:
            values, places = similar.max(1)
            here = slice(mine, mine + SIDE)
            better = values > best[here]
            best[here] = torch.where(better, values, best[here])
            at[here] = torch.where(better, places + others, at[here])
    return best, at


def groups(vectors: Tensor, count: int) -> list[list[int]]:
    """Up to `count` groups of rows, by spherical k-means, the largest first; in each the most typical row first."""
    centres = vectors[torch.linspace(0, len(vectors) - 1, min(count, len(vectors))).long()]
    for _ in range(ROUNDS):
        found = [(part @ centres.T).max(1) for part in vectors.split(SIDE)]
        similar, which = (torch.cat(column) for column in zip(*found, strict=True))
        sums = torch.zeros_like(centres).index_add_(0, which, vectors)
        centres = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), centres)
    order = similar.argsort(descending=True)
    members = [order[which[order] == group].tolist() for group in range(len(centres))]
    return sorted(filter(None, members), key=len, reverse=True)
