"""One run of a study: a training, its evaluation, and a look at its GradCAM, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.evidence_rows import FROZEN, MEAN_POOLED, MOCO_V2, ROWS
from fastcr.runs.command_line import load_config

ROOT = Path(__file__).resolve().parents[1]
READING = threading.Lock()  # tyro keeps what it parses in globals, and two runs may end at once
# of the first edition's rows, unless they say otherwise: MoCo v2's settings, BatchNorm with the batch's statistics
PRESET = ("folder", *MEAN_POOLED.split(), *MOCO_V2.split(), "--model.batchnorm", "local")
Run = dict[str, Any]  # its entry of evidence.json
KEPT = ("retrieval", "retrieval_centred", "best", "knn", "localisation")  # of results.json


class Job(NamedTuple):
    """One run, and what it needs to know of its study."""

    row: str
    seed: int
    data: Path  # what it is trained on
    boxes: Path | None
    common: tuple[str, ...]  # flags of every run
    folder: Path
    threads: int


@dataclass
class Processes:
    """Those that are at work; once stopped, none is begun any more."""

    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopped: bool = False

    def run(self, command: Sequence[str], log: Path, threads: int) -> int:
        """Exit status of fastcr's `command`, in a session of its own: a Ctrl-C reaches it once, through `stop`."""
        packages = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": packages}
        with log.open("ab", buffering=0) as file:
            file.write(f"\n== {' '.join(command)}\n".encode())
            process = subprocess.Popen(
                [sys.executable, "-u", *command], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self.running.add(process)
        if self.stopped:
            process.terminate()
        status = process.wait()
        self.running.discard(process)
        return status

    def stop(self) -> None:
        """Let trainings save and end."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def training(job: Job) -> list[str]:
    """Arguments of `fastcr.train` for a run from its beginning."""
    flags = ROWS[job.row][1]
    preset = () if flags and not flags[0].startswith("-") else PRESET
    own = ("--run.seed", str(job.seed), "--run.dir", str(job.folder), "--data.root", str(job.data))
    return [*(preset or flags[:1]), *job.common, *(flags if preset else flags[1:]), *own]


def measuring(job: Job) -> list[str]:
    """Arguments that `fastcr.evaluate` and gradcam_inside.py share, for a run that has been trained."""
    with READING:
        config = load_config(job.folder / "config.yaml")
    workers = [] if config.data.workers is None else ["--data.workers", str(config.data.workers)]
    boxes = [] if job.boxes is None else ["--data.boxes", str(job.boxes)]
    return [str(job.folder), "--run.device", config.run.device, *workers, *boxes]


def carry_out(job: Job, processes: Processes, say: Callable[[str], None]) -> Run | None:
    """Train, evaluate, look at the GradCAM; the run's entry of evidence.json, None if it was stopped by a signal."""
    start, log = time.monotonic(), job.folder.with_name(f"{job.folder.name}.log")
    meaning, flags = ROWS[job.row]
    entry: Run = {"row": job.row, "seed": job.seed, "meaning": meaning, "flags": list(flags), "facts": facts()}
    resumed, frozen = (job.folder / "resume.pt").exists(), job.row == FROZEN
    train = ["--resume", str(job.folder)] if resumed else training(job)
    steps: list[tuple[str, Callable[[], list[str]]]] = [
        ("training", lambda: ["-m", "fastcr.train", *train]),
        ("measuring", lambda: ["-m", "fastcr.evaluate", *measuring(job), "--linear.enabled", "False"]),
        ("GradCAM", lambda: [str(ROOT / "bench" / "gradcam_inside.py"), *measuring(job)]),
    ]
    # a GradCAM needs a head and a queue that have been trained
    for what, command in steps[:2] if frozen else steps:
        say(what)
        status = processes.run(command(), log, job.threads)
        if status < 0 or status > 128:
            return None
        if status:
            return entry | {"status": f"{what} failed", "error": last_line(log)}
    # how long it took before it was stopped is not known
    seconds = None if resumed else round(time.monotonic() - start, 1)
    return entry | {"status": "finished", "seconds": seconds} | read_run(job.folder, frozen=frozen)


def read_run(folder: Path, *, frozen: bool) -> Run:
    """What evidence.json keeps of a run folder; `frozen`: of its initial weights."""
    read: Callable[[str], Run] = partial(json.loads, parse_float=lambda number: round(float(number), 4))
    results = read((folder / "results.json").read_text())
    part = results["frozen_init"] if frozen else results
    found = {key: part[key] for key in KEPT if key in part}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = read(lines[-1]) if lines else {}  # no line where nothing was trained
    keys = (
        *("step", "contrast_loss", "fit_loss", "attention_entropy", "effective_detectors"),
        *("effective_rank", "kept_neighbours"),
    )
    found |= {"images": results["images"], "last": {key: last[key] for key in keys if key in last}}
    return found if frozen else found | {"gradcam": read((folder / "gradcam.json").read_text())}


def last_line(log: Path) -> str:
    """The last line that says something, its paths without their folders."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"(?<!\S)[('\"]*/(?:[^\s/]+/)+", "", lines[-1])


def facts() -> dict[str, Any]:
    """What a run is made with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"torch": torch.__version__, "commit": commit or None, "device": device}
