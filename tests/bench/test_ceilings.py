"""Bounds on what a map can buy: maps that know the objects' boxes, and detectors fitted to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import ceilings, evidence_table
from fastcr import train
from fastcr.measures.localisation import Objects
from tests.shared import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_maps_of_a_run_are_measured_as_its_own_is(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [file.relative_to(birds) for file in birds.glob("*/*/*.jpg")]
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("path,left,top,right,bottom\n" + "".join(f"{name},0,0,0.5,1\n" for name in names))
    train.main([
        "folder", "--data.image_size", "32", "--data.loader", "torch", "--data.workers", "0", "--run.device", "cpu",
        "--model.backbone", "resnet18", "--model.last_stage", "layer3", "--model.weights", "none", "--run.steps", "1",
        "--optim.batch_size", "8", "--moco.queue_size", "8", "--data.root", str(birds),
        "--run.dir", str(tmp_path / "run"),
    ])  # fmt: skip
    out = tmp_path / "ceilings.json"
    ceilings.main([str(tmp_path / "run"), "--data.boxes", str(boxes), "--data.workers", "0", "--out", str(out)])
    runs = json.loads(out.read_text())["runs"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())["frozen_init"]["retrieval"]["mean"]
    expected = {key: results[key] for key in ("rank1", "rank5", "mAP")}
    assert runs["mean"]["retrieval"]["rationale"] == pytest.approx(expected, abs=1e-3)
    assert runs["mean"]["localisation"]["attention"]["inside"] == pytest.approx(50, abs=1)
    assert runs["box"]["localisation"]["attention"]["inside"] > 97  # the crop moves it by less than a pixel
    where = runs["gaussian1.5"]["localisation"]
    assert where["attention"]["inside"] == pytest.approx(where["gaussian"]["inside"], abs=0.1)
    capsys.readouterr()
    evidence_table.main([str(out)])
    shown = capsys.readouterr().out
    assert "| `box-norm2` | 1 |" in shown
    assert "End of the training" not in shown  # nothing was trained


def test_fitted_detectors_find_what_a_channel_tells() -> None:
    torch.manual_seed(0)
    features = torch.randn(40, 6, 9)
    cells = F.one_hot(torch.randint(9, (40,)), 9).float()
    features[:, 0] = 3 * cells
    objects = Objects(torch.zeros(40, 4), None, False)
    seen = ceilings.Seen(features, cells, objects, torch.zeros(40))
    train, test = (ceilings.Seen(*(part[half] for part in (features, cells)), objects, seen.labels)
                   for half in (slice(0, 30), slice(30, 40)))  # fmt: skip
    attention = ceilings.fitted(train, test, detectors=2, temperature=0.1)
    assert (attention * test.cells).sum(1).mean() > 0.9
    assert torch.equal(attention, ceilings.fitted(train, test, detectors=2, temperature=0.1))


@pytest.mark.parametrize("wanted", ["--data.boxes", "test split", "--data.root"])
def test_what_is_missing_is_said(
    birds: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: str
) -> None:
    (tmp_path / "config.yaml").write_text("preset: folder\n")
    write_weights(tmp_path / "init.safetensors")
    root = {"--data.boxes": ["--data.root", str(birds)], "test split": ["--data.root", str(flat)]}.get(wanted, [])
    with pytest.raises(SystemExit) as stop:
        ceilings.main([str(tmp_path), "--out", str(tmp_path / "out"), "--data.workers", "0", *root])
    assert stop.value.code == 2
    assert wanted in capsys.readouterr().err
