"""Scores of embeddings in the form in which `results.json` holds them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastcr.config import KnnConfig, LinearConfig
from fastcr.measures.embeddings import Embeddings
from fastcr.measures.knn import knn, top1
from fastcr.measures.linear_probe import accuracy, few_label_scores, fit_linear
from fastcr.measures.localisation import Objects, localisation, objects_in_crop

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


def classifier_scores(train: Split, test: Split, classes: int, near: KnnConfig, linear: LinearConfig) -> Scores:
    """Sections `knn` (top1), `linear` (top1, top5) and `few_label` (top-1 by percentage of labels), percent.

    The last two are left out where `linear` says so.
    """
    scores: Scores = {"knn": {}}
    for name, vectors in train.vectors.items():
        votes = knn(vectors, train.labels, test.vectors[name], classes, k=near.k, temperature=near.temperature)
        scores["knn"][name] = {"top1": top1(votes, test.labels)}
    if not linear.enabled:
        return scores
    scores["linear"] = {}
    for name, vectors in train.vectors.items():
        probe = fit_linear(vectors, train.labels, classes, epochs=linear.epochs)
        right = {f"top{within}": accuracy(probe, test.vectors[name], test.labels, within) for within in (1, 5)}
        scores["linear"][name] = right
        if linear.few:
            shares = [percent / 100 for percent in linear.few]
            asked = (test.vectors[name], test.labels, classes, shares)
            found = few_label_scores(vectors, train.labels, *asked, epochs=linear.epochs)
            few = scores.setdefault("few_label", {})
            few[name] = {str(percent): value for percent, value in zip(linear.few, found, strict=True)}
    return scores


def localisation_scores(embeddings: Embeddings, objects: Objects, image_size: int) -> Scores:
    """`{"attention": {"inside", "pointing"}, "average": ..., "gaussian": ..., "uniform": ...}`, percent.

    `objects` are those of all images of the list; images left out of the embeddings are left out here.
    """
    assert embeddings.attention is not None
    kept = Objects(objects.boxes[embeddings.kept], objects.in_pixels)
    found = localisation(embeddings.attention, objects_in_crop(kept, embeddings.sizes, image_size))
    return {name: {"inside": each.inside, "pointing": each.pointing} for name, each in found.items()}
