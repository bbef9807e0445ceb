"""`python bench/evidence.py --data.root DIR --out STUDY`: which choices make the method work, as a table of runs.

A run is a row of `evidence_rows.py` with a seed: `fastcr.train`, `fastcr.evaluate` and `gradcam_inside.py`, each in a
process of its own, write into the run folder STUDY/<row>-seed<N> and print into the .log beside it. What follows `--`
goes to every training, before the row's own flags: `... --out STUDY -- --optim.epochs 10 --data.image_size 112`.

The same command resumes a study: a run that is in STUDY/evidence.json is not made again, a run that was stopped is
resumed. A run that fails is recorded with the last line it printed; a training that failed is tried again only once
its folder is removed. `python bench/evidence_table.py STUDY/evidence.json` makes tables and figures of the results.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.evidence_rows import FROZEN, ROWS
from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called, load_config, one_line_errors, parse, read_command_line, todays_flags

ROOT, EVIDENCE = Path(__file__).resolve().parents[1], "evidence.json"
READING = threading.Lock()  # tyro keeps what it parses in globals, and two runs may end at once
# the backbone learns at the rate of the rest, and keys follow slowly, unless a row says otherwise
PRESET = (
    *("folder", "--optim.backbone_warmup", "0"),
    *("--optim.backbone_lr", "None", "--moco.key_momentum", "0.999"),
)
Run = dict[str, Any]


@dataclass(frozen=True)
class StudyData:
    """The images."""

    root: Path
    """Folder of images, whatever `fastcr.train --data.root` takes."""
    boxes: Path | None = None
    """CSV of the objects' boxes, as for fastcr.evaluate."""
    classes: int | None = None
    """Only the first so many class folders of train/ and test/. Default: all."""
    skip: int = 0
    """With --data.classes: skip so many class folders first, to check a choice on classes it was not made on."""


@dataclass(frozen=True)
class StudyConfig:
    """Which runs to make, and where."""

    out: Path
    """Folder of the study: evidence.json, run folders, logs."""
    data: StudyData
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows to run; bench/evidence_rows.py describes them."""
    seeds: tuple[int, ...] = (0,)
    """Every row is run with each; all rows with the first seed come first."""
    jobs: int = 1
    """Runs at a time."""


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
    found = {key: part[key] for key in ("retrieval", "knn", "localisation") if key in part}
    last = read((folder / "metrics.jsonl").read_text().splitlines()[-1])
    keys = ("step", "contrast_loss", "fit_loss", "attention_entropy", "effective_detectors")
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


def some_classes(root: Path, skip: int, count: int, out: Path) -> Path:
    """A folder in `out` with links to `count` class folders of each of `root`'s splits. `UsageError` if it has none."""
    folder = out / (f"{root.name}-{skip}-{count}" if skip else f"{root.name}-{count}")
    for split in ("train", "test"):
        classes = sorted(each for each in (root / split).glob("[!.]*") if each.is_dir())[skip : skip + count]
        if not classes:
            raise UsageError(f"--data.classes needs class folders, and there are none in {root / split}")
        (folder / split).mkdir(parents=True, exist_ok=True)
        for each in classes:
            with suppress(FileExistsError):
                (folder / split / each.name).symlink_to(each.resolve())
    return folder


def open_study(config: StudyConfig, common: Sequence[str]) -> Run:
    """The study's evidence.json, or a new one; `UsageError` if it was begun with other images or flags."""
    path, data = config.out / EVIDENCE, config.data
    named = data.root.resolve().name
    if data.classes:
        first, last = data.skip + 1, data.skip + data.classes
        named += f", classes {first} to {last}" if data.skip else f", first {data.classes} classes"
    flags = [Path(each).name if os.sep in each else each for each in common]  # the rest of a path is of this machine
    begun = {"data": named, "boxes": data.boxes and data.boxes.name, "common": flags}
    study: Run = json.loads(path.read_text()) if path.exists() else {**begun, "runs": {}}
    for key, value in begun.items():
        if study[key] != value:
            raise UsageError(f"{path} was begun with other {key}: {study[key]}, now {value}; name another --out")
    for name, run in study["runs"].items():
        of_row = run["status"] == "finished" and run["row"] in config.rows
        if of_row and tuple(todays_flags(run["flags"])) != ROWS[run["row"]][1]:
            raise UsageError(f"{path}: {name} was made with other flags than its row has now: {' '.join(run['flags'])}")
        run["meaning"] = ROWS.get(run["row"], [run["meaning"]])[0]
    return study


def in_order(study: Run) -> str:
    """JSON of a study, its runs in the order of the rows."""
    rows = list(ROWS)
    place = {name: (rows.index(run["row"]) if run["row"] in ROWS else len(rows), run["seed"])
             for name, run in study["runs"].items()}  # fmt: skip
    runs = {name: study["runs"][name] for name in sorted(place, key=place.__getitem__)}
    return json.dumps(study | {"runs": runs}, indent=1) + "\n"


def plan(config: StudyConfig, common: tuple[str, ...], runs: dict[str, Run]) -> list[Job]:
    """The runs that are still to be made: all rows of the first seed, then all of the next."""
    root, out = config.data.root.resolve(), config.out.resolve()
    data = some_classes(root, config.data.skip, config.data.classes, out) if config.data.classes else root
    boxes, threads = config.data.boxes and config.data.boxes.resolve(), max((os.cpu_count() or 1) // config.jobs, 1)
    jobs = [Job(row, seed, data, boxes, common, out / f"{row}-seed{seed}", threads)
            for seed in config.seeds for row in config.rows]  # fmt: skip

    def over(job: Job) -> bool:
        status = runs.get(job.folder.name, {}).get("status")  # a training that failed would only fail again
        return status == "finished" or (status == "training failed" and job.folder.exists())

    return [job for job in jobs if not over(job)]


def study(config: StudyConfig, common: tuple[str, ...], console: Console) -> None:
    """Make the runs that evidence.json does not have yet. `UsageError` for what cannot work."""
    if unknown := [row for row in config.rows if row not in ROWS]:
        raise UsageError(f"no row {unknown[0]!r}: there are {', '.join(ROWS)}")
    if config.jobs < 1 or (config.data.classes or 1) < 1:
        raise UsageError("--jobs and --data.classes must be at least 1")
    if config.data.skip < 0 or (config.data.skip and not config.data.classes):
        raise UsageError("--data.skip must be at least 0, and needs --data.classes")
    if config.data.boxes and not config.data.boxes.is_file():
        raise UsageError(f"no file {config.data.boxes}")
    config.out.mkdir(parents=True, exist_ok=True)
    found, path = open_study(config, common), config.out / EVIDENCE
    jobs = plan(config, common, found["runs"])
    for job in jobs:
        read_command_line(training(job))  # mistakes in the flags are found before anything runs
    write = partial(write_whole, path, lambda file: file.write_text(in_order(found)))
    write()
    console.print(f"{len(jobs)} runs to make, {len(config.seeds) * len(config.rows) - len(jobs)} are there")
    processes, columns = Processes(), (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown as progress, ThreadPoolExecutor(config.jobs) as pool:

        def run(job: Job) -> tuple[Job, Run | None, float]:
            name, start, task = job.folder.name, time.monotonic(), progress.add_task(job.folder.name)
            entry = carry_out(job, processes, lambda what: progress.update(task, description=f"{name}: {what}"))
            progress.remove_task(task)
            return job, entry, time.monotonic() - start

        try:
            for number, future in enumerate(as_completed([pool.submit(run, job) for job in jobs]), 1):
                job, entry, seconds = future.result()
                if entry:
                    found["runs"][job.folder.name] = entry
                    write()
                said = f"{entry['status']} {entry.get('error', '')}".strip() if entry else "stopped"
                for name, scores in (entry or {}).get("retrieval", {}).items():
                    said += f"  rank-1 {name} {scores['rank1']:.2f}"
                line = f"{number}/{len(jobs)}  {job.folder.name}  {seconds / 60:.1f} min  {said}"
                console.print(line, highlight=False, soft_wrap=True)
        except BaseException:
            processes.stop()  # and the pool's end waits for them
            pool.shutdown(cancel_futures=True)
            raise
    console.print(f"results: {path}", soft_wrap=True, highlight=False)


def main(args: Sequence[str]) -> None:
    """Make the study that `args` describe; what follows `--` is for `fastcr.train`."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as a Ctrl-C: trainings save and end
    at = args.index("--") if "--" in args else len(args)
    with one_line_errors("bench/evidence.py"):
        config = parse(StudyConfig, args[:at], prog=called("bench/evidence.py"), description=__doc__)
        study(config, tuple(args[at + 1 :]), Console(markup=False))


if __name__ == "__main__":
    main(sys.argv[1:])
