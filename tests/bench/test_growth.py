"""The measurement of growth: each job at a small size, and the table and picture of made-up figures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bench import growth
from bench.growth import JOBS, PROCESSES, GrowthConfig, draw, draw_images, row, rows, tables

MACHINE = {"cpu": "Some CPU", "threads": 2, "torch": "2.14", "date": "2026-11-28"}
JOB = "images: retrieval, one pooling"


def test_the_images_are_small_and_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "DRAWN", 3)
    draw_images(tmp_path / "images", 5)
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 5
    assert len({file.read_bytes() for file in files}) == 3
    assert Image.open(files[0]).size == (64, 64)


@pytest.mark.parametrize("job", [job for job in JOBS if "training" not in job and "embedding" not in job])
def test_each_job_says_its_seconds_and_memory(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_images(tmp_path / "images-70", 70)
    row(job, 70, tmp_path)
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["seconds"] < 60
    assert found["peak_bytes"] > 50e6


def test_every_size_has_a_row() -> None:
    found = rows(GrowthConfig(images=(10, 20), queue=(5,), detectors=(1, 2), processes=(1, 2)))
    assert len(found) == 6 * 2 + 1 + 2 + 2
    assert found[:2] == [("images: listing", 10), ("images: listing", 20)]
    assert found[-1] == (PROCESSES, 2)


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    made = [{"job": JOB, "size": 1000, "seconds": 0.5, "peak_bytes": 1e9},
            {"job": JOB, "size": 10_000, "seconds": 50.0, "peak_bytes": 2e9},
            {"job": PROCESSES, "size": 1, "seconds": 3.0, "peak_bytes": 1e9}]  # fmt: skip
    results = {"machine": MACHINE, "rows": made}
    lines = tables(results).splitlines()
    assert lines[-3:-1] == [f"| {JOB} | 1,000 | 0.5 | 1.00 |  |  |", f"| {JOB} | 10,000 | 50 | 2.00 | 10 | 100 |"]
    draw(results, tmp_path / "growth.png")
    assert Image.open(tmp_path / "growth.png").size[0] > 1000


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--images", "100", "200", "--queue", "64", "128", "--detectors", "1", "2", "--processes", "1", "2"]
    growth.main([*small, "--out", str(tmp_path / "out.json"), "--png", str(tmp_path / "out.png")])
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 6 * 2 + 2 + 2 + 2
    shown = capsys.readouterr().out
    growth.main(["--show", str(tmp_path / "out.json")])
    assert capsys.readouterr().out == shown
