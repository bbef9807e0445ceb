"""`python bench/protocol.py --data.root DIR --out STUDY`: tune on half of the classes, retrieve among the other half.

This is the protocol of metric learning: all pictures of the first half of the classes are trained on, without labels,
and all pictures of the second half are searched, each by the others. The encoder is measured where the run began, half
way and three quarters of the way to its end, and at the end: no epoch is chosen. What follows `--` goes to
`fastcr train folder`. The same command goes on with a study that was stopped.

With `--pictures N` training gets N pictures of the official training split alone. The official test split of the same
classes is then searched too, so that several such studies say how many pictures it takes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.evidence import carry_out, facts, last_line
from fastcr import load
from fastcr.config import EncoderConfig, number
from fastcr.data.crop_loader import KeptCrops
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.errors import UsageError
from fastcr.measures.embeddings import embed
from fastcr.measures.poolings import gem
from fastcr.measures.reranking import expand, reciprocal, whiten
from fastcr.measures.results import less_mean
from fastcr.measures.retrieval import retrieve_each
from fastcr.method.ddt import evenly
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called, one_line_errors, parse, read_command_line
from fastcr.runs.context import Context

POINTS = (0.0, 0.5, 0.75, 1.0)  # on the way from the initial weights to the trained ones


@dataclass(frozen=True)
class ProtocolData:
    """The images."""

    root: Path
    """Folder with train/<class> and test/<class>, whose class folders sort as the classes are numbered."""


@dataclass(frozen=True)
class ProtocolConfig:
    """What to train on, and where to put it."""

    out: Path
    """Folder of the study: protocol.json, run folders, logs."""
    data: ProtocolData
    seeds: tuple[int, ...] = number((0, 1, 2), 0)
    """A run for each."""
    pictures: int | None = number(None, 2)
    """Train on so many pictures of the training split alone. Default: on all pictures of both splits."""
    run: EncoderConfig = field(default_factory=EncoderConfig)


def linked(root: Path, out: Path, pictures: int | None) -> dict[str, Path]:
    """Folders in `out` with links to the pictures that are trained on, and to those that are searched."""
    classes = sorted(path.name for path in (root / "train").glob("[!.]*") if path.is_dir())
    if len(classes) < 2:
        raise UsageError(f"{root / 'train'} needs class folders, and has {len(classes)}")
    half = len(classes) // 2
    found = {
        (split, part): [file for name in names for file in sorted((root / split / name).glob("[!.]*"))]
        for split in ("train", "test")
        for part, names in (("same", classes[:half]), ("other", classes[half:]))
    }
    every = found["train", "same"]
    chosen = {"train": every + found["test", "same"], "other kinds": found["train", "other"] + found["test", "other"]}
    if pictures:
        some = [every[index] for index in evenly(len(every), pictures)]
        chosen |= {"train": some, "same kinds": found["test", "same"], "other kinds": found["test", "other"]}
    for part, files in chosen.items():
        for file in files:
            split, name = file.parts[-3], file.parts[-2]
            place = out / part / name / f"{split}-{file.name}"  # the splits may number their files alike
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                place.symlink_to(file.resolve())
    return {part: out / part for part in chosen}


def scores_of(vectors: Tensor, labels: Tensor, **options: Any) -> dict[str, float]:
    """Recall at 1, 2, 4 and 8 and mAP of embeddings `[N,C]`, percent; each image is a query, and not its own answer."""
    found = retrieve_each(vectors, labels, **options)
    recalls = {f"recall {k}": (found.rank <= k).double() for k in (1, 2, 4, 8)}
    return {name: round(100 * each.mean().item(), 2) for name, each in (recalls | {"mAP": found.precision}).items()}


def precision_at_r(vectors: Tensor, labels: Tensor) -> float:
    """mAP@R, percent: average precision over a query's first R answers, R the number of other images of its class."""
    similar = (vectors @ vectors.T).fill_diagonal_(-torch.inf)
    right = labels[similar.argsort(dim=1, descending=True)] == labels[:, None]
    ranks = torch.arange(1, len(labels) + 1)
    among = right & (ranks <= torch.bincount(labels)[labels][:, None] - 1)
    sums = (among * right.cumsum(1) / ranks).sum(1)
    return round(100 * (sums / (torch.bincount(labels)[labels] - 1).clamp(min=1)).mean().item(), 2)


def measure(run: Path, images: ImageList, context: Context, load_crops: KeptCrops) -> dict[str, Any]:
    """The scores of a run's encoder at each of `POINTS`, by each pooling, plain and re-ranked."""
    found = {}
    for point in POINTS:
        encoder = load(run, context.device, tuned=point)
        title = f"{run.name}, {point:g} of the way"
        seen = embed(encoder, images, context, title=title, poolings={"gem": gem}, load=load_crops)
        labels = torch.tensor(images.labels)[seen.kept]
        named = {
            "mean": seen.mean,
            "attention": seen.rationale,
            **seen.others,
        }  # the class token too, where there is one
        scores = found[f"{point:g}"] = dict[str, Any]()
        for pooling, vectors in named.items():
            if vectors is None:
                continue
            centred, half_white = less_mean(vectors), whiten(vectors, vectors)
            scores[pooling] = scores_of(vectors, labels) | {"mAP@R": precision_at_r(vectors, labels)}
            scores[f"{pooling}, mean subtracted"] = scores_of(centred, labels)
            scores[f"{pooling}, whitened, expanded"] = scores_of(expand(half_white), labels)
            scores[f"{pooling}, k-reciprocal"] = scores_of(centred, labels, similarity=reciprocal(centred))
    return found


def study(config: ProtocolConfig, common: tuple[str, ...], context: Context) -> None:
    """Train and measure what the study does not hold yet. `UsageError` for what cannot work."""
    config.out.mkdir(parents=True, exist_ok=True)
    out, path = config.out.resolve(), config.out / "protocol.json"
    places, crops = linked(config.data.root, out, config.pictures), KeptCrops()
    searched = {part: read_splits(place).train for part, place in places.items() if part != "train"}
    count = len(read_splits(places["train"]).train)
    flags = [Path(each).name if os.sep in each else each for each in common]  # the rest of a path is of this machine
    begun = {"data": config.data.root.resolve().name, "pictures": count, "flags": flags}
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else begun | {"runs": {}}
    if any(found[key] != value for key, value in begun.items()):
        raise UsageError(f"{path} was begun with other images or flags: name another --out")
    for seed in config.seeds:
        run = out / f"seed{seed}"
        own = ("--run.seed", str(seed), "--run.dir", str(run), "--data.root", str(places["train"]))
        read_command_line(["folder", *common, *own])  # a mistake is found before anything runs
        resumed = (run / "resume.pt").exists()
        train = ["-m", "fastcr.train", *(["--resume", str(run)] if resumed else ["folder", *common, *own])]
        log = out / f"{run.name}.log"
        if f"seed{seed}" not in found["runs"]:
            if carry_out(train, log):
                raise UsageError(f"{run.name}: {last_line(log)}")
            scores = {part: measure(run, images, context, crops) for part, images in searched.items()}
            found["runs"][f"seed{seed}"] = {"facts": facts(), **scores}
            write_whole(path, lambda file: file.write_text(json.dumps(found, indent=1) + "\n"))
        for part in searched:
            ends = [found["runs"][f"seed{seed}"][part][point]["mean"] for point in ("0", "0.5", "0.75", "1")]
            line = " -> ".join(f"{each['recall 1']:.1f}/{each['mAP']:.1f}" for each in ends)
            context.say(f"seed {seed}, {part}, mean: {line}")
    context.say(f"results: {path}")


def main(args: Sequence[str]) -> None:
    """Carry out the protocol as `args` say; what follows `--` is for `fastcr.train`."""
    at = args.index("--") if "--" in args else len(args)
    with one_line_errors("bench/protocol.py"):
        config = parse(ProtocolConfig, args[:at], prog=called("bench/protocol.py"), description=__doc__)
        context = Context.of(config.run.device, config.run.precision, console=Console(markup=False))
        study(config, tuple(args[at + 1 :]), context)


if __name__ == "__main__":
    main(sys.argv[1:])
