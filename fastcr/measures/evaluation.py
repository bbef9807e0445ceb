"""What an encoder is worth: every measure of it, during a training run, at its end, and for `fastcr.evaluate`."""

from __future__ import annotations

import filecmp
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcr.config import KnnConfig, LinearConfig
from fastcr.data.crop_loader import KeptCrops
from fastcr.data.images import ImageList, Splits
from fastcr.encoders.encoder import Encoder, load
from fastcr.errors import UsageError
from fastcr.measures.embeddings import NO_POOLINGS, Embeddings, embed
from fastcr.measures.linear_probe import fit_augmented
from fastcr.measures.localisation import Objects
from fastcr.measures.poolings import Pooling, without_training
from fastcr.measures.results import (
    Scores,
    Split,
    best_pooling,
    few_label_probe_scores,
    knn_scores,
    linear_probe_scores,
    linear_scores,
    localisation_scores,
    retrieval_scores,
    split_of,
)
from fastcr.method.ddt import Axis, ddt_axis
from fastcr.runs.context import Context
from fastcr.runs.log import read_records

HISTORY = "evaluations.jsonl"  # of a run: one object for each evaluation during training
INITIAL = "init.safetensors"  # the weights it began with
BEST = "best.safetensors"  # the weights of the best of them


class Classifiers(NamedTuple):
    """Which classifiers are trained to measure an encoder."""

    knn: KnnConfig
    linear: LinearConfig


class Measured(NamedTuple):
    """Scores of an encoder, and which images they leave out."""

    scores: Scores
    skipped: int  # images that are alone in their class: in the gallery, but no queries
    unreadable: list[str]


def test_images(splits: Splits) -> ImageList | None:
    """The images to measure on, the test split, else the training images; None where `not_measured` says why."""
    return None if not_measured(splits) else splits.test or splits.train


def not_measured(splits: Splits) -> str | None:
    """What the images to measure on have that leaves nothing to measure: for retrieval, some must have a partner."""
    labels = Counter((splits.test or splits.train).labels)
    if not labels:
        return "no labels (class folders)"
    if len(labels) == 1:
        return "images of one class only"
    return "no class of two images" if max(labels.values()) == 1 else None


@dataclass(frozen=True)
class Evaluation:
    """How encoders are measured: retrieval always, the rest as asked for and as there are images for it."""

    splits: Splits
    images: ImageList  # that the scores are of
    context: Context
    classifiers: Classifiers | None = None  # None: retrieval only
    objects: Objects | None = None  # in `images`
    load: KeptCrops = field(default_factory=KeptCrops, compare=False)  # frozen and trained encoder see the same

    def measure(self, encoder: Encoder, title: str, *, baselines: bool = True) -> Measured:
        """Every score of an encoder; with `baselines`, retrieval by each pooling that needs no training too."""
        train = self.splits.train
        classified = self.classifiers is not None and self.splits.test is not None and bool(self._in_common().any())
        poolings = without_training(self._axis(encoder)) if baselines else {}
        found = self._embed(encoder, self.images, title, poolings)
        known = self._embed(encoder, train, f"{title}, training images") if classified else None
        return self.context.processes.once(lambda: self._scores(encoder, found, known))

    def _in_common(self) -> Tensor:
        """Which images are of a class with training images, bool `[N]`: only these can be classified."""
        return torch.isin(torch.tensor(self.images.labels), torch.tensor(self.splits.train.labels or ()))

    def _axis(self, encoder: Encoder) -> Axis:
        return ddt_axis(encoder, self.splits.train, self.context, self.load)

    def _embed(
        self, encoder: Encoder, images: ImageList, title: str, poolings: Mapping[str, Pooling] = NO_POOLINGS
    ) -> Embeddings:
        return embed(encoder, images, self.context, title=title, poolings=poolings, load=self.load)

    def _scores(self, encoder: Encoder, found: Embeddings, found_train: Embeddings | None) -> Measured:
        classes, train = len(self.images.classes), self.splits.train
        test = split_of(found, self.images, self.context.device)
        every = {**test.vectors, **{name: each.to(self.context.device) for name, each in found.others.items()}}
        retrieved, skipped = retrieval_scores(every, test.labels)
        if skipped == len(test.labels):
            raise UsageError(f"no two readable images of a class in {self.images.root}: there is nothing to measure")
        scores: Scores = {"retrieval": retrieved}
        if found.others:
            scores["retrieval_centred"] = retrieval_scores(every, test.labels, centred=True)[0]
        if self.classifiers and found_train:
            knn, linear = self.classifiers
            known, kept = split_of(found_train, train, self.context.device), self._in_common()[found.kept]
            test = Split({name: each[kept.to(each.device)] for name, each in test.vectors.items()}, test.labels[kept])
            scores["knn"] = knn_scores(known, test, classes, k=knn.k, temperature=knn.temperature)
            if linear.enabled and linear.augment:
                scores["linear"] = linear_scores(test, self._augmented(encoder, linear.epochs))
            elif linear.enabled:
                scores["linear"] = linear_probe_scores(known, test, classes, linear.epochs)
            if linear.enabled and linear.few:
                scores["few_label"] = few_label_probe_scores(known, test, classes, linear.few, linear.epochs)
        if self.objects is not None and encoder.branch is not None:
            scores["localisation"] = localisation_scores(found, self.objects, encoder.image_size)
        return Measured(scores, skipped, found.unreadable)

    def _augmented(self, encoder: Encoder, epochs: int) -> dict[str, nn.Linear]:
        def encode(images: Tensor) -> dict[str, Tensor]:
            mean, rationale, _ = encoder.both(images, self.context.dtype)
            return {"mean": mean} | ({} if rationale is None else {"rationale": rationale})

        with encoder.evaluating():
            return fit_augmented(
                encode,
                self.splits.train,
                len(self.images.classes),
                self.context,
                image_size=encoder.image_size,
                epochs=epochs,
            )

    def measure_file(self, path: Path, title: str) -> Measured:
        """Every score of a weights file, which only the first process needs to have."""
        return self.measure(self.context.processes.once(lambda: load(path)).to(self.context.device), title)

    def results(self, weights: Path, initial: Measured | None) -> dict[str, Any]:
        """Content of `results.json`: scores of `weights`, those of the initial weights beside them, the best epoch."""
        unchanged = partial(filecmp.cmp, weights, weights.with_name(INITIAL), shallow=False)
        same = initial and self.context.processes.once(unchanged)
        measured = initial if initial and same else self.measure_file(weights, "trained")
        results = self.described(measured)
        best = {"trained": best_pooling(measured.scores)}
        if initial is not None:
            results["frozen_init"] = initial.scores
            best["baseline"] = best_pooling(initial.scores, trained=("rationale",))
        results["best"] = best
        if epoch := self.best(read_records(weights.parent / HISTORY)):
            kept = {"weights": BEST} if (weights.parent / BEST).is_file() else {}
            results["best_epoch"] = epoch | kept
        return results

    def described(self, measured: Measured) -> dict[str, Any]:
        """The scores, and the images that they are of; those left out are named for people too."""
        scores, skipped, unreadable = measured
        for path in unreadable:
            self.context.say(f"unreadable image {path!r}: left out")
        if skipped:
            self.context.say(f"{skipped} images are alone in their class: retrieved from, but not used as queries")
        if self.classifiers and self.splits.test and (alone := int((~self._in_common()).sum())):
            left_out = f"{alone} of {len(self.images)} test images are of classes without training images"
            self.context.say(f"{left_out}: kNN and linear probes leave them out")
        return {
            "folder": str(self.images.root),
            "images": len(self.images) - len(unreadable),
            "unreadable": len(unreadable),
            "skipped": skipped,
            "classes": len(set(self.images.labels or ())),
            **scores,
        }

    def best(self, history: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The evaluation during training, on these images, with the highest rank-1."""
        ranked = {}
        for number, entry in enumerate(history):
            with suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):  # one that a bad disk spoilt
                if entry["folder"] == str(self.images.root):
                    found = entry["retrieval"]
                    ranked[number] = float(found.get("rationale", found["mean"])["rank1"])
        return history[max(ranked, key=ranked.__getitem__)] if ranked else None
