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
import signal
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.evidence_rows import ROWS
from bench.evidence_run import Job, Processes, Run, carry_out, training
from fastcr.config import number
from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called, one_line_errors, parse, read_command_line, todays_flags

EVIDENCE = "evidence.json"


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
    """With --data.classes: skip so many class folders first, to check a choice on classes it was not made on."""


@dataclass(frozen=True)
class StudyConfig:
    """Which runs to make, and where."""

    out: Path
    """Folder of the study: evidence.json, run folders, logs."""
    data: StudyData
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows to run; bench/evidence_rows.py describes them."""
    seeds: tuple[int, ...] = number((0,), 0)
    """Every row is run with each; all rows with the first seed come first."""
    jobs: int = number(1, 1)
    """Runs at a time."""


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

    def place(named: tuple[str, Run]) -> tuple[int, int]:
        row, seed = named[1]["row"], named[1]["seed"]
        return rows.index(row) if row in ROWS else len(rows), seed

    return json.dumps(study | {"runs": dict(sorted(study["runs"].items(), key=place))}, indent=1) + "\n"


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
    if config.data.skip and not config.data.classes:
        raise UsageError("--data.skip needs --data.classes")
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
    with closing(carried_out(jobs, config.jobs, console)) as ended:
        for i, (job, entry, seconds) in enumerate(ended, 1):
            if entry:
                found["runs"][job.folder.name] = entry
                write()
            said = f"{entry['status']} {entry.get('error', '')}".strip() if entry else "stopped"
            for name, scores in (entry or {}).get("retrieval", {}).items():
                said += f"  rank-1 {name} {scores['rank1']:.2f}"
            line = f"{i}/{len(jobs)}  {job.folder.name}  {seconds / 60:.1f} min  {said}"
            console.print(line, highlight=False, soft_wrap=True)
    console.print(f"results: {path}", soft_wrap=True, highlight=False)


def carried_out(
    jobs: Sequence[Job], at_once: int, console: Console
) -> Generator[tuple[Job, Run | None, float], None, None]:
    """Each run as soon as it has ended, with its entry and its seconds; whatever ends this ends the others too."""
    processes, columns = Processes(), (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown as progress, ThreadPoolExecutor(at_once) as pool:

        def run(job: Job) -> tuple[Job, Run | None, float]:
            name, start, task = job.folder.name, time.monotonic(), progress.add_task(job.folder.name)
            entry = carry_out(job, processes, lambda what: progress.update(task, description=f"{name}: {what}"))
            progress.remove_task(task)
            return job, entry, time.monotonic() - start

        try:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                yield future.result()
        except BaseException:
            processes.stop()  # and the pool's end waits for them
            pool.shutdown(cancel_futures=True)
            raise


def main(args: Sequence[str]) -> None:
    """Make the study that `args` describe; what follows `--` is for `fastcr.train`."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as a Ctrl-C: trainings save and end
    at = args.index("--") if "--" in args else len(args)
    with one_line_errors("bench/evidence.py"):
        config = parse(StudyConfig, args[:at], prog=called("bench/evidence.py"), description=__doc__)
        study(config, tuple(args[at + 1 :]), Console(markup=False))


if __name__ == "__main__":
    main(sys.argv[1:])
