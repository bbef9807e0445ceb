"""Weighted k-nearest-neighbour classification, as in instance discrimination (Wu et al., arXiv 1805.01978)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcr.measures.checks import usable, usable_labels

CHUNK_BYTES = 128 << 20  # of similarities held at once


def knn(train: Any, labels: Any, queries: Any, classes: int, *, k: int = 200, temperature: float = 0.1) -> Tensor:
    """Class scores `[Q,classes]`: for each query, `sum of exp(cosine / temperature)` of its k nearest, by class.

    `train` `[N,C]` with `labels` `[N]` from 0 to `classes` - 1, and `queries` `[Q,C]`, are on one device; k is at most
    N. The scores of a query carry a common factor. `ValueError` for what `checks` refuses.
    """
    train = usable(train, "training embeddings")
    labels, queries = usable_labels(labels, train, classes), usable(queries, "queries", train.shape[1])
    k = min(k, len(train))
    chunk = max(CHUNK_BYTES // (4 * max(len(train), 1)), 1)
    scores = torch.zeros(len(queries), classes, device=train.device)
    for part, votes in zip(queries.split(chunk), scores.split(chunk), strict=True):
        similarity, nearest = (part @ train.T).topk(k, dim=1)
        # less the largest, so that a low temperature does not overflow
        votes.scatter_add_(1, labels[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
    return scores


def accuracy(scores: Tensor, labels: Any, within: int = 1) -> float:
    """Share of rows `[N,classes]` whose label `[N]` is among the `within` highest scores, percent."""
    found = scores.topk(min(within, scores.shape[1]), dim=1).indices == usable_labels(labels, scores)[:, None]
    return 100 * found.any(1).double().mean().item()
