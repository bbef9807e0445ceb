"""The line that each epoch leaves behind."""

from __future__ import annotations

import io
from pathlib import Path

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
