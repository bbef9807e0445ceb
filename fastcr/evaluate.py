"""`python -m fastcr.evaluate RUN|WEIGHTS`: both embeddings measured, beside the frozen initialisation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from fastcr.cli import load_config, one_line_errors, parse
from fastcr.config import UsageError, tyro
from fastcr.distributed import processes_of_torchrun
from fastcr.embed import find_weights
from fastcr.folders import read_splits
from fastcr.localisation import read_objects
from fastcr.machine import pick_device, pick_workers
from fastcr.measuring import Measuring, test_images, write_results
from fastcr.scores import results_table
from fastcr.synthetic import write_synthetic

PATIENCE = timedelta(days=1)  # of the other processes, while the first one trains its probes


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
