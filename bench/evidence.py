"""`python bench/evidence.py --data.root DIR --out STUDY`: which choices make the method work, as a table of runs.

A run is a row of `ROWS` with a seed. `fastcr.train` and `fastcr.evaluate`, each in a process of its own,
write into the run folder STUDY/<row>-seed<N> and print into the .log beside it. What follows `--` goes to
every training, before the row's own flags: `... --out STUDY -- --optim.epochs 10 --data.image_size 112`.

The same command resumes a study: a run that is in STUDY/evidence.json is not made again, and a training that was
stopped is resumed. A run that fails is recorded with the last line it printed, and tried again once its folder is
removed. `python bench/evidence_table.py STUDY/evidence.json` makes tables of the results.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from fastcr.config import number
from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called, load_config, one_line_errors, parse, read_command_line

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = "evidence.json"
Run = dict[str, Any]  # an entry of evidence.json, or the whole of it
KEPT = ("retrieval", "retrieval_centred", "reranked", "end", "best", "knn", "localisation")  # of results.json
LAST = (  # of the last line of metrics.jsonl
    *("step", "contrast_loss", "fit_loss", "attention_entropy", "effective_detectors"),
    *("effective_rank", "kept_neighbours"),
)

MEAN_POOLED = "--rationale.init random --moco.pooling mean --rationale.fit_weight 1"
MATCH, UNFITTED = "--rationale.fit_weight 1 --rationale.cam_keeps match", "--rationale.fit_weight 0"
MATCH_256 = f"--rationale.init ddt --moco.pooling rationale {MATCH} --moco.embedding_dim 256 --optim.warmup 0.1"
MOCO_V2 = (
    f"{MEAN_POOLED} --moco.objective infonce --moco.head mlp --moco.temperature 0.2 --moco.key_momentum 0.999 "
    "--views.key same --views.jitter 1 --views.grey 0.2 --views.blur 0.5 --optim.optimizer sgd --optim.lr 0.03 "
    "--optim.batch_size 128 --model.frozen_stages 0"
)
# name: what the row is, and the flags that it adds to `fastcr train folder`
ROWS = {
    "untrained": ("the initial weights; the detectors begin at DDT's attention", "--optim.epochs 0"),
    "relational": ("the preset with mean pooling, and an attention that is fitted from random detectors", MEAN_POOLED),
    "match-256-k1": (
        "the preset: one detector begins at DDT, is fitted to GradCAM of what makes the views similar, and pools in "
        "training too; the head keeps 256 axes, and the learning rate rises for a tenth of the steps",
        f"{MATCH_256} --rationale.detectors 1",
    ),
    "match-256": ("the preset with 32 detectors", MATCH_256),
    "match-512": ("match-256 with a head of 512 axes", MATCH_256.replace("256", "512")),
    "match-1280": ("match-256 with a head of 1,280 axes", MATCH_256.replace("256", "1280")),
    "fixed-256": ("match-256 with DDT's attention, which is not fitted", MATCH_256.replace(MATCH, UNFITTED)),
    "infonce": (
        "as relational, with InfoNCE: the own key is the positive, the queue's keys are negatives",
        f"{MEAN_POOLED} --moco.objective infonce",
    ),
    "moco-v2": ("MoCo v2's objective, optimiser and views; BatchNorm is frozen", MOCO_V2),
    "moco-v2-batchnorm": (
        "MoCo v2's objective, optimiser and views; BatchNorm uses the batch's statistics",
        f"{MOCO_V2} --model.batchnorm local",
    ),
}


@dataclass(frozen=True)
class StudyData:
    """The images."""

    root: Path
    """Folder of images, whatever `fastcr.train --data.root` takes."""
    boxes: Path | None = None
    """CSV of the objects' boxes, as for fastcr.evaluate."""
    classes: int | None = number(None, 1)
    """Only the first so many class folders of train/ and test/. Default: all."""
    skip: int = number(0, 0)
    """With --data.classes: skip so many class folders first, to check a choice on held-out classes."""


@dataclass(frozen=True)
class StudyConfig:
    """Which runs to make, and where."""

    out: Path
    """Folder of the study: evidence.json, run folders, logs."""
    data: StudyData
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows to run; ROWS in bench/evidence.py describes them."""
    seeds: tuple[int, ...] = number((0,), 0)
    """Every row is run with each; all rows with the first seed come first."""


class Job(NamedTuple):
    """One run, and what it needs to know of its study."""

    row: str
    seed: int
    folder: Path
    data: Path  # what it is trained on
    boxes: Path | None
    common: tuple[str, ...]  # flags of every run


def training(job: Job) -> list[str]:
    """Arguments of `fastcr.train` for a run from its beginning."""
    own = ("--run.seed", str(job.seed), "--run.dir", str(job.folder), "--data.root", str(job.data))
    return ["folder", *job.common, *ROWS[job.row][1].split(), *own]


def measuring(job: Job) -> list[str]:
    """Arguments of `fastcr.evaluate` for a run that has been trained."""
    config = load_config(job.folder / "config.yaml")
    workers = [] if config.data.workers is None else ["--data.workers", str(config.data.workers)]
    boxes = [] if job.boxes is None else ["--data.boxes", str(job.boxes)]
    return [str(job.folder), "--run.device", config.run.device, *workers, *boxes]


def carry_out(command: Sequence[str], log: Path) -> int:
    """Exit status of a Python command that prints into `log`; `UsageError` if a signal ended it.

    What interrupts this process is handed on, and the command may save before it ends.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("ab", buffering=0) as file:
        file.write(f"\n== {' '.join(command)}\n".encode())
        process = subprocess.Popen(  # in a session of its own, so that a Ctrl-C reaches it once
            [sys.executable, "-u", *command], env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status < 0 or status > 128:
        raise UsageError(f"{log.stem} was stopped by a signal; the same command resumes it")
    return status


def make(job: Job) -> Run:
    """Train and evaluate; the run's entry of evidence.json."""
    start, log = time.monotonic(), job.folder.with_name(f"{job.folder.name}.log")
    entry: Run = {"row": job.row, "seed": job.seed, "meaning": ROWS[job.row][0], "flags": ROWS[job.row][1].split()}
    entry["facts"] = facts()
    resumed = (job.folder / "resume.pt").exists()
    train = ["-m", "fastcr.train", *(["--resume", str(job.folder)] if resumed else training(job))]
    if carry_out(train, log):
        return entry | {"status": "training failed", "error": last_line(log)}
    if carry_out(["-m", "fastcr.evaluate", *measuring(job), "--all", "--linear.enabled", "False"], log):
        return entry | {"status": "measuring failed", "error": last_line(log)}
    seconds = None if resumed else round(time.monotonic() - start, 1)  # of a resumed run only the end was seen
    return entry | {"status": "finished", "seconds": seconds} | read_run(job.folder)


def read_run(folder: Path) -> Run:
    """What evidence.json keeps of a run folder."""
    read = partial(json.loads, parse_float=lambda text: round(float(text), 4))
    results: Run = read((folder / "results.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = read(lines[-1]) if lines else {}  # there is no line where nothing was trained
    found = {key: results[key] for key in ("images", *KEPT) if key in results}
    found["last"] = {key: last[key] for key in LAST if key in last}
    return found


def last_line(log: Path) -> str:
    """The last line that says something, its paths without their folders."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"(?<!\S)[('\"]*/(?:[^\s/]+/)+", "", lines[-1])


def facts() -> Run:
    """What a run is made with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"torch": torch.__version__, "commit": commit or None, "device": device}


def some_classes(data: StudyData, out: Path) -> Path:
    """A folder in `out` with links to the chosen class folders of each split; `UsageError` if there are none."""
    assert data.classes is not None
    folder = out / f"{data.root.name}-{data.skip}-{data.classes}"
    for split in ("train", "test"):
        classes = sorted(each for each in (data.root / split).glob("[!.]*") if each.is_dir())
        chosen = classes[data.skip : data.skip + data.classes]
        if not chosen:
            raise UsageError(f"--data.classes needs class folders, and there are none in {data.root / split}")
        (folder / split).mkdir(parents=True, exist_ok=True)
        for each in chosen:
            with suppress(FileExistsError):
                (folder / split / each.name).symlink_to(each.resolve())
    return folder


def open_study(config: StudyConfig, common: Sequence[str]) -> Run:
    """The study's evidence.json, or a new one; `UsageError` if it was begun with other images or flags."""
    path, data = config.out / EVIDENCE, config.data
    named = data.root.resolve().name
    if data.classes:
        named += f", classes {data.skip + 1} to {data.skip + data.classes}"
    flags = [Path(each).name if os.sep in each else each for each in common]  # the rest of a path is of this machine
    begun = {"data": named, "boxes": data.boxes and data.boxes.name, "common": flags}
    study: Run = json.loads(path.read_text()) if path.exists() else {**begun, "runs": {}}
    for key, value in begun.items():
        if study[key] != value:
            raise UsageError(f"{path} was begun with other {key}: {study[key]}, now {value}; name another --out")
    for name, run in study["runs"].items():
        if run["row"] in config.rows and run["status"] == "finished" and run["flags"] != ROWS[run["row"]][1].split():
            raise UsageError(f"{path}: {name} was made with other flags than its row has now: {' '.join(run['flags'])}")
    return study


def check(config: StudyConfig) -> None:
    """`UsageError` for what cannot work."""
    if unknown := [row for row in config.rows if row not in ROWS]:
        raise UsageError(f"no row {unknown[0]!r}: there are {', '.join(ROWS)}")
    if config.data.skip and not config.data.classes:
        raise UsageError("--data.skip needs --data.classes")
    if config.data.boxes and not config.data.boxes.is_file():
        raise UsageError(f"no file {config.data.boxes}")


def study(config: StudyConfig, common: tuple[str, ...], console: Console) -> None:
    """Make the runs that evidence.json does not have yet. `UsageError` for what cannot work."""
    check(config)
    config.out.mkdir(parents=True, exist_ok=True)
    out, data = config.out.resolve(), config.data
    found, path = open_study(config, common), out / EVIDENCE
    root = some_classes(data, out) if data.classes else data.root.resolve()
    boxes = data.boxes and data.boxes.resolve()
    jobs = [
        Job(row, seed, out / f"{row}-seed{seed}", root, boxes, common) for seed in config.seeds for row in config.rows
    ]
    for job in jobs:
        read_command_line(training(job))  # mistakes in the flags are found before anything runs
    for i, job in enumerate(jobs, 1):
        name, place = job.folder.name, f"{i}/{len(jobs)}  {job.folder.name}"
        before = found["runs"].get(name, {}).get("status")
        if before == "finished" or (before == "training failed" and job.folder.exists()):
            console.print(f"{place}  {before} before", highlight=False)
            continue
        start = time.monotonic()
        entry = found["runs"][name] = make(job)
        write_whole(path, lambda file: file.write_text(json.dumps(found, indent=1) + "\n"))
        said = (
            f"{place}  {(time.monotonic() - start) / 60:.1f} min  {entry['status']} {entry.get('error', '')}".rstrip()
        )
        for pooling, scores in entry.get("retrieval", {}).items():
            said += f"  rank-1 {pooling} {scores['rank1']:.2f}"
        console.print(said, highlight=False, soft_wrap=True)
    console.print(f"results: {path}", soft_wrap=True, highlight=False)


def main(args: Sequence[str]) -> None:
    """Make the study that `args` describe; what follows `--` is for `fastcr.train`."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as a Ctrl-C: a training saves and ends
    at = args.index("--") if "--" in args else len(args)
    with one_line_errors("bench/evidence.py"):
        config = parse(StudyConfig, args[:at], prog=called("bench/evidence.py"), description=__doc__)
        study(config, tuple(args[at + 1 :]), Console(markup=False))


if __name__ == "__main__":
    main(sys.argv[1:])
