"""Scores of embeddings in the form in which `results.json` holds them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.config import LinearConfig
from fastcr.measures.knn import accuracy, knn
from fastcr.measures.linear_probe import few_labels, fit_linear
from fastcr.measures.poolings import SHOWN
from fastcr.measures.reranking import expand, reciprocal, whiten
from fastcr.measures.retrieval import retrieve_each
from fastcr.runs.context import Context

Scores = dict[str, dict[str, Any]]


class Split(NamedTuple):
    """Embedded images on one device, and their labels `[N]`."""

    vectors: dict[str, Tensor]  # unit embeddings [N,C] by their pooling
    labels: Tensor


def less_mean(vectors: Tensor) -> Tensor:
    """Unit embeddings `[N,C]` less their mean, of unit length again."""
    return F.normalize(vectors - vectors.mean(0), dim=1)


def best_pooling(scores: Scores) -> dict[str, Any]:
    """The pooling with the highest mAP, with the mean subtracted or not; of equal ones that of the higher rank-1."""
    found = [
        {"pooling": name, "centred": section == "retrieval_centred", "rank1": each["rank1"], "mAP": each["mAP"]}
        for section in ("retrieval", "retrieval_centred")
        for name, each in scores.get(section, {}).items()
    ]
    return max(found, key=lambda each: (each["mAP"], each["rank1"]))


def reranked(vectors: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """Retrieval after each way of re-ranking unit embeddings `[N,C]`, less their mean, that needs no training."""
    moved, found = less_mean(vectors), dict[str, dict[str, float]]()
    ways = {"expanded": expand(moved), "whitened": expand(whiten(vectors, vectors)), "reciprocal": moved}
    for name, each in ways.items():
        scores = retrieve_each(each, labels, reciprocal(each) if name == "reciprocal" else None).scores(len(labels))
        found[name] = {"rank1": scores.rank1, "rank5": scores.rank5, "mAP": scores.mAP}
    return found


def classifier_scores(
    train: Split, test: Split, classes: int, linear: LinearConfig, context: Context | None = None
) -> Scores:
    """Sections `knn` (top1), `linear` (top1, top5) and `few_label` (top-1 by percentage of labels), percent.

    The last two are left out where `linear` says so. Of percentages that are the same images, as 1 and 10 are of ten a
    class, only the last is there.
    """
    scores, every = Scores(), tuple(range(len(train.labels)))
    few = {tuple(few_labels(train.labels, percent / 100).tolist()): percent for percent in sorted(linear.few)}
    probes: list[tuple[tuple[int, ...], int | None]] = [(every, None), *few.items()] if linear.enabled else []

    def score(section: str, pooling: str, found: Tensor, **within: int) -> None:
        part = scores.setdefault(section, {}).setdefault(pooling, {})
        part |= {name: accuracy(found, test.labels, places) for name, places in within.items()}

    for name, vectors in train.vectors.items():
        asked = test.vectors[name]
        score("knn", name, knn(vectors, train.labels, asked, classes), top1=1)
        shown = SHOWN.get(name, name)
        for chosen, percent in (context or Context()).progress(probes, f"linear probes, {shown}", len(probes)):
            rows = torch.tensor(chosen)
            probe = fit_linear(vectors[rows.to(vectors.device)], train.labels[rows], classes, epochs=linear.epochs)
            if percent is None:
                score("linear", name, probe(asked), top1=1, top5=5)
            else:
                score("few_label", name, probe(asked), **{str(percent): 1})
    return scores
