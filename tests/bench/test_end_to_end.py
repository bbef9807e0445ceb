"""The measurement of whole jobs: processes, what they are told, and the tables."""

import json
import sys
from pathlib import Path

import pytest

from bench import end_to_end, end_to_end_jobs
from bench.end_to_end import FEW, PHASES, EndToEndConfig, command_of, draw_embeddings, tables
from bench.process import measure
from bench.report import RESULTS
from fastcr.errors import UsageError
from fastcr.runs.command_line import read_command_line

HOLD = "import time; held = bytearray(300_000_000); print('ready', flush=True); time.sleep(1); print('{\"steps\": 3}')"


def test_a_process_is_measured_with_its_children() -> None:
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {HOLD!r}]))"
    found = measure([sys.executable, "-c", code], mark="ready")
    assert found.facts == {"steps": 3}
    assert found.first is not None
    assert 0 < found.first < found.seconds - 0.9
    assert 300e6 < found.peak_bytes < 500e6
    with pytest.raises(UsageError, match="exit status 1: ValueError: such and such"):
        measure([sys.executable, "-c", "raise ValueError('such and such')"])


def test_all_ways_are_told_the_same(tmp_path: Path) -> None:
    config = EndToEndConfig(batch=32, epochs=3, size=96, threads=2)
    told, _ = read_command_line(command_of(config, "fastcr", "train", tmp_path, 0)[4:])
    found = (told.optim.batch_size, told.optim.epochs, told.data.image_size, told.data.workers, told.model.backbone)
    assert found == (32, 3, 96, 2, "resnet18")
    for phase, ways in PHASES.items():
        for way in ways:
            command = command_of(config, way, phase, tmp_path, 0)
            if command[1:3] != ["-m", "fastcr"]:
                assert (command[2], command[3]) in end_to_end_jobs.JOBS
                settings = end_to_end_jobs.Settings(**json.loads(command[-1]))
                assert found == (settings.batch, settings.epochs, settings.size, settings.workers, settings.backbone)


@pytest.mark.slow  # the library takes seconds to import
def test_libraries_score_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytorch_metric_learning")
    draw_embeddings(tmp_path / "e.npz", 200)
    settings = end_to_end_jobs.Settings(*[""] * 3, 1, 1, 1, 0, str(tmp_path / "e.npz"))
    scores = []
    for way in ("fastcr", "pytorch-metric-learning"):
        end_to_end_jobs.JOBS[way, "retrieval"](settings)
        found = json.loads(capsys.readouterr().out)
        scores += [found["rank1"], found["mAP"]]
    assert scores[2:] == pytest.approx(scores[:2], abs=1e-3)
    assert 5 < scores[1] < 95  # neither trivial nor hopeless


def test_the_tables_of_the_readme_are_those_of_the_kept_results() -> None:
    readme = (RESULTS.parent / "README.md").read_text()
    for file in RESULTS.glob("end_to_end_*.json"):
        for line in tables(json.loads(file.read_text())).splitlines():
            assert line in readme


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    sizes = ["--images", "16", "--batch", "8", "--turns", "1", "--epochs", "1", "--size", "32", "--out", str(out)]
    end_to_end.main([*sizes, "--only", "fastcr", "timm-tuned"])
    results = json.loads(out.read_text())
    assert {each["phase"] for each in results["runs"] if each["way"] == "fastcr"} == set(PHASES)
    assert [each["facts"]["embedded"] for each in results["runs"] if each["way"] == "timm-tuned"] == [FEW, 16]
