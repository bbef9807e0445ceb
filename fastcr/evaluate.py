"""`python -m fastcr.evaluate RUN|WEIGHTS`: retrieval with both embeddings, beside the frozen initialisation."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastcr.checkpoint import write_whole
from fastcr.config import UsageError, load_config, one_line_errors, parse, tyro
from fastcr.embed import Branch, Embeddings, embed, load_encoder
from fastcr.folders import ImageList, Splits, read_splits
from fastcr.machine import pick_device, pick_workers
from fastcr.retrieval import retrieval
from fastcr.runlog import read_records
from fastcr.synthetic import write_synthetic

Scores = dict[str, dict[str, float]]
HISTORY = "evaluations.jsonl"  # of a run: one object an evaluation in between


class Evaluation(NamedTuple):
    """Scores of an encoder, and which images they leave out."""

    scores: Scores
    skipped: int  # images that are alone in their class: in the gallery, but no queries
    unreadable: list[str]


def score(embeddings: Embeddings, images: ImageList, device: torch.device) -> Evaluation:
    """Retrieval of both embeddings: `{"mean": {"rank1", "rank5", "mAP"}, "rationale": {...}}`, percent."""
    assert images.labels is not None
    labels = torch.tensor(images.labels)[embeddings.kept]
    scores, skipped = {}, 0
    for name, vectors in (("mean", embeddings.mean), ("rationale", embeddings.rationale)):
        if vectors is not None:
            result = retrieval(vectors.to(device), labels)
            scores[name] = {"rank1": result.rank1, "rank5": result.rank5, "mAP": result.mAP}
            skipped = result.skipped
    return Evaluation(scores, skipped, embeddings.unreadable)


def test_images(splits: Splits) -> ImageList | None:
    """The labelled images to measure on: the test split, else the training images; None without labels."""
    images = splits.test or splits.train
    return images if images.labels is not None and len(images.classes) > 1 else None


def evaluate_weights(
    path: Path, images: ImageList, device: torch.device, workers: int, console: Console, title: str
) -> Evaluation:
    """Retrieval with a weights file on `images`."""
    backbone, branch, facts = load_encoder(path, device)
    embeddings = embed(
        backbone,
        branch,
        images,
        image_size=facts["image_size"],
        device=device,
        workers=workers,
        console=console,
        title=title,
    )
    return score(embeddings, images, device)


def evaluate_run(
    weights: Path,
    frozen: Scores | None,
    images: ImageList,
    device: torch.device,
    workers: int,
    console: Console,
) -> dict[str, Any]:
    """Content of `results.json`: scores of `weights`, those of the frozen initialisation, the best epoch measured."""
    scores, skipped, unreadable = evaluate_weights(weights, images, device, workers, console, "trained")
    for path in unreadable:
        console.print(f"unreadable image {path!r}: left out", soft_wrap=True, highlight=False)
    if skipped:
        console.print(f"{skipped} images are alone in their class: they are retrieved from, but are no queries")
    results: dict[str, Any] = {
        "folder": str(images.root),
        "images": len(images) - len(unreadable),
        "unreadable": len(unreadable),
        "skipped": skipped,
        "classes": len(images.classes),
        "retrieval": scores,
    }
    if frozen is not None:
        results["frozen_init"] = {"retrieval": frozen}
    history = read_records(weights.parent / HISTORY)
    if entries := [entry for entry in history if entry.get("folder") == str(images.root)]:
        results["best_epoch"] = max(entries, key=lambda entry: list(entry["retrieval"].values())[-1]["rank1"])
    return results


class TrainingEvaluation:
    """The evaluations of one training run: in between, and at its end. Does nothing without labels."""

    def __init__(self, folder: Path, splits: Splits, device: torch.device, workers: int, console: Console) -> None:
        self.folder, self.images, self.device = folder, test_images(splits), device
        self.workers, self.console = workers, console
        self.frozen: Scores | None = None

    def _frozen(self, images: ImageList) -> Scores:
        if self.frozen is None:
            path = self.folder / "init.safetensors"
            frozen = evaluate_weights(path, images, self.device, self.workers, self.console, "frozen init")
            self.frozen = frozen.scores
        return self.frozen

    def during(self, backbone: nn.Module, branch: Branch | None, image_size: int, epoch: int) -> None:
        """Print rank-1 of the encoder as it is beside the frozen initialisation, with a warning if it is below."""
        if self.images is None:
            return
        frozen = self._frozen(self.images)
        with torch.compiler.set_stance("force_eager"):  # not worth compiling for eval mode and another batch size
            embeddings = embed(
                backbone,
                branch,
                self.images,
                image_size=image_size,
                device=self.device,
                workers=self.workers,
                console=self.console,
                title=f"epoch {epoch}",
            )
        scores = score(embeddings, self.images, self.device).scores
        with (self.folder / HISTORY).open("a") as file:
            file.write(json.dumps({"epoch": epoch, "folder": str(self.images.root), "retrieval": scores}) + "\n")
        for name, values in scores.items():
            line = f"  rank-1 {name} {values['rank1']:.2f} (frozen init {frozen[name]['rank1']:.2f})"
            below = "  warning: below the frozen init" if values["rank1"] < frozen[name]["rank1"] else ""
            self.console.print(line + below, highlight=False)

    def at_the_end(self) -> None:
        """Evaluate weights.safetensors, write results.json and print the table."""
        if self.images is None:
            self.console.print("no labels (class folders): retrieval is not measured")
            return
        weights = self.folder / "weights.safetensors"
        results = evaluate_run(weights, self._frozen(self.images), self.images, self.device, self.workers, self.console)
        self.console.print(results_table(results))
        write_results(self.folder / "results.json", results)


def results_table(results: dict[str, Any]) -> Table:
    """The scores for people."""
    table = Table(title=f"retrieval on {results['images']} images of {results['classes']} classes, percent")
    table.add_column("encoder")
    table.add_column("embedding")
    for name in ("rank-1", "rank-5", "mAP"):
        table.add_column(name, justify="right")
    for encoder, part in (("frozen init", results.get("frozen_init")), ("trained", results)):
        for embedding, scores in (part or {}).get("retrieval", {}).items():
            table.add_row(encoder, embedding, *(f"{scores[key]:.2f}" for key in ("rank1", "rank5", "mAP")))
    return table


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, whole or not at all."""
    write_whole(path, lambda file: file.write_text(json.dumps(results, indent=2) + "\n"))


@dataclass(frozen=True)
class EvaluateData:
    """The images to measure on."""

    root: Path | None = None
    """Folder of images. Default: the one the run was trained on."""
    workers: int | None = None
    """Loader processes. Default: one per core."""


@dataclass(frozen=True)
class EvaluateRun:
    """How it is carried out."""

    device: str = "auto"
    """auto (CUDA when there is one, else the CPU), cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    source: tyro.conf.Positional[Path]
    """A run folder, or one of fastcr's weights files."""
    data: EvaluateData = field(default_factory=EvaluateData)
    run: EvaluateRun = field(default_factory=EvaluateRun)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `python -m fastcr.evaluate`."""
    console = Console(markup=False)
    with one_line_errors("fastcr.evaluate"):
        config = parse(
            EvaluateConfig,
            sys.argv[1:] if args is None else args,
            prog="python -m fastcr.evaluate",
            description="Retrieval with the mean and the rationale embedding; writes results.json.",
        )
        source, root, frozen = config.source, config.data.root, None
        if source.is_dir():
            root = root or load_config(source / "config.yaml").data.root or write_synthetic()
            weights, frozen = source / "weights.safetensors", source / "init.safetensors"
        elif source.exists():
            weights = source
            if root is None:
                raise UsageError("a weights file needs --data.root, the folder of images to measure on")
        else:
            raise UsageError(f"no run folder or weights file {source}")
        images = test_images(read_splits(root))
        if images is None:
            raise UsageError(f"{root} has no labels (class folders), so retrieval cannot be measured")
        device = pick_device(config.run.device)
        workers = pick_workers(config.data.workers)
        if workers < 0:
            raise UsageError("--data.workers must be at least 0")
        scores = None
        if frozen and frozen.is_file():
            scores = evaluate_weights(frozen, images, device, workers, console, "frozen init").scores
        results = evaluate_run(weights, scores, images, device, workers, console)
        console.print(results_table(results))
        write_results(weights.parent / "results.json", results)
        console.print(f"results: {weights.parent / 'results.json'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
