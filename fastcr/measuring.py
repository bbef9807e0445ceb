"""What an encoder is worth: every measure of it, during a training run, at its end, and for `fastcr.evaluate`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from fastcr.checkpoint import write_whole
from fastcr.distributed import ALONE, Processes
from fastcr.embed import Branch, Embeddings, embed, encode, evaluating, load_encoder
from fastcr.folders import ImageList, Splits
from fastcr.linear_probe import fit_augmented
from fastcr.localisation import Objects
from fastcr.runlog import read_records
from fastcr.scores import (
    Scores,
    few_label_probe_scores,
    knn_scores,
    linear_probe_scores,
    linear_scores,
    localisation_scores,
    results_table,
    retrieval_scores,
    split_of,
)

if TYPE_CHECKING:
    from fastcr.evaluate import EvaluateConfig

HISTORY = "evaluations.jsonl"  # of a run: one object an evaluation in between


def test_images(splits: Splits) -> ImageList | None:
    """The labelled images to measure on: the test split, else the training images; None without labels."""
    images = splits.test or splits.train
    return images if images.labels is not None and len(images.classes) > 1 else None


class Measuring(NamedTuple):
    """How encoders are measured: retrieval always, the rest as the settings say and as there are images for it."""

    splits: Splits
    images: ImageList  # that the scores are of
    device: torch.device
    workers: int
    console: Console
    settings: EvaluateConfig | None = None  # None: retrieval only
    objects: Objects | None = None  # of `images`
    processes: Processes = ALONE  # that share the work of the encoder; the rest is the first one's

    def encoder(self, backbone: nn.Module, branch: Branch | None, image_size: int, title: str) -> Measured:
        """Every score of an encoder."""

        def embedded(images: ImageList, what: str) -> Embeddings:
            return embed(
                backbone,
                branch,
                images,
                image_size=image_size,
                device=self.device,
                workers=self.workers,
                console=self.console,
                title=f"{title}, {what} images" if what else title,
                processes=self.processes,
            )

        train = self.splits.train
        classified = self.settings is not None and self.splits.test is not None and train.labels is not None
        found = embedded(self.images, "")
        known = embedded(train, "training") if classified else None
        return self.processes.once(lambda: self._scores(backbone, branch, image_size, found, known))

    def _scores(
        self,
        backbone: nn.Module,
        branch: Branch | None,
        image_size: int,
        found: Embeddings,
        found_train: Embeddings | None,
    ) -> Measured:
        classes, train = len(self.images.classes), self.splits.train
        test = split_of(found, self.images, self.device)
        retrieved, skipped = retrieval_scores(test)
        scores: Scores = {"retrieval": retrieved}
        if self.settings and found_train:
            knn, linear = self.settings.knn, self.settings.linear
            known = split_of(found_train, train, self.device)
            scores["knn"] = knn_scores(known, test, classes, k=knn.k, temperature=knn.temperature)
            if linear.enabled and linear.augment:
                scores["linear"] = linear_scores(test, self._augmented(backbone, branch, image_size))
            elif linear.enabled:
                scores["linear"] = linear_probe_scores(known, test, classes, linear.epochs)
            if linear.enabled and linear.few:
                scores["few_label"] = few_label_probe_scores(known, test, classes, linear.few, linear.epochs)
        if self.objects is not None and branch is not None:
            scores["localisation"] = localisation_scores(found, self.objects, image_size)
        return Measured(scores, skipped, found.unreadable)

    def _augmented(self, backbone: nn.Module, branch: Branch | None, image_size: int) -> dict[str, nn.Linear]:
        assert self.settings

        def encoded(images: Tensor) -> dict[str, Tensor]:
            mean, rationale, _ = encode(backbone, branch, images)
            return {"mean": mean} | ({} if rationale is None else {"rationale": rationale})

        with evaluating(backbone, branch):
            return fit_augmented(
                encoded,
                self.splits.train,
                len(self.images.classes),
                image_size=image_size,
                device=self.device,
                workers=self.workers,
                console=self.console,
                epochs=self.settings.linear.epochs,
            )

    def weights(self, path: Path, title: str) -> Measured:
        """Every score of a weights file, which only the first process needs to have."""
        backbone, branch, facts = self.processes.once(lambda: load_encoder(path, torch.device("cpu")))
        for module in filter(None, (backbone, branch)):
            module.to(self.device)
        return self.encoder(backbone, branch, facts["image_size"], title)

    def results(self, weights: Path, frozen: Scores | None) -> dict[str, Any]:
        """Content of `results.json`: scores of `weights`, those of the frozen initialisation, the best epoch."""
        scores, skipped, unreadable = self.weights(weights, "trained")
        for path in unreadable:
            self.console.print(f"unreadable image {path!r}: left out", soft_wrap=True, highlight=False)
        if skipped:
            self.console.print(
                f"{skipped} images are alone in their class: they are retrieved from, but are no queries"
            )
        results: dict[str, Any] = {
            "folder": str(self.images.root),
            "images": len(self.images) - len(unreadable),
            "unreadable": len(unreadable),
            "skipped": skipped,
            "classes": len(self.images.classes),
            **scores,
        }
        if frozen is not None:
            results["frozen_init"] = frozen
        history = read_records(weights.parent / HISTORY)
        ranked = {}
        for number, entry in enumerate(history):
            with suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):  # one that a bad disk spoilt
                if entry["folder"] == str(self.images.root):
                    ranked[number] = float(list(entry["retrieval"].values())[-1]["rank1"])
        if ranked:
            results["best_epoch"] = history[max(ranked, key=ranked.__getitem__)]
        return results


class Measured(NamedTuple):
    """Scores of an encoder, and which images they leave out."""

    scores: Scores
    skipped: int  # images that are alone in their class: in the gallery, but no queries
    unreadable: list[str]


class TrainingEvaluation:
    """The evaluations of one training run: in between, and at its end. Does nothing without labels."""

    def __init__(
        self,
        folder: Path,
        splits: Splits,
        device: torch.device,
        workers: int,
        console: Console,
        processes: Processes = ALONE,
    ) -> None:
        self.folder, self.console, self.processes, images = folder, console, processes, test_images(splits)
        self.measuring = Measuring(splits, images, device, workers, console, processes=processes) if images else None
        self.frozen: Scores | None = None

    def _frozen(self, measuring: Measuring) -> Scores:
        if self.frozen is None:
            self.frozen = measuring.weights(self.folder / "init.safetensors", "frozen init").scores
        return self.frozen

    def during(self, backbone: nn.Module, branch: Branch | None, image_size: int, epoch: int) -> None:
        """Print rank-1 of the encoder as it is beside the frozen initialisation, with a warning if it is below."""
        if self.measuring is None:
            return
        frozen = self._frozen(self.measuring)["retrieval"]
        with torch.compiler.set_stance("force_eager"):  # not worth compiling for eval mode and another batch size
            scores = self.measuring.encoder(backbone, branch, image_size, f"epoch {epoch}").scores["retrieval"]
        if not self.processes.first:
            return
        with (self.folder / HISTORY).open("a") as file:
            folder = str(self.measuring.images.root)
            file.write(json.dumps({"epoch": epoch, "folder": folder, "retrieval": scores}) + "\n")
        for name, values in scores.items():
            line = f"  rank-1 {name} {values['rank1']:.2f} (frozen init {frozen[name]['rank1']:.2f})"
            below = "  warning: below the frozen init" if values["rank1"] < frozen[name]["rank1"] else ""
            self.console.print(line + below, highlight=False)

    def at_the_end(self) -> None:
        """Evaluate weights.safetensors, write results.json and print the table."""
        if self.measuring is None:
            self.console.print("no labels (class folders): retrieval is not measured")
            return
        results = self.measuring.results(self.folder / "weights.safetensors", self._frozen(self.measuring))
        self.console.print(results_table(results))
        if self.processes.first:
            write_results(self.folder / "results.json", results)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, whole or not at all."""
    write_whole(path, lambda file: file.write_text(json.dumps(results, indent=2) + "\n"))
