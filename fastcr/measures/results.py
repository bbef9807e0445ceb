"""Every measure of an encoder, for both of its embeddings: what `results.json` holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.data.images import ImageList
from fastcr.measures.embeddings import Embeddings
from fastcr.measures.knn import knn, top1
from fastcr.measures.linear_probe import accuracy, few_label_scores, fit_linear
from fastcr.measures.localisation import Objects, localisation, objects_in_crop
from fastcr.measures.retrieval import retrieval

Scores = dict[str, dict[str, Any]]


class Split(NamedTuple):
    """The embedded images of a split that could be read, on one device, and their labels `[N]`."""

    vectors: dict[str, Tensor]  # "mean" and "rationale" [N,C]
    labels: Tensor


def split_of(embeddings: Embeddings, images: ImageList, device: torch.device) -> Split:
    """Embeddings of `images`, which have labels, by name."""
    assert images.labels is not None
    found = {"mean": embeddings.mean, "rationale": embeddings.rationale}
    vectors = {name: each.to(device) for name, each in found.items() if each is not None}
    return Split(vectors, torch.tensor(images.labels)[embeddings.kept])


def retrieval_scores(
    vectors: Mapping[str, Tensor], labels: Tensor, *, centred: bool = False
) -> tuple[dict[str, Any], int]:
    """`{"mean": {"rank1", "rank5", "mAP"}, ...}` in percent, and how many images were no queries.

    `vectors` are unit embeddings `[N,C]` by their pooling; `centred`: less their mean over the set.
    """
    if centred:
        vectors = {name: F.normalize(each - each.mean(0), dim=1) for name, each in vectors.items()}
    results = {name: retrieval(each, labels) for name, each in vectors.items()}
    scores = {name: {"rank1": r.rank1, "rank5": r.rank5, "mAP": r.mAP} for name, r in results.items()}
    return scores, next(iter(results.values())).skipped


def best_pooling(scores: Scores, *, trained: Collection[str] = ()) -> dict[str, Any]:
    """The pooling with the highest rank-1, plain or less the mean over the set, but for those that are `trained`."""
    found = [
        {"pooling": name, "centred": section == "retrieval_centred", "rank1": each["rank1"], "mAP": each["mAP"]}
        for section in ("retrieval", "retrieval_centred")
        for name, each in scores.get(section, {}).items()
        if name not in trained
    ]
    return max(found, key=lambda each: (each["rank1"], each["mAP"]))


def knn_scores(train: Split, test: Split, classes: int, *, k: int, temperature: float) -> Scores:
    """`{"mean": {"top1"}, ...}` in percent: test images classified by their neighbours among the training images."""
    scores: Scores = {}
    for name, vectors in test.vectors.items():
        votes = knn(train.vectors[name], train.labels, vectors, classes, k=k, temperature=temperature)
        scores[name] = {"top1": top1(votes, test.labels)}
    return scores


def linear_scores(test: Split, classifiers: Mapping[str, torch.nn.Module]) -> Scores:
    """`{"mean": {"top1", "top5"}, ...}` in percent."""
    return {
        name: {f"top{within}": accuracy(classifier, test.vectors[name], test.labels, within) for within in (1, 5)}
        for name, classifier in classifiers.items()
    }


def linear_probe_scores(train: Split, test: Split, classes: int, epochs: int) -> Scores:
    """`linear_scores` of probes trained on the embeddings as they are."""
    fitted = {name: fit_linear(each, train.labels, classes, epochs=epochs) for name, each in train.vectors.items()}
    return linear_scores(test, fitted)


def few_label_probe_scores(train: Split, test: Split, classes: int, percents: Sequence[int], epochs: int) -> Scores:
    """`{"mean": {"1": top-1 with 1 % of the labels, ...}, ...}` in percent."""
    scores: Scores = {}
    for name, vectors in train.vectors.items():
        shares = [percent / 100 for percent in percents]
        others = (test.vectors[name], test.labels, classes, shares)
        found = few_label_scores(vectors, train.labels, *others, epochs=epochs)
        scores[name] = {str(percent): value for percent, (_, value) in zip(percents, found, strict=True)}
    return scores


def localisation_scores(embeddings: Embeddings, objects: Objects, image_size: int) -> Scores:
    """`{"attention": {"inside", "pointing"[, "parts"]}, "average": ..., "gaussian": ..., "uniform": ...}`, percent.

    `objects` are those of all images of the list; images left out of the embeddings are left out here.
    """
    assert embeddings.attention is not None
    parts = None if objects.parts is None else objects.parts[embeddings.kept]
    kept = Objects(objects.boxes[embeddings.kept], parts, objects.in_pixels)
    found = localisation(embeddings.attention, objects_in_crop(kept, embeddings.sizes, image_size))
    keys = ("inside", "pointing") if parts is None else ("inside", "pointing", "parts")
    return {name: {key: getattr(each, key) for key in keys} for name, each in found.items()}
