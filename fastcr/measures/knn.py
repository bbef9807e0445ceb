"""Weighted k-nearest-neighbour classification, as in instance discrimination (Wu et al., arXiv 1805.01978)."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 128 << 20  # of similarities held at once


def knn(
    train: Tensor, labels: Tensor, queries: Tensor, classes: int, *, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """Class scores `[Q,classes]`: for each query, `sum of exp(cosine / temperature)` of its k nearest, by class.

    `train` `[N,C]` with `labels` `[N]` and `queries` `[Q,C]` are unit vectors on one device; k is at most N. The
    scores of a query carry a common factor.
    """
    k, labels = min(k, len(train)), labels.to(train.device)
    chunk = max(CHUNK_BYTES // (4 * max(len(train), 1)), 1)
    scores = torch.zeros(len(queries), classes, device=train.device)
    for part, votes in zip(queries.split(chunk), scores.split(chunk), strict=True):
        similarity, nearest = (part @ train.T).topk(k, dim=1)
        # less the largest, so that a low temperature does not overflow
        votes.scatter_add_(1, labels[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
    return scores


def accuracy(scores: Tensor, labels: Tensor, within: int = 1) -> float:
    """Share of rows `[N,classes]` whose label `[N]` is among the `within` highest scores, percent."""
    found = scores.topk(min(within, scores.shape[1]), dim=1).indices.cpu() == labels.cpu()[:, None]
    return 100 * found.any(1).double().mean().item()
