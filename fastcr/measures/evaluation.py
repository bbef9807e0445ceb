"""What an encoder is worth: every measure of it, during a training run, at its end, and for `fastcr.evaluate`."""

from __future__ import annotations

import filecmp
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from fastcr.config import KnnConfig, LinearConfig
from fastcr.data.images import ImageList, Splits
from fastcr.errors import UsageError
from fastcr.measures.embeddings import NO_POOLINGS, Embeddings, KeptCrops, ddt_axis, embed
from fastcr.measures.gallery import fixed_attention
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
    results_tables,
    retrieval_scores,
    split_of,
)
from fastcr.method.ddt import Axis
from fastcr.method.encoder import Encoder, load
from fastcr.runs.checkpoint import save_weights, write_whole
from fastcr.runs.distributed import ALONE, Processes
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
    device: torch.device
    dtype: torch.dtype  # in which the encoder is run
    workers: int
    console: Console
    classifiers: Classifiers | None = None  # None: retrieval only
    objects: Objects | None = None  # in `images`
    processes: Processes = ALONE  # that share the work of the encoder; the rest is the first one's
    load: KeptCrops = field(default_factory=KeptCrops, compare=False)  # frozen and trained encoder see the same

    def measure(self, encoder: Encoder, title: str, *, baselines: bool = True) -> Measured:
        """Every score of an encoder; with `baselines`, retrieval by each pooling that needs no training too."""
        train = self.splits.train
        classified = self.classifiers is not None and self.splits.test is not None and bool(self._in_common().any())
        poolings = without_training(self._axis(encoder)) if baselines else {}
        found = self._embed(encoder, self.images, title, poolings)
        known = self._embed(encoder, train, f"{title}, training images") if classified else None
        return self.processes.once(lambda: self._scores(encoder, found, known))

    def _in_common(self) -> Tensor:
        """Which images are of a class with training images, bool `[N]`: only these can be classified."""
        return torch.isin(torch.tensor(self.images.labels), torch.tensor(self.splits.train.labels or ()))

    def _work(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("device", "dtype", "workers", "console", "processes", "load")}

    def _axis(self, encoder: Encoder) -> Axis:
        return ddt_axis(encoder, self.splits.train, **self._work())

    def _embed(
        self, encoder: Encoder, images: ImageList, title: str, poolings: Mapping[str, Pooling] = NO_POOLINGS
    ) -> Embeddings:
        return embed(encoder, images, title=title, poolings=poolings, **self._work())

    def _scores(self, encoder: Encoder, found: Embeddings, found_train: Embeddings | None) -> Measured:
        classes, train = len(self.images.classes), self.splits.train
        test = split_of(found, self.images, self.device)
        every = {**test.vectors, **{name: each.to(self.device) for name, each in found.others.items()}}
        retrieved, skipped = retrieval_scores(every, test.labels)
        if skipped == len(test.labels):
            raise UsageError(f"no two readable images of a class in {self.images.root}: there is nothing to measure")
        scores: Scores = {"retrieval": retrieved}
        if found.others:
            scores["retrieval_centred"] = retrieval_scores(every, test.labels, centred=True)[0]
        if self.classifiers and found_train:
            knn, linear = self.classifiers
            known, kept = split_of(found_train, train, self.device), self._in_common()[found.kept]
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
            mean, rationale, _ = encoder.both(images, self.dtype)
            return {"mean": mean} | ({} if rationale is None else {"rationale": rationale})

        with encoder.evaluating():
            return fit_augmented(
                encode,
                self.splits.train,
                len(self.images.classes),
                image_size=encoder.image_size,
                device=self.device,
                workers=self.workers,
                console=self.console,
                epochs=epochs,
            )

    def measure_file(self, path: Path, title: str) -> Measured:
        """Every score of a weights file, which only the first process needs to have."""
        return self.measure(self.processes.once(lambda: load(path)).to(self.device), title)

    def results(self, weights: Path, initial: Measured | None) -> dict[str, Any]:
        """Content of `results.json`: scores of `weights`, those of the initial weights beside them, the best epoch."""
        same = initial and self.processes.once(lambda: filecmp.cmp(weights, weights.with_name(INITIAL), shallow=False))
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
            self.console.print(f"unreadable image {path!r}: left out", soft_wrap=True, highlight=False)
        if skipped:
            self.console.print(f"{skipped} images are alone in their class: retrieved from, but not used as queries")
        if self.classifiers and self.splits.test and (alone := int((~self._in_common()).sum())):
            left_out = f"{alone} of {len(self.images)} test images are of classes without training images"
            self.console.print(f"{left_out}: kNN and linear probes leave them out", highlight=False)
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


class Logged(NamedTuple):
    """What an evaluation gives a run's log; nothing in processes other than the first."""

    scores: dict[str, float] = {}  # noqa: RUF012  # percent, by names such as knn/rationale/top1
    attention: Image.Image | None = None


class TrainingEvaluation:
    """The evaluations of one training run: during it, and at its end. Without labels, only the attention is drawn."""

    def __init__(
        self,
        folder: Path,
        splits: Splits,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        console: Console,
        processes: Processes = ALONE,
        *,
        knn: bool = False,
    ) -> None:
        self.folder, self.console, self.processes, images = folder, console, processes, test_images(splits)
        classifiers = Classifiers(KnnConfig(), LinearConfig(enabled=False)) if knn else None
        work = (device, dtype, workers, console, classifiers)
        self.evaluation = Evaluation(splits, images, *work, processes=processes) if images else None
        self.drawn = partial(fixed_attention, images=splits.test or splits.train, device=device, dtype=dtype)
        self.lacking = not_measured(splits)
        self.frozen: Measured | None = None

    def _frozen(self, evaluation: Evaluation) -> Measured:
        if self.frozen is None:
            self.frozen = evaluation.measure_file(self.folder / INITIAL, "frozen init")
        return self.frozen

    def _logged(self, encoder: Encoder, scores: Mapping[str, Any]) -> Logged:
        if not self.processes.first:
            return Logged()
        found = {
            f"{section}/{pooling}/{measure}": value
            for section in ("retrieval", "knn")
            for pooling in ("mean", "rationale")
            for measure, value in scores.get(section, {}).get(pooling, {}).items()
        }
        return Logged(found, self.drawn(encoder))

    def during(self, encoder: Encoder, epoch: int) -> Logged:
        """Print rank-1 and kNN of the encoder as it is beside the frozen initialisation, with a warning if below."""
        if self.evaluation is None:
            return self._logged(encoder, {})
        frozen = self._frozen(self.evaluation).scores
        with torch.compiler.set_stance("force_eager"):  # not worth compiling for eval mode and another batch size
            scores = self.evaluation.measure(encoder, f"epoch {epoch}", baselines=False).scores
        if not self.processes.first:
            return Logged()
        with (self.folder / HISTORY).open("a") as file:
            folder = str(self.evaluation.images.root)
            file.write(json.dumps({"epoch": epoch, "folder": folder, **scores}) + "\n")
        best = self.evaluation.best(read_records(self.folder / HISTORY))
        if best is None or best["epoch"] == epoch:
            save_weights(self.folder / BEST, encoder.state_dict(), encoder.facts)
        for section, measure, shown in (("retrieval", "rank1", "rank-1"), ("knn", "top1", "kNN")):
            for name, values in scores.get(section, {}).items():
                now, before = values[measure], frozen[section][name][measure]
                below = "  warning: below the frozen init" if now < before else ""
                self.console.print(f"  {shown} {name} {now:.2f} (frozen init {before:.2f}){below}", highlight=False)
        return self._logged(encoder, scores)

    def at_the_end(self, encoder: Encoder) -> Logged:
        """Evaluate weights.safetensors, which hold `encoder`; write results.json and print the table."""
        if self.evaluation is None:
            self.console.print(f"{self.lacking}: retrieval is not measured", highlight=False)
            return self._logged(encoder, {})
        results = self.evaluation.results(self.folder / "weights.safetensors", self._frozen(self.evaluation))
        show(results, self.console)
        if self.processes.first:
            write_results(self.folder / "results.json", results)
        return self._logged(encoder, results)


def show(results: dict[str, Any], console: Console) -> None:
    """Print the results for people."""
    for each in results_tables(results):
        console.print(each, highlight=False, soft_wrap=isinstance(each, str))


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, whole or not at all."""
    write_whole(path, lambda file: file.write_text(json.dumps(results, indent=2) + "\n"))
