"""Encoders between the initial and the trained weights of a run, and images of another size than in training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from fastcr import embed, evaluate, export, load, search, train, visualize
from fastcr.data.layouts import read_splits
from fastcr.measures.embeddings import embed as embeddings_of
from fastcr.runs.checkpoint import load_weights
from fastcr.runs.context import Context

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (
    *("--data.image_size", "32", "--data.workers", "0", "--run.device", "cpu", "--run.precision", "fp32"),
    *("--model.backbone", "resnet18", "--model.last_stage", "layer3", "--model.weights", "none"),
    *("--optim.batch_size", "8", "--optim.epochs", "1", "--moco.queue_size", "16", "--rationale.detectors", "2"),
)


@pytest.fixture(scope="module")
def runs(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run saved at its end, and three quarters of the way to it."""
    folder = tmp_path_factory.mktemp("tuned")
    for name, tuned in (("end", "1"), ("before", "0.75")):
        train.main(
            ["folder", *SMALL, "--data.root", str(birds), "--run.dir", str(folder / name), "--optim.tuned", tuned]
        )
    return folder / "end", folder / "before"


def test_the_saved_encoder_lies_where_it_was_asked_for_and_any_other_point_can_be_had(runs: tuple[Path, Path]) -> None:
    end, before = runs
    start, last = (load_weights(end / f"{name}.safetensors")[0] for name in ("init", "weights"))
    assert any((last[name] != start[name]).any() for name in last)
    for tuned in (None, 0.0, 0.25, 1.0):
        share = 0.75 if tuned is None else tuned
        found = load(before, tuned=tuned).state_dict()
        for name, value in found.items():
            expected = start[name] + share * (last[name] - start[name]) if value.is_floating_point() else last[name]
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
    resumed = [torch.load(run / "resume.pt", weights_only=True)["model"] for run in runs]
    torch.testing.assert_close(*resumed)  # training goes on from its own end


def test_a_run_whose_beginning_was_removed_still_saves(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[1], tmp_path / "run"))
    (run / "init.safetensors").unlink()
    with suppress(SystemExit):  # there is nothing to compare with at the end
        train.main(["--resume", str(run), "--optim.epochs", "2"])
    steps = [torch.load(each / "resume.pt", weights_only=True)["step"] for each in (runs[1], run)]
    assert steps[1] == 2 * steps[0]
    trained = torch.load(run / "resume.pt", weights_only=True)["model"]["branch.weight"]
    torch.testing.assert_close(load(run).state_dict()["branch.weight"], trained)


def test_results_hold_both_ends_and_the_saved_encoder(runs: tuple[Path, Path]) -> None:
    end, before = (json.loads((run / "results.json").read_text()) for run in runs)
    assert "end" not in end
    assert before["end"]["retrieval"]["mean"] == pytest.approx(end["retrieval"]["mean"], abs=1.5)
    assert before["frozen_init"]["retrieval"] == end["frozen_init"]["retrieval"]


def test_commands_take_the_encoder_at_any_point(runs: tuple[Path, Path], birds: Path, tmp_path: Path) -> None:
    end, _ = runs
    export.main([str(end), "--format", "safetensors", "--tuned", "0.5", "--out", str(tmp_path / "half.safetensors")])
    half = load(tmp_path / "half.safetensors")
    torch.testing.assert_close(half.state_dict(), load(end, tuned=0.5).state_dict())
    embed.main(
        [str(end), str(birds / "test"), "--run.tuned", "0", "--out", str(tmp_path / "start"), "--data.workers", "0"]
    )
    facts = json.loads((tmp_path / "start" / "encoder.json").read_text())
    assert facts["tuned"] == 0
    evaluate.main([str(end), "--run.tuned", "0", "--out", str(tmp_path / "start.json"), "--data.workers", "0"])
    found = json.loads((tmp_path / "start.json").read_text())
    assert found["retrieval"]["mean"] == pytest.approx(found["frozen_init"]["retrieval"]["mean"], abs=1e-6)


def test_a_file_without_its_beginning_has_one_point_only(
    runs: tuple[Path, Path], birds: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    weights = tmp_path / "alone.safetensors"
    weights.write_bytes((runs[0] / "weights.safetensors").read_bytes())
    line = refused(embed.main, str(weights), str(birds / "test"), "--run.tuned", "0.5", "--out", str(tmp_path / "out"))
    assert "init.safetensors" in line


def test_commands_give_the_encoder_images_of_another_size(runs: tuple[Path, Path], birds: Path, tmp_path: Path) -> None:
    run, size = str(runs[0]), ("--data.image_size", "64", "--data.workers", "0", "--run.precision", "fp32")
    encoder = load(run, image_size=64)
    images = read_splits(birds).test
    assert images is not None
    expected = embeddings_of(encoder, images, Context(), title="").rationale
    out = tmp_path / "embedded"
    embed.main([run, str(birds / "test"), *size, "--out", str(out)])
    torch.testing.assert_close(torch.from_numpy(np.load(out / "rationale.npy")), expected)
    picture = birds / "test" / images.files[0]
    search.main([str(out), str(picture), "--k", "1", "--out", str(tmp_path / "found.html")])  # at the index's size
    page = (tmp_path / "found.html").read_text()
    assert images.files[0] in page
    assert "1.000" in page
    evaluate.main([run, *size, "--out", str(tmp_path / "large.json")])
    results = [json.loads(path.read_text()) for path in (tmp_path / "large.json", runs[0] / "results.json")]
    assert [each.get("image_size") for each in results] == [64, None]
    for large, usual in (results, [each["frozen_init"] for each in results]):
        assert large["retrieval"]["mean"] != usual["retrieval"]["mean"]
    assert encoder.transform(PIL.Image.open(picture)).shape == (3, 64, 64)
    sizes = []
    for options in ((), ("--image_size", "64")):
        visualize.main([run, str(picture), *options, "--out", str(tmp_path / "attention.png")])
        sizes.append(PIL.Image.open(tmp_path / "attention.png").size)
        (tmp_path / "attention.png").unlink()
    assert sizes[0] != sizes[1]
    export.main([run, "--format", "torch", "--image_size", "64", "--out", str(tmp_path / "graph.pt2")])
    graph = torch.export.load(tmp_path / "graph.pt2").module()
    torch.testing.assert_close(graph(torch.ones(3, 3, 64, 64)), tuple(encoder(torch.ones(3, 3, 64, 64))))
