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


def top1(scores: Tensor, labels: Tensor) -> float:
    """Share of rows whose highest score is that of their label, percent."""
    return 100 * (scores.argmax(1).cpu() == labels.cpu()).double().mean().item()
