"""The measurement of whole jobs: processes, what they are told, and the tables, on made-up figures."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import end_to_end, end_to_end_jobs
from bench.end_to_end import FEW, PHASES, EndToEndConfig, command_of, draw_embeddings, draw_photos, tables
from bench.process import measure
from fastcr.errors import UsageError
from fastcr.runs.command_line import read_command_line

MACHINE = {"cpu": "Some CPU", "threads": 2, "torch": "2.14", "python": "3.11", "date": "2026-11-28", "load_before": 0.0}
HOLD = "import time; held = bytearray(300_000_000); print('ready', flush=True); time.sleep(1); print('{\"steps\": 3}')"


def test_a_process_is_measured_with_its_children() -> None:
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {HOLD!r}]))"
    found = measure([sys.executable, "-c", code], mark="ready")
    assert found.facts == {"steps": 3}
    assert found.first is not None
    assert 0 < found.first < found.seconds - 0.9
    assert 300e6 < found.peak_bytes < 500e6
    assert measure([sys.executable, "-c", "print('no mark')"], mark="ready").first is None


def test_a_process_that_fails_says_its_last_line() -> None:
    with pytest.raises(UsageError, match="exit status 1: ValueError: such and such"):
        measure([sys.executable, "-c", "raise ValueError('such and such')"])


def test_photos_are_the_same_in_every_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_photos(tmp_path / name, 2)
    first, second = sorted((tmp_path / "a").iterdir())
    assert Image.open(first).size == (500, 375)
    assert first.read_bytes() == (tmp_path / "b" / first.name).read_bytes() != second.read_bytes()
    assert 50e3 < first.stat().st_size < 150e3  # as photographs of this size


@pytest.mark.parametrize("backbone", ["resnet18", "tf_efficientnet_lite0"])
def test_all_ways_are_told_the_same(tmp_path: Path, backbone: Any) -> None:
    config = EndToEndConfig(batch=32, epochs=3, size=96, threads=2, backbone=backbone)
    for way in PHASES["train"]:
        command = command_of(config, way, "train", tmp_path, 0)
        if way.startswith("fastcr"):
            told, _ = read_command_line(command[4:])
            name = told.model.backbone.removeprefix("timm:")
            assert (told.model.weights, told.run.precision) == ("none", "bf16")
            found = (told.optim.batch_size, told.optim.epochs, told.data.image_size, told.data.workers, name)
        else:
            assert (way, "train") in end_to_end_jobs.JOBS
            settings = end_to_end_jobs.Settings(**json.loads(command[-1]))
            found = (settings.batch, settings.epochs, settings.size, settings.workers, settings.backbone)
        assert found == (32, 3, 96, 2, backbone)


def test_every_way_of_every_phase_has_a_job(tmp_path: Path) -> None:
    for phase, ways in PHASES.items():
        for way in ways:
            command = command_of(EndToEndConfig(), way, phase, tmp_path, 0)
            assert command[1:3] == ["-m", "fastcr"] or (command[2], command[3]) in end_to_end_jobs.JOBS
    few = command_of(EndToEndConfig(), "timm", "few", tmp_path, 0)
    assert json.loads(few[-1])["images"].endswith("few")


def test_libraries_score_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_embeddings(tmp_path / "e.npz", 200)
    settings = end_to_end_jobs.Settings(*[""] * 3, 1, 1, 1, 0, str(tmp_path / "e.npz"))
    scores = []
    for way in ("fastcr", "pytorch-metric-learning"):
        end_to_end_jobs.JOBS[way, "retrieval"](settings)
        found = json.loads(capsys.readouterr().out)
        scores += [found["rank1"], found["mAP"]]
    assert scores[2:] == pytest.approx(scores[:2], abs=1e-3)
    assert 5 < scores[1] < 95  # neither trivial nor hopeless


def run(way: str, phase: str, turn: int, seconds: float, **facts: Any) -> dict[str, Any]:
    first = seconds / 2 if phase == "train" else None
    found = {"way": way, "phase": phase, "turn": turn, "seconds": seconds, "first": first, "facts": facts}
    return found | {"peak_bytes": 2e9 if phase == "train" else 1e9}


def test_the_tables() -> None:
    runs = [run("fastcr", "train", turn, seconds) for turn, seconds in enumerate((10, 40, 20))]
    runs += [run("fastcr", "embed", turn, seconds) for turn, seconds in enumerate((1, 2, 3))]
    runs += [run("fastcr", "few", 0, 0.5), run("timm", "embed", 0, 7), run("timm", "few", 0, 6)]
    runs += [run("fastcr", "retrieval", 0, 4, scoring=0.0123, rank1=50.0, mAP=25.5)]
    results = {"machine": MACHINE, "settings": end_to_end.settings_of(EndToEndConfig()), "runs": runs}
    lines = tables(results | {"missing": {"lightly": "not installed", "timm-tuned": "not asked for"}}).splitlines()
    assert lines[0] == "**CPU Some CPU, 2 threads**, torch 2.14"
    (ours,) = [line for line in lines if line.startswith("| fastcr, the preset folder | 23.0")]
    assert ours.split(" | ")[1:] == [
        "23.0 [11.0, 42.0]", "20.0 [10.0, 40.0]", "10.0 [5.0, 20.0]", "2.0 [1.0, 3.0]", "0.5", "2.00 |"
    ]  # fmt: skip
    assert "| timm, its inference |  |  |  | 7.0 | 6.0 | 1.00 |" in lines
    assert "| fastcr | 12.3 | 4.0 | 1.00 | 50.00 | 25.50 |" in lines
    assert lines[-1] == "- lightly, its MoCo v2 example: not installed"


def test_what_is_missing_or_not_asked_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "find_spec", lambda package: None if package in ("oml", "lightly") else object())
    found = end_to_end.missing(EndToEndConfig(only=("fastcr", "lightly", "open-metric-learning")))
    assert found["lightly"] == "not installed"
    assert "--oml-python" in found["open-metric-learning"]
    assert found["timm"] == "not asked for"
    assert "fastcr" not in found
    given = replace(EndToEndConfig(), oml_python=Path("python"))
    assert "open-metric-learning" not in end_to_end.missing(given)


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    sizes = ["--images", "16", "--batch", "8", "--turns", "1", "--epochs", "1", "--size", "32", "--out", str(out)]
    end_to_end.main([*sizes, "--only", "fastcr", "timm"])
    results = json.loads(out.read_text())
    assert {each["phase"] for each in results["runs"] if each["way"] == "fastcr"} == set(PHASES)
    assert [each["facts"]["embedded"] for each in results["runs"] if each["way"] == "timm"] == [FEW, 16]
    shown = capsys.readouterr().out
    end_to_end.main(["--show", str(out)])
    assert capsys.readouterr().out == shown
