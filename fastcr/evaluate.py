"""`python -m fastcr.evaluate RUN|WEIGHTS`: both embeddings measured, beside the frozen initialisation."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from fastcr.checkpoint import write_whole
from fastcr.config import UsageError, load_config, one_line_errors, parse, tyro
from fastcr.distributed import ALONE, Processes, processes_of_torchrun
from fastcr.embed import Branch, Embeddings, embed, encode, evaluating, find_weights, load_encoder
from fastcr.folders import ImageList, Splits, read_splits
from fastcr.linear_probe import fit_augmented
from fastcr.localisation import Objects, read_objects
from fastcr.machine import pick_device, pick_workers
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
from fastcr.synthetic import write_synthetic

HISTORY = "evaluations.jsonl"  # of a run: one object an evaluation in between
PATIENCE = timedelta(days=1)  # of the other processes, while the first one trains its probes


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
        if entries := [entry for entry in history if entry.get("folder") == str(self.images.root)]:
            results["best_epoch"] = max(entries, key=lambda entry: list(entry["retrieval"].values())[-1]["rank1"])
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


@dataclass(frozen=True)
class EvaluateData:
    """The images to measure on."""

    root: Path | None = None
    """Folder of images. Default: the one the run was trained on."""
    boxes: Path | None = None
    """CSV of the objects' boxes (path, left, top, right, bottom; fractions). Default: CUB's own, in its archive."""
    workers: int | None = None
    """Loader processes. Default: one per core."""


@dataclass(frozen=True)
class EvaluateRun:
    """How it is carried out."""

    device: str = "auto"
    """auto (CUDA when there is one, else the CPU), cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class EvaluateKnn:
    """Classification by nearest neighbours among the training images."""

    k: int = 200
    """Neighbours that vote."""
    temperature: float = 0.1
    """A neighbour's vote is exp(cosine / temperature)."""


@dataclass(frozen=True)
class EvaluateLinear:
    """Linear probes of the training images' embeddings: SGD with learning rate 30."""

    enabled: bool = True
    """False: none."""
    epochs: int = 100
    """Passes over the training images; the rate falls to a tenth after 60 % and 80 % of them."""
    augment: bool = False
    """Train on random crops and mirror images: the encoder runs in every epoch."""
    few: tuple[int, ...] = (1, 10, 20, 50)
    """Also probes with these percentages of each class's labels (never augmented)."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    source: tyro.conf.Positional[Path]
    """A run folder, or one of fastcr's weights files."""
    data: EvaluateData = field(default_factory=EvaluateData)
    run: EvaluateRun = field(default_factory=EvaluateRun)
    knn: EvaluateKnn = field(default_factory=EvaluateKnn)
    linear: EvaluateLinear = field(default_factory=EvaluateLinear)


def validate(config: EvaluateConfig) -> None:
    """Raise `UsageError` naming the first flag whose value cannot work."""
    checks = {
        "--data.workers must be at least 0": config.data.workers is None or config.data.workers >= 0,
        "--knn.k must be at least 1": config.knn.k >= 1,
        "--knn.temperature must be above 0": config.knn.temperature > 0,
        "--linear.epochs must be at least 1": config.linear.epochs >= 1,
        "--linear.few must be percentages, 1 to 100": all(1 <= each <= 100 for each in config.linear.few),
    }
    for message, holds in checks.items():
        if not holds:
            raise UsageError(message)


def read_arguments(args: Sequence[str]) -> tuple[EvaluateConfig, Path, Path | None, Path | None]:
    """Settings, the weights to measure, the frozen initialisation if there is one, and the images' root."""
    config = parse(
        EvaluateConfig,
        args,
        prog="python -m fastcr.evaluate",
        description="Retrieval, kNN, linear probes and localisation; writes results.json.",
    )
    validate(config)
    source, root = config.source, config.data.root
    if source.is_dir():
        root = root or load_config(source / "config.yaml").data.root
        frozen = source / "init.safetensors"
        return config, find_weights(source), frozen if frozen.is_file() else None, root
    if not source.exists():
        raise UsageError(f"no run folder or weights file {source}")
    if root is None:
        raise UsageError("a weights file needs --data.root, the folder of images to measure on")
    return config, source, None, root


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `python -m fastcr.evaluate`."""
    with one_line_errors("fastcr.evaluate"), processes_of_torchrun("fastcr.evaluate", PATIENCE) as processes:
        console = Console(markup=False, quiet=not processes.first)
        config, weights, frozen, root = processes.once(lambda: read_arguments(sys.argv[1:] if args is None else args))
        splits = read_splits(root or write_synthetic())
        images = test_images(splits)
        if images is None:
            raise UsageError(f"{root} has no labels (class folders), so nothing can be measured")
        objects = read_objects(config.data.boxes, images)
        device = pick_device(config.run.device, processes.local_rank, processes.local_ranks)
        workers = pick_workers(config.data.workers, processes.local_ranks)
        measuring = Measuring(splits, images, device, workers, console, config, objects, processes)
        scores = measuring.weights(frozen, "frozen init").scores if frozen else None
        results = measuring.results(weights, scores)
        console.print(results_table(results))
        if processes.first:
            write_results(weights.parent / "results.json", results)
        console.print(f"results: {weights.parent / 'results.json'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
