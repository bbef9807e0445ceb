"""Leave-one-out image retrieval: rank-1, rank-5 and mAP by cosine similarity; and whether one encoder is better."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcr.measures.checks import usable, usable_labels
from fastcr.measures.reranking import Similarity, cosine

CHUNK_BYTES = 128 << 20  # of similarities held at once


class Retrieval(NamedTuple):
    """Scores in percent, averaged over the queries, and how many images were no query."""

    rank1: float
    rank5: float
    mAP: float  # noqa: N815 (the field's name for it)
    queries: int
    skipped: int


class Queries(NamedTuple):
    """What each query found, on the CPU, in the order of the images."""

    images: Tensor  # [Q] which images are queries
    rank: Tensor  # [Q] of the most similar image of the query's class; 1 is a hit
    precision: Tensor  # [Q] average precision, 0 to 1, fp64

    def scores(self, count: int) -> Retrieval:
        """Their means, for `count` images in all."""
        found = [(self.rank <= 1).double(), (self.rank <= 5).double(), self.precision]
        rank1, rank5, precision = (100 * each.mean().item() if len(each) else 0.0 for each in found)
        return Retrieval(rank1, rank5, precision, len(self.images), count - len(self.images))


def retrieval(embeddings: Any, labels: Any) -> Retrieval:
    """Retrieve each image from all others.

    Args:
        embeddings: `[N,C]` of any float dtype, on any device; NumPy arrays and lists too. Rows of another length than 1
            are compared as if they had it.
        labels: `[N]` or `[N,1]` integers.

    Average precision runs over the full ranking. A tie between an image of the query's class and another counts
    against the query, so that embeddings that have collapsed score as badly as they are. Images whose class has no
    other image are no queries (they stay in the gallery) and are counted in `skipped`. Memory: about `CHUNK_BYTES`
    x 3 beside the embeddings. `ValueError` for embeddings that are not finite, or labels of another number.
    """
    embeddings = usable(embeddings)
    return retrieve_each(embeddings, usable_labels(labels, embeddings)).scores(len(embeddings))


def retrieve_each(embeddings: Tensor, labels: Tensor, similarity: Similarity | None = None) -> Queries:
    """As `retrieval`, with the result of every query; by another `similarity` than the cosine, if it is given.

    What it gets is not checked: unit embeddings `[N,C]` in fp32, labels `[N]`.
    """
    count, similarity = len(embeddings), similarity or cosine(embeddings)
    labels = labels.to(embeddings.device)
    # queries in the order of their classes: those of a class lie together, and so do their relevant images in `order`
    order = torch.argsort(labels, stable=True)
    sizes = torch.unique_consecutive(labels[order], return_counts=True)[1].tolist()
    slices = [(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True) if size > 1]

    rank = torch.zeros(count, dtype=torch.int64)
    precision = torch.zeros(count, dtype=torch.float64)
    chunk = max(CHUNK_BYTES // (4 * max(count, 1)), 1)
    for first in range(0, count, chunk):
        images = order[first : first + chunk]
        similar = similarity(images)
        similar[torch.arange(len(images)), images] = -torch.inf  # not the query itself: last of all
        ranking = _sorted(similar)
        for start, end in slices:
            low, high = max(start - first, 0), min(end - first, len(similar))
            if low < high:
                ranks, precisions = _ranks(similar[low:high, order[start:end]], ranking[low:high])
                queries = images[low:high].cpu()
                rank[queries], precision[queries] = ranks.cpu(), precisions.cpu()
    asked = rank.nonzero()[:, 0]
    return Queries(asked, rank[asked], precision[asked])


def _ranks(relevant: Tensor, ranking: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of the best relevant image `[Q]` and AP `[Q]`.

    `relevant` `[Q,R]` are similarities to the query's class, the query's own -inf among them; `ranking` `[Q,N]` those
    to all images, ascending.
    """
    relevant = relevant.sort(dim=1).values[:, 1:].contiguous()
    at_least = ranking.shape[1] - torch.searchsorted(ranking, relevant)  # images as similar or more, relevant or not
    relevant_at_least = relevant.shape[1] - torch.searchsorted(relevant, relevant)
    found = torch.arange(relevant.shape[1], 0, -1, device=relevant.device)  # 1 for the most similar, the last
    rank = at_least - relevant_at_least + found
    return rank[:, -1], (found / rank).double().mean(1)


def _sorted(values: Tensor) -> Tensor:
    """Each row ascending; on the CPU by NumPy, several times faster than torch, and on all cores."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    ranking, threads = values.clone(), torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda rows: rows.numpy().sort(axis=1), ranking.tensor_split(threads)))
    return ranking


def compare(before: Queries, after: Queries) -> dict[str, Any]:
    """What the queries gained and lost, as `results.json` holds it; both must be of the same images.

    `gained` and `lost` count the queries that are a hit at rank 1 only after, or only before; `p_value` is of the exact
    McNemar test of these. `mAP_difference` (after less before) and its standard error over the queries are in points.
    """
    hit_before, hit_after = before.rank == 1, after.rank == 1
    gained, lost = int((hit_after & ~hit_before).sum()), int((hit_before & ~hit_after).sum())
    difference = 100 * (after.precision - before.precision)
    return {
        "queries": len(difference),
        "gained": gained,
        "lost": lost,
        "p_value": mcnemar(gained, lost),
        "mAP_difference": difference.mean().item(),
        "mAP_standard_error": difference.std().item() / math.sqrt(len(difference)),
    }


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p value: how often tosses of a fair coin divide these queries at least as unevenly."""
    tosses = gained + lost
    one_tail = sum(math.comb(tosses, heads) for heads in range(min(gained, lost) + 1)) / 2**tosses
    return min(2 * one_tail, 1.0)
