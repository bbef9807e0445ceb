"""Reports: what is on the page of a run, and that it gives no path away."""

import html
import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastcr import report, train
from fastcr.runs.command_line import called
from tests.shared import TINY

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ("--run.device", "cpu")
RUN = "run <b>\"'&"


def made(tmp_path: Path, *args: object) -> str:
    """The page, in which no folder of this machine is named."""
    out = tmp_path / "page.html"
    report.main([*map(str, args), "--out", str(out), *CPU])
    text = out.read_text()
    for part in (str(tmp_path), "/tmp", os.path.expanduser("~") + "/", str(Path.cwd())):
        assert part not in text
    return text


def change(run: Path, section: str, **values: Any) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content[section].update(values)
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def test_page_of_a_run_shows_all_of_it(copied: Path, tmp_path: Path) -> None:
    page = made(tmp_path, copied.rename(tmp_path / RUN))
    results = json.loads((tmp_path / RUN / "results.json").read_text())
    for part in (results, results["frozen_init"]):
        for name, measure in product(("mean", "rationale"), ("rank1", "mAP")):
            assert f"{part['retrieval'][name][measure]:.2f}</td>" in page
    assert html.escape(RUN, quote=False).replace('"', "&#34;").replace("'", "&#39;") in page
    assert "best pooling, " in page
    assert "3 steps of 8 images, epoch 0.375 of 8" in page
    assert page.count("attention over the image: ") == page.count('class="tile pair"') == 12
    assert len(page) < 5_000_000


def test_settings_lose_their_folders(copied: Path, tmp_path: Path) -> None:
    change(copied, "model", weights="/home/somebody/secret/w.pt")
    change(copied, "run", dir="/home/somebody/elsewhere/run")
    page = made(tmp_path, copied)
    assert "weights: w.pt\n" in page
    assert not [word for word in ("somebody", "secret", "elsewhere") if word in page]


def test_a_run_in_progress_has_a_page(copied: Path, tmp_path: Path) -> None:
    for name in ("results.json", "weights.safetensors"):
        (copied / name).unlink()
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    (copied / "metrics.jsonl").write_text(f'{lines[0]}\n7\n{lines[1]}\n{{"step": 3, "lo')
    page = made(tmp_path, copied)
    assert "2 steps of 8 images, epoch 0.25 of 8" in page
    assert "has not saved weights yet" in page
    assert f"The run is not measured yet: {called('evaluate')} copied" in page
    (copied / "metrics.jsonl").unlink()
    page = made(tmp_path, copied)
    assert "no step is logged yet" in page


def test_images_that_are_gone_are_left_out(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copied, "data", root=str(tmp_path / "gone"))
    page = made(tmp_path, copied)
    assert "No images were at hand" in page
    assert "<figure class" not in page
    assert f"no folder {tmp_path / 'gone'}" in capsys.readouterr().out


def test_plain_moco_has_no_attention_to_show(birds: Path, tmp_path: Path) -> None:
    run = tmp_path / "moco"
    args = [*TINY, "--run.steps", "1", "--rationale.enabled", "False", "--data.root", birds, "--run.dir", run]
    train.main([*map(str, args)])
    page = made(tmp_path, run)
    assert "The encoder has no branch" in page
    assert "attention over the image" not in page


def test_a_report_lands_in_the_run_and_replaces_itself(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(copied), *CPU])
    assert capsys.readouterr().out.strip() == f"report: {copied}/report.html"
    before = (copied / "report.html").read_bytes()
    (copied / "results.json").unlink()
    report.main([str(copied), *CPU])
    assert (copied / "report.html").read_bytes() != before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["RUN", "--data.root", "nowhere"], "no folder nowhere"),
        (["nowhere"], "nowhere is not a run folder"),
        (["RUN", "--out", "RUN/results.html"], "left as it is"),
        (["RUN"], "results.json is broken"),
    ],
)
def test_mistakes_are_one_line(copied: Path, refused: Callable[..., str], args: list[str], message: str) -> None:
    (copied / "results.html").write_text("mine")
    if args == ["RUN"]:
        (copied / "results.json").write_text('{"retrieval": {"mean": 3}}')
    assert message in refused(report.main, *(arg.replace("RUN", str(copied)) for arg in args), *CPU)
    assert not (copied / "report.html").exists()
