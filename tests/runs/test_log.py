"""The lines that a run leaves behind, and those of other long work where there is no bar."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fastcr.config import Config
from fastcr.runs.context import Context
from fastcr.runs.log import RunLog

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
