"""`python bench/growth.py [--png FILE]`: seconds and peak memory as images, queue, detectors and processes grow.

Each row is a process of its own, so that its peak memory is its own; its seconds are of the work alone, without what
Python and torch take to start. Images are JPEGs of 64 x 64 pixels without labels, a thousand of them drawn and the
others links to these; the network is ResNet-18 with random weights at 64 px. `--show FILE` prints kept results.
"""

from __future__ import annotations

import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.baselines import PAPER, Setting, ours
from bench.end_to_end import machine
from bench.process import measure, python_path
from bench.report_tables import RESULTS, table
from bench.same_maths import make_batches
from fastcr.config import DataConfig, RunConfig
from fastcr.data.layouts import read_splits
from fastcr.data.loaders import make_views
from fastcr.encoders.encoder import load
from fastcr.errors import UsageError
from fastcr.measures.embeddings import embed
from fastcr.measures.knn import knn
from fastcr.measures.retrieval import retrieval
from fastcr.presets import preset
from fastcr.runs.command_line import called, one_line_errors, parse
from fastcr.runs.log import progress
from fastcr.runs.machine import pick_workers
from fastcr.train import train

DRAWN, SIDE, BATCH, STEPS, TIMED = 1000, 64, 64, 20, 8
DIM, CLASS = 512, 20  # of the embeddings that are scored: numbers, images of a class
CPU = torch.device("cpu")
QUIET = Console(file=io.StringIO())


def setting(queue_size: int) -> Setting:
    """The step that is timed."""
    return Setting("resnet18", "layer4", SIDE, 32, queue_size)


def training(root: Path, out: Path) -> Any:
    """The preset `folder` for these images, from random weights, for `STEPS` steps."""
    config = preset("folder")
    return replace(
        config,
        run=RunConfig(dir=out, steps=STEPS, device="cpu"),
        data=DataConfig(root=root, image_size=SIDE),
        model=replace(config.model, backbone="resnet18", weights="none", batchnorm="frozen"),
        optim=replace(config.optim, batch_size=BATCH, epochs=1000),
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def list_images(root: Path, _: int, __: Path) -> float:
    """Find the images of a folder."""
    return timed(lambda: read_splits(root))


def cache_images(root: Path, _: int, out: Path) -> float:
    """Measure and decode all images into main memory, as training does before its first step."""
    config = replace(training(root, out), data=DataConfig(root=root, image_size=SIDE, cache="host"))
    images = read_splits(root).train
    return timed(lambda: make_views(config, images, CPU, torch.bfloat16, QUIET))


def train_steps(root: Path, _: int, out: Path) -> float:
    """A whole `fastcr train folder`, from listing to the saved run, of as many steps each time."""
    return timed(lambda: train(training(root, out), console=QUIET))


def embed_images(root: Path, _: int, out: Path) -> float:
    """Both embeddings of all images, in memory, by the run that `train_steps` left."""
    encoder, images, workers = load(out / "weights.safetensors"), read_splits(root).train, pick_workers(None)
    options: dict[str, Any] = {"device": CPU, "workers": workers, "console": QUIET, "dtype": torch.bfloat16}
    return timed(lambda: embed(encoder, images, title="", **options))


def embeddings(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy embeddings `[count,DIM]` around one centre a class, and their labels."""
    random, labels = torch.Generator().manual_seed(0), torch.arange(count) // CLASS
    found = torch.randn(count, DIM, generator=random).mul_(2.5)
    found += torch.randn(int(labels[-1]) + 1, DIM, generator=random)[labels]
    return torch.nn.functional.normalize(found, dim=1), labels


def score_retrieval(_: Path, count: int, __: Path) -> float:
    """Each image retrieved from all others, once: a table of `fastcr evaluate` scores several poolings."""
    vectors, labels = embeddings(count)
    return timed(lambda: retrieval(vectors, labels))


def score_knn(_: Path, count: int, __: Path) -> float:
    """A tenth as many images again, classified by their neighbours among these."""
    vectors, labels = embeddings(count)
    return timed(lambda: knn(vectors, labels, vectors[: count // 10], int(labels[-1]) + 1))


def step_seconds(queue_size: int, detectors: int) -> float:
    """One step of MoCo v2 with the fit of the attention, eager on the CPU; the median of `TIMED`."""
    recipe = replace(PAPER, rationale=replace(PAPER.rationale, detectors=detectors))
    built = ours(setting(queue_size), CPU, recipe=recipe)
    (batch,) = make_batches(setting(queue_size), CPU, built, 1)
    return statistics.median([timed(lambda: built.step(batch)) for _ in range(TIMED + 2)][2:])


JOBS: dict[str, Callable[[Path, int, Path], float]] = {
    "images: listing": list_images,
    "images: cache": cache_images,
    f"images: training, {STEPS} steps": train_steps,
    "images: embedding": embed_images,
    "images: retrieval, one pooling": score_retrieval,
    "images: kNN": score_knn,
    "queue: one step": lambda _, size, __: step_seconds(size, PAPER.rationale.detectors),
    "detectors: one step": lambda _, count, __: step_seconds(4096, count),
}
PROCESSES = f"processes: training, {STEPS} steps"


@dataclass(frozen=True)
class GrowthConfig:
    """How far it grows."""

    images: tuple[int, ...] = (1000, 10_000, 100_000)
    """Numbers of images."""
    queue: tuple[int, ...] = (1024, 4096, 16_384, 65_536)
    """Sizes of the queue."""
    detectors: tuple[int, ...] = (1, 8, 32, 128)
    """Numbers of detectors."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes that share each batch; both train on the first number of images."""
    out: Path | None = None
    """File of the results. Default: bench/results/growth_cpu_<torch>_<date>.json."""
    png: Path | None = None
    """Also draw them into this file; needs matplotlib."""
    show: Path | None = None
    """Print the table of this file of results, and run nothing."""


def draw_images(root: Path, count: int) -> None:
    """A folder of `count` small JPEGs, `DRAWN` of them different."""
    root.mkdir()
    for i in range(count):
        path = root / f"{i:06d}.jpg"
        if i >= DRAWN:
            os.link(root / f"{i % DRAWN:06d}.jpg", path)
            continue
        coarse = np.random.default_rng([1, i]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)


def rows(config: GrowthConfig) -> list[tuple[str, int]]:
    """What is measured: the job, and how large it is."""
    sizes = {"images": config.images, "queue": config.queue, "detectors": config.detectors}
    found = [(job, size) for job in JOBS for size in sizes[job.partition(":")[0]]]
    return [*found, *((PROCESSES, count) for count in config.processes)]


def run(config: GrowthConfig, work: Path, console: Console) -> dict[str, Any]:
    """Every row in a process of its own; the results."""
    for count in config.images:
        draw_images(work / f"images-{count}", count)
    environment = python_path() | {"XDG_CACHE_HOME": str(work / "cache")}
    found = []
    for job, size in progress(rows(config), "rows", console=console):
        if job == PROCESSES:
            root, out = work / f"images-{config.images[0]}", work / f"processes-{size}"
            flags = f"--run.device cpu --run.steps {STEPS} --optim.epochs 1000 --optim.batch_size {BATCH} "
            flags += f"--data.image_size {SIDE} --model.backbone resnet18 --model.weights none --model.batchnorm frozen"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
            command = [*launch, "-m", "fastcr.train", "folder", "--data.root", str(root), "--run.dir", str(out)]
            command += flags.split()
        else:
            command = [sys.executable, __file__, "--row", job, str(size), str(work)]
        seen = measure(command, environment=environment)
        found.append(
            {
                "job": job,
                "size": size,
                "seconds": seen.facts.get("seconds", seen.seconds),
                "peak_bytes": max(seen.peak_bytes, seen.facts.get("peak_bytes", 0)),
            }
        )
    return {"machine": machine(str(torch.get_num_threads())), "rows": found}


def row(job: str, size: int, work: Path) -> None:
    """One row, in this process: prints its seconds and the most memory that this process held."""
    out = work / f"run-{size}"
    seconds = JOBS[job](work / f"images-{size}", size, out)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown, with what each size takes beside the size before."""
    where, lines = results["machine"], []
    before: dict[str, dict[str, Any]] = {}
    for each in results["rows"]:
        last = before.get(each["job"])
        before[each["job"]] = each
        grown = [each["size"] / last["size"], each["seconds"] / last["seconds"]] if last else []
        ratios = [f"{ratio:.3g}" for ratio in grown] or ["", ""]
        lines.append(
            [each["job"], f"{each['size']:,}", f"{each['seconds']:.3g}", f"{each['peak_bytes'] / 1e9:.2f}", *ratios]
        )
    columns = ["work", "size", "seconds", "peak memory, GB", "times the size before", "times its seconds"]
    head = f"**CPU {where['cpu']}, {where['threads']} threads**, torch {where['torch']}"
    return "\n".join([head, "", *table(columns, lines)])


def draw(results: dict[str, Any], picture: Path) -> None:
    """Seconds and memory over the size; dashed: in proportion to the size."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--png needs matplotlib: pip install 'fastcr[report]'") from None
    kinds = list(dict.fromkeys(each["job"].partition(":")[0] for each in results["rows"]))
    figure = Figure(figsize=(3.2 * len(kinds), 5.5), dpi=200, layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        mine = [each for each in results["rows"] if each["job"].startswith(f"{kind}:")]
        sizes, times = sorted({each["size"] for each in mine}), [each["seconds"] for each in mine]
        for axes, what, scale in ((panels[0, column], "seconds", 1), (panels[1, column], "peak_bytes", 1e9)):
            for job in dict.fromkeys(each["job"] for each in mine):
                points = [(each["size"], each[what] / scale) for each in mine if each["job"] == job]
                axes.semilogx(*zip(*points, strict=True), marker="o", markersize=3, label=job.partition(": ")[2])
                start, end = points[0][0], points[-1][0]
                line = [points[0][1], points[0][1] * end / start]
                if what == "seconds":
                    axes.plot([start, end], line, color="#bbbbbb", linewidth=0.7, linestyle="--", zorder=0)
            axes.set_ylabel("seconds" if what == "seconds" else "peak memory, GB", fontsize=8)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.minorticks_off()
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        if max(times) > 20 * min(times):
            panels[0, column].set(yscale="log", ylim=(min(times) / 2, 2 * max(times)))
            panels[0, column].yaxis.set_major_formatter("{x:g}")
        else:
            panels[0, column].set_ylim(0, 1.3 * max(times))
        panels[1, column].set_ylim(0, 1.1e-9 * max(each["peak_bytes"] for each in mine))
        panels[0, column].set_title(kind, fontsize=9, loc="left")
        panels[0, column].legend(fontsize=6, frameon=False)
    figure.savefig(picture)


def main(args: Sequence[str]) -> None:
    """Measure, keep the results, print and draw them."""
    with one_line_errors("bench/growth.py"):
        if args[:1] == ["--row"]:  # one of our own children
            return row(args[1], int(args[2]), Path(args[3]))
        config = parse(GrowthConfig, args, prog=called("bench/growth.py"), description=__doc__)
        if config.show:
            results = json.loads(config.show.read_text())
        else:
            with tempfile.TemporaryDirectory() as work:
                results = run(config, Path(work), Console(markup=False, stderr=True))
            where = results["machine"]
            out = config.out or RESULTS / f"growth_cpu_{where['torch'].partition('+')[0]}_{where['date']}.json"
            out.write_text(json.dumps(results, indent=1) + "\n")
        print(tables(results))
        if config.png:
            draw(results, config.png)


if __name__ == "__main__":
    main(sys.argv[1:])
