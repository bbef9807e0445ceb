"""The lines that a run leaves behind, those of other long work where there is no bar, and TensorBoard's events."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastcr import train
from fastcr.config import Config
from fastcr.runs.context import Context
from fastcr.runs.log import RunLog
from tests.shared import SHORT, TINY, records

pytestmark = pytest.mark.usefixtures("one_thread")
SHEET = (8 + 6 * (2 * 32 + 8), 8 + 2 * (32 + 8))  # two rows of six pairs
FIGURES = {"loss": 5.1234, "effective_rank": 87.2, "kept_neighbours": 0.74}


def test_an_epoch_leaves_its_figures_and_the_time_left(tmp_path: Path) -> None:
    clock, said = [100.0], io.StringIO()
    context = Context(console=Console(file=said, width=200))
    with RunLog(tmp_path, Config(), context, start=4, last=12, steps_per_epoch=4) as log:
        log.bar.get_time = lambda: clock[0]
        for step in range(5, 13):
            clock[0] += 50 if step == 5 else 10  # the first step compiles
            log.advance(step, 8)
            if step % 4 == 0:
                log.epoch_done(FIGURES, step // 4)
        log.epoch_done({**FIGURES, "fit_loss": 0.25, "attention_entropy": 2.0}, 4)
    figures = "loss 5.123  dimensions in use 87  neighbours kept 74%"
    assert said.getvalue().splitlines() == [
        f"epoch 2/100  {figures}  time left 0:00:40",
        f"epoch 3/100  {figures}",
        "epoch 4/100  loss 5.123  fit 0.2500  entropy 2.00  dimensions in use 87  neighbours kept 74%",
    ]


def test_without_a_terminal_lines_say_how_far_the_work_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said = [100.0], io.StringIO()
    monkeypatch.setattr("fastcr.runs.context.time.monotonic", lambda: now[0])
    context = Context(console=Console(file=said, width=200))
    for _ in context.progress(range(10), "counting", 10):
        now[0] += 6
    assert said.getvalue().splitlines() == [
        "counting", "counting: 20%, time left 0:00:48", "counting: 40%, time left 0:00:36",
        "counting: 60%, time left 0:00:24", "counting: 80%, time left 0:00:12", "counting: 100%, time left 0:00:00",
    ]  # fmt: skip
    said.truncate(said.seek(0))
    with RunLog(tmp_path, Config(), context, start=4, last=1000, steps_per_epoch=100) as log:
        log.bar.get_time = lambda: now[0]
        for step in range(5, 27):
            now[0] += 1
            log.advance(step, 8)
    assert [line.split("  ") for line in said.getvalue().splitlines()] == [
        ["step 14 of 1,000", "epoch 1/100", "time left 0:16:26"],
        ["step 24 of 1,000", "epoch 1/100", "time left 0:16:16"],
    ]


def run(root: Path, folder: Path) -> dict[tuple[str, int], float]:
    """Train to step 9, then resume to step 17, with an evaluation after 8 and 16 and at each end.

    Returns every number of the run folder's own files, by name and step.
    """
    args = [*TINY, *SHORT, "--run.eval_every", "1", "--data.root", root, "--run.dir", folder, "--run.steps", "9"]
    train.main(list(map(str, args)))
    train.main(["--resume", str(folder), "--run.steps", "17"])
    found = {
        (name, round(record["step"])): value
        for record in records(folder)
        for name, value in record.items()
        if name not in ("step", "epoch")
    }
    for entry in map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines()):
        for section in ("retrieval", "knn"):
            for pooling, scores in entry[section].items():
                for measure, value in scores.items():
                    found[f"{section}/{pooling}/{measure}", 8 * entry["epoch"]] = value
    assert len({step for _, step in found}) == 17
    return found


def test_tensorboard_has_every_number_and_the_attention_of_each_evaluation(birds: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = run(birds, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found = {(tag, each.step): each.value for tag in events.Tags()["scalars"] for each in events.Scalars(tag)}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)  # events hold fp32
    pictures = events.Images("attention")
    assert [each.step for each in pictures] == [8, 9, 16, 17]
    assert {(each.width, each.height) for each in pictures} == {SHEET}
    assert pictures[0].encoded_image_string != pictures[2].encoded_image_string


def test_a_failure_of_tensorboard_is_one_line_and_the_run_continues(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
    args = [*TINY, "--data.root", flat, "--run.dir", tmp_path / "run", "--run.steps", "3"]
    train.main(list(map(str, args)))
    said, errors = capfd.readouterr()
    warnings = [line for line in said.splitlines() if "warning" in line]
    assert warnings == ["warning: TensorBoard failed, so nothing more is logged there: no route to anywhere"]
    assert errors == ""
    assert len(records(tmp_path / "run")) == 3
