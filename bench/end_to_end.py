"""`python bench/end_to_end.py [--images 1000]`: the whole job on one folder of JPEGs, fastcr's beside other libraries'.

The job: start, train a network from random weights for a few epochs, write the embeddings of all images. Each way does
it with its own loader and views, but with the same network, size of the views, batch, epochs, loader processes,
threads and in bf16. Each command is a process of its own; the ways take turns. timm takes part in the second half
alone, and the retrieval of fastcr.measures stands beside two other libraries'. `--show FILE` prints kept results.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.process import ROOT, measure, python_path
from bench.report import RESULTS, table
from fastcr.config import number
from fastcr.errors import UsageError
from fastcr.runs.command_line import called, one_line_errors, parse
from fastcr.runs.context import progress
from fastcr.runs.machine import pick_workers

BACKBONE = "resnet18"  # with random weights
FEW = 8  # images: what embedding them takes is start-up
CLASS, DIM, SPREAD = 20, 512, 2.5  # of the embeddings that are scored: images a class, numbers, noise over the centres
FASTCR = (sys.executable, "-m", "fastcr")
WAYS = {  # what each is, and the package it needs
    "fastcr": ("fastcr, the preset folder", "fastcr"),
    "lightly": ("lightly, its MoCo v2 example", "lightly"),
    "lightly-tuned": ("the same, tuned by us", "lightly"),
    "lightlytrain": ("LightlyTrain, SimCLR", "lightly_train"),
    "timm-tuned": ("timm, channels-last", "timm"),
    "pytorch-metric-learning": ("pytorch-metric-learning", "pytorch_metric_learning"),
    "open-metric-learning": ("Open Metric Learning", "oml"),
}
TRAINED = ("fastcr", "lightly", "lightly-tuned", "lightlytrain")
PHASES = {
    "train": TRAINED,
    "few": (*TRAINED, "timm-tuned"),
    "embed": (*TRAINED, "timm-tuned"),
    "retrieval": ("fastcr", "pytorch-metric-learning", "open-metric-learning"),
}


@dataclass(frozen=True)
class EndToEndConfig:
    """What is done, and how often."""

    images: int = number(1000, FEW)
    """JPEGs of 500 x 375 pixels."""
    turns: int = number(3, 1)
    """How often each command is run; medians are shown."""
    epochs: int = number(2, 1)
    """Of each training."""
    batch: int = number(64, 2)
    """Images a step."""
    size: int = number(112, 32)
    """Side of the views, pixels."""
    threads: int | None = number(None, 1)
    """Of torch, and loader processes of each way. Default: the cores there are."""
    only: tuple[str, ...] = ()
    """Ways to run. Default: all that are installed."""
    oml_python: Path | None = None
    """Python of an environment with open-metric-learning, whose versions for today's PyTorch need NumPy 1."""
    out: Path | None = None
    """File of the results. Default: bench/results/end_to_end_<device>_<torch>_<date>.json."""
    show: Path | None = None
    """Print the tables of this file of results, and run nothing."""


def draw_photos(folder: Path, count: int) -> None:
    """JPEGs of the size and weight of photographs, the same in every run."""
    folder.mkdir()
    for i in range(count):
        rng = np.random.default_rng([0, i])
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (375, 500, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)


def draw_embeddings(file: Path, count: int) -> None:
    """Noisy embeddings `[count,DIM]` of unit length around one centre for each class of `CLASS` images."""
    rng, labels = np.random.default_rng(0), np.arange(count) // CLASS
    found = rng.normal(size=(labels[-1] + 1, DIM))[labels] + SPREAD * rng.normal(size=(count, DIM))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    np.savez(file, embeddings=found.astype(np.float32), labels=labels)


def command_of(config: EndToEndConfig, way: str, phase: str, work: Path, turn: int) -> list[str]:
    """The command line of one job; `work` holds the images, and what the ways write."""
    out, workers = work / f"{way}-{turn}", str(pick_workers(config.threads))
    images = work / ("few" if phase == "few" else "photos")
    if way == "fastcr" and phase != "retrieval":
        common = ["--data.workers", workers, "--run.device", "cpu", "--run.precision", "bf16"]
        if phase != "train":
            return [*FASTCR, "embed", str(out / "run"), str(images), "--out", str(out / phase), *common]
        return [
            *FASTCR, "train", "folder", "--data.root", str(images), "--run.dir", str(out / "run"),
            "--model.backbone", BACKBONE, "--model.weights", "none",
            "--model.batchnorm", "frozen",  # as with the pretrained weights that the preset is for
            "--data.image_size", str(config.size), "--optim.batch_size", str(config.batch),
            "--optim.epochs", str(config.epochs), *common,
        ]  # fmt: skip
    settings = {
        "images": str(images), "out": str(out), "embeddings": str(work / "embeddings.npz"), "workers": int(workers),
        "backbone": BACKBONE, **{name: getattr(config, name) for name in ("batch", "epochs", "size")},
    }  # fmt: skip
    python = str(config.oml_python) if way == "open-metric-learning" and config.oml_python else sys.executable
    job = "embed" if phase == "few" else phase
    return [python, str(ROOT / "bench" / "end_to_end_jobs.py"), way, job, json.dumps(settings)]


def missing(config: EndToEndConfig) -> dict[str, str]:
    """Ways that cannot be run here, and why."""
    found = {}
    for way, (_, package) in WAYS.items():
        if config.only and way not in config.only:
            found[way] = "not asked for"
        elif way == "open-metric-learning" and config.oml_python:
            continue
        elif find_spec(package) is None:
            hint = "; it needs NumPy 1, so an environment of its own: --oml-python" if package == "oml" else ""
            found[way] = f"not installed{hint}"
    return found


def run(config: EndToEndConfig, work: Path, console: Console) -> dict[str, Any]:
    """Every command in turn; the results."""
    absent = missing(config)
    runs: list[dict[str, Any]] = []
    draw_photos(work / "photos", config.images)
    draw_photos(work / "few", FEW)
    draw_embeddings(work / "embeddings.npz", config.images)
    threads = str(pick_workers(config.threads))
    environment = python_path() | {"OMP_NUM_THREADS": threads, "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
    jobs = [
        (turn, way, phase)
        for turn in range(config.turns)
        for phase, ways in PHASES.items()
        for way in (ways if turn % 2 == 0 else ways[::-1])  # whoever comes first does so every other turn
    ]
    for turn, way, phase in progress(jobs, "commands", console=console):
        if way in absent:
            continue
        (work / f"{way}-{turn}").mkdir(exist_ok=True)
        command = command_of(config, way, phase, work, turn)
        try:
            found = measure(command, mark="first step", environment=environment)
            runs.append({"way": way, "phase": phase, "turn": turn, **found._asdict()})
        except UsageError as error:
            absent[way] = f"{phase}: {error}"
    return {"machine": machine(threads), "settings": settings_of(config), "missing": absent, "runs": runs}


def settings_of(config: EndToEndConfig) -> dict[str, Any]:
    """What was done, for the file of results."""
    return {
        "backbone": BACKBONE,
        **{name: getattr(config, name) for name in ("images", "turns", "epochs", "batch", "size")},
    }


def machine(threads: str) -> dict[str, Any]:
    """Where it was done."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "cpu": (names or [platform.machine()])[0], "threads": int(threads), "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "load_before": os.getloadavg()[0],
    }  # fmt: skip


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown: the whole job, the retrieval, and what is missing."""
    where, settings = results["machine"], results["settings"]
    head = f"**CPU {where['cpu']}, {where['threads']} threads**, torch {where['torch']}"
    sizes = (
        f"{settings['images']} JPEGs of 500 x 375, {settings['backbone']} at {settings['size']} px, batch "
        f"{settings['batch']}, {settings['epochs']} epochs, bf16; medians of {settings['turns']}, lowest to highest."
    )
    lines = [head, "", *job_table(results["runs"]), "", sizes]
    if scored := [each for each in results["runs"] if each["phase"] == "retrieval"]:
        lines += ["", *retrieval_table(scored)]
    lines += [f"- {WAYS[way][0]}: {why}" for way, why in results["missing"].items() if why != "not asked for"]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """The median, and the lowest and highest of several values."""
    if not values:
        return ""
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.1f}, {max(values):.1f}]"


def job_table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One row a way: seconds of the two commands, of their start-up and of both, and the most memory."""
    rows = []
    for way in PHASES["embed"]:
        mine = [each for each in runs if each["way"] == way]
        of = {phase: [each for each in mine if each["phase"] == phase] for phase in PHASES}
        seconds = {phase: [each["seconds"] for each in of[phase]] for phase in PHASES}
        if not of["embed"]:
            continue
        both = [a + b for a, b in zip(seconds["train"], seconds["embed"], strict=True)] if of["train"] else []
        peak = max((each["peak_bytes"] for phase in ("train", "embed") for each in of[phase]), default=0)
        first = [each["first"] for each in of["train"] if each["first"] is not None]
        shown = (both, seconds["train"], first, seconds["embed"], seconds["few"])
        rows.append([WAYS[way][0], *map(spread, shown), f"{peak / 1e9:.2f}"])
    columns = ["way", "both, s", "train, s", "of it to the end of step 1, s", "embed, s", f"embed {FEW} images, s"]
    return table([*columns, "peak memory, GB"], rows)


def retrieval_table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One row a library: seconds and memory of scoring the same embeddings."""
    rows = []
    for way in PHASES["retrieval"]:
        if mine := [each for each in runs if each["way"] == way]:
            facts, peak = mine[0]["facts"], max(each["peak_bytes"] for each in mine)
            scoring = spread([1e3 * each["facts"]["scoring"] for each in mine])
            scores = [f"{facts[score]:.2f}" for score in ("rank1", "mAP")]
            name, whole = WAYS[way][0].split(",")[0], spread([each["seconds"] for each in mine])
            rows.append([name, scoring, whole, f"{peak / 1e9:.2f}", *scores])
    columns = ["retrieval, whole ranking", "scoring, ms", "its process, s", "peak memory, GB", "rank-1, %", "mAP, %"]
    return table(columns, rows)


def main(args: Sequence[str]) -> None:
    """Measure, keep the results and print their tables."""
    with one_line_errors("bench/end_to_end.py"):
        config = parse(EndToEndConfig, args, prog=called("bench/end_to_end.py"), description=__doc__)
        if config.show:
            print(tables(json.loads(config.show.read_text())))
            return
        if unknown := set(config.only) - WAYS.keys():
            raise UsageError(f"--only: no way {min(unknown)} (there are {', '.join(WAYS)})")
        with tempfile.TemporaryDirectory() as work:
            results = run(config, Path(work), Console(markup=False, stderr=True))
        where = results["machine"]
        name = f"end_to_end_cpu_{where['torch'].partition('+')[0]}_{where['date']}.json"
        out = config.out or RESULTS / name
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(tables(results))
        print(f"kept as {out}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
