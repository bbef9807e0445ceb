"""Broken records of a run: results, metrics, evaluations."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from rich.console import Console

from fastcr import report
from fastcr.data.images import ImageList, Splits
from fastcr.measures.evaluation import HISTORY, Evaluation, Measured
from fastcr.presets import PRESETS
from fastcr.runs.command_line import save_config
from fastcr.runs.log import keep_records
from tests.fuzz.damage import JSON, NO_DAMAGE, RECORDS, Damage
from tests.fuzz.properties import REFUSED, attempt, contents, fuzzed, reading

IMAGES = ImageList(Path("/data/birds/test"), ("a.jpg",), (0,), ("a", "b"))
SCORES = {"retrieval": {name: {"rank1": 31.25, "rank5": 50.0, "mAP": 22.5} for name in ("mean", "rationale")},
          "knn": {"mean": {"top1": 20.0}, "rationale": {"top1": 25.0}}, "few_label": {"mean": {"1": 3.0, "10": 7.5}},
          "localisation": {"attention": {"inside": 50.0, "pointing": 60.0}}}  # fmt: skip


def write_run(folder: Path) -> Path:
    """A run folder with records of three steps and two evaluations."""
    folder.mkdir(exist_ok=True)
    save_config(PRESETS["synthetic"](), folder / "config.yaml")
    history = [{"epoch": n, "folder": "/data/birds/test", "retrieval": SCORES["retrieval"]} for n in (1, 2)]
    results = {"folder": "/data/birds/test", "images": 32, "unreadable": 0, "skipped": 1, "classes": 16, **SCORES,
               "frozen_init": SCORES, "best_epoch": history[0]}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    metrics = [{"step": step, "epoch": step / 4, "loss": 3.0, "contrast_loss": 2.5, "fit_loss": 0.1, "lr": 0.03,
                "data_wait": 0.1, "images_per_second": 70.5, "attention_entropy": 3.1, "effective_detectors": 4.0}
               for step in (4, 8, 12)]  # fmt: skip
    for name, records in (("metrics.jsonl", metrics), (HISTORY, history)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def spoil(file: Path, damage: Damage) -> None:
    file.write_bytes(damage(file.read_bytes()))


def report_of(*runs: Path, out: Path) -> Any:
    """What becomes of a report without images."""
    return attempt(lambda: report.main([*map(str, runs), "--out", str(out), "--gallery", "0", "--queries", "0"]))


@fuzzed(
    sample=10,
    count=300,
    results=st.one_of(JSON, JSON, NO_DAMAGE),
    metrics=st.one_of(RECORDS, RECORDS, NO_DAMAGE),
    compared=st.booleans(),
)
def test_report(folder: Path, results: Damage, metrics: Damage, compared: bool) -> None:
    runs = [write_run(folder / name) for name in (("run", "other") if compared else ("run",))]
    spoil(runs[0] / "results.json", results)
    spoil(runs[0] / "metrics.jsonl", metrics)
    out, before = folder / "page.html", contents(folder)
    written = report_of(*runs, out=out)
    after = contents(folder)
    if written is not REFUSED:
        after.pop(out)
        assert out.read_text().endswith("</html>\n")
    assert after == before, "files have changed"


def test_a_report_passes_over_records_without_a_step_and_values_that_are_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4}\n[1]\n{"step": 16, "epoch": "x", "loss": {}, "images_per_second": 1e-300}\n')
    assert report_of(run, out=run / "report.html") is not REFUSED


@fuzzed(sample=30, count=200, history=RECORDS, metrics=RECORDS)
def test_records(folder: Path, history: Damage, metrics: Damage) -> None:
    """What a later evaluation, and a resume, make of the records that are there."""
    write_run(folder)
    spoil(folder / HISTORY, history)
    spoil(folder / "metrics.jsonl", metrics)
    evaluation = Evaluation(
        Splits(IMAGES, None), IMAGES, torch.device("cpu"), torch.float32, 0, Console(file=io.StringIO())
    )
    with pytest.MonkeyPatch.context() as patch:
        scores = {"retrieval": {"mean": {"rank1": 1.0, "rank5": 2.0, "mAP": 1.0}}}
        patch.setattr(Evaluation, "measure_file", lambda *args: Measured(scores, 0, []))  # type: ignore[arg-type]
        reading(lambda: evaluation.results(folder / "weights.safetensors", None), folder)
    for name, key, last in ((HISTORY, "epoch", 1.5), ("metrics.jsonl", "step", 8)):
        file, before = folder / name, contents(folder)
        result, after = attempt(lambda file=file, key=key, last=last: keep_records(file, key, last)), contents(folder)
        if result is not REFUSED:
            del before[file], after[file]
            assert all(json.loads(line)[key] <= last for line in file.read_text().splitlines())
        assert after == before, "files have changed"
