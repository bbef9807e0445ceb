"""`fastcr evaluate RUN|WEIGHTS`: measure both embeddings, and those of the frozen initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from rich.console import Console

from fastcr.arguments import EvaluateConfig, read_arguments
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.errors import UsageError
from fastcr.measures.evaluation import Classifiers, Evaluation, not_measured, show, test_images, write_results
from fastcr.measures.localisation import read_objects
from fastcr.method.encoder import find_weights
from fastcr.runs.command_line import called, load_config, one_line_errors
from fastcr.runs.distributed import processes_of_torchrun
from fastcr.runs.machine import pick_device, pick_dtype, pick_workers

PATIENCE = timedelta(days=1)  # of the other processes, while the first one trains its probes


def read_settings(args: Sequence[str] | None) -> tuple[EvaluateConfig, Path, Path | None, Path | None]:
    """Settings, the weights to measure, the frozen initialisation if there is one, and the images' root."""
    config: EvaluateConfig = read_arguments("evaluate", args)
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
    """Command line of `fastcr evaluate`."""
    with one_line_errors("evaluate"), processes_of_torchrun(called("evaluate"), PATIENCE) as processes:
        console = Console(markup=False, quiet=not processes.first)
        config, weights, frozen, root = processes.once(partial(read_settings, args))
        splits = read_splits(root or write_synthetic())
        images = test_images(splits)
        if images is None:
            raise UsageError(f"{root} has {not_measured(splits)}, so nothing can be measured")
        objects = read_objects(config.data.boxes, images)
        device = pick_device(config.run.device, processes.local_rank, processes.local_ranks)
        dtype = pick_dtype(config.run.precision, device)
        workers = pick_workers(config.data.workers, processes.local_ranks)
        classifiers = Classifiers(config.knn, config.linear)
        evaluation = Evaluation(splits, images, device, dtype, workers, console, classifiers, objects, processes)
        initial = evaluation.measure_file(frozen, "frozen init") if frozen else None
        results = evaluation.results(weights, initial)
        show(results, console)
        if processes.first:
            write_results(weights.parent / "results.json", results)
        console.print(f"results: {weights.parent / 'results.json'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
