"""Visualize: the pictures and maps that evaluation sees, in their places; detectors that answer alike are one row."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from fastcr import visualize
from fastcr.config import Config, DataConfig, RationaleConfig
from fastcr.data.crop_loader import load_crops
from fastcr.data.layouts import read_splits
from fastcr.data.views import normalise
from fastcr.encoders.encoder import load
from fastcr.encoders.rationale import RationaleHead
from fastcr.encoders.released import ReleasedBranch
from fastcr.output.gallery import Picture, as_evaluated, overlay, spread
from fastcr.output.sheets import GAP, LINE
from fastcr.runs.command_line import save_config
from fastcr.runs.context import Context
from fastcr.visualize import detector_sections
from tests.shared import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, TILE = 112, 2 * 112 + GAP
ROW = SIDE + LINE + GAP


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors", image_size=SIDE)


def run(*args: object) -> None:
    visualize.main([*map(str, args), "--run.device", "cpu"])


def difference(a: Image.Image, b: Image.Image) -> torch.Tensor:
    """Largest difference of a channel `[H,W]`."""
    found = ImageChops.difference(a, b)
    return torch.tensor(bytearray(found.tobytes())).view(found.height, found.width, 3).amax(2)


@pytest.mark.parametrize("size", [(200, 150), (60, 90)])
def test_crop_is_that_of_evaluation(size: tuple[int, int], tmp_path: Path) -> None:
    Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "noise.png")
    images = read_splits(tmp_path).train
    found = as_evaluated(images.rgb(0), SIDE)
    ((pixels, _, _),) = load_crops([images], [[0]], SIDE, Context())
    assert found.size == (SIDE, SIDE)
    assert found.tobytes() == bytes(pixels.flatten().tolist())


def test_each_picture_stands_beside_its_attention(weights: Path, birds: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "sheet.png", read_splits(birds).test
    run(weights, birds, "--out", out, "--limit", 5, "--columns", 3)
    sheet = Image.open(out)
    assert images
    assert sheet.size == (GAP + 3 * TILE, GAP + 2 * ROW)
    encoder = load(weights)
    for place, index in enumerate(spread(range(32), 5)):
        crop = as_evaluated(images.rgb(index), SIDE)
        pixels = torch.tensor(bytearray(crop.tobytes())).view(1, SIDE, SIDE, 3)
        with torch.inference_mode():
            attention = encoder.both(normalise(pixels, torch.float32)).attention
        assert attention is not None
        left, top = GAP + place % 3 * TILE, GAP + place // 3 * ROW
        shown = sheet.crop((left, top, left + SIDE, top + SIDE))
        assert shown.tobytes() == crop.tobytes()
        over = sheet.crop((left + SIDE, top, left + 2 * SIDE, top + SIDE))
        assert difference(over, overlay(crop, attention[0])).max() <= 2
    before = out.read_bytes()
    run(weights, birds, "--out", out, "--limit", 5, "--columns", 3)
    assert out.read_bytes() == before


def test_a_run_shows_its_own_images_beside_its_weights(
    weights: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(weights, folder / "weights.safetensors")
    save_config(Config(data=DataConfig(root=birds)), folder / "config.yaml")
    run(folder, "--limit", "3")
    run(folder, birds, "--limit", "3", "--out", tmp_path / "same.png")
    assert (folder / "attention.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    assert str(folder / "attention.png") in capsys.readouterr().out


def test_unreadable_images_are_named_and_left_out(
    weights: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = sorted(flat.iterdir())[:2], tmp_path / "sheet.png"
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    run(weights, tmp_path / "broken.jpg", *good, tmp_path / "gone.png", "--out", out, "--detectors", "True")
    said = capsys.readouterr().out
    assert said.count(f"left out: '{tmp_path}/broken.jpg'") == said.count(f"left out: '{tmp_path}/gone.png'") == 1
    assert Image.open(out).width == GAP + 2 * TILE
    with pytest.raises(SystemExit, match="2"):
        run(weights, tmp_path / "broken.jpg", "--out", out)
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of the 1 images can be read" in line
    assert "broken.jpg" in line


def test_detectors_stand_by_their_share_of_the_positions() -> None:
    pictures = [Picture(f"picture {i}", Image.new("RGB", (112, 112), (40 * i, 0, 0))) for i in range(6)]
    answers, maps = torch.zeros(6, 4, 2, 2), torch.zeros(6, 4, 2, 2)
    answers[:, 0], answers[:, 3] = -1, 1  # 0 never wins, 3 nearly everywhere
    answers[4, 1, 0, 0], answers[2, 1, 1, 1], answers[5, 2, 0, 1] = 9, 8, 7
    maps[4, 1, 0, 0] = 1
    about, *sections = detector_sections(pictures, answers, maps)
    assert about.text == "3 of 4 detectors are drawn, 1 win no position."
    assert [section.heading for section in sections] == [
        "detector 3 wins 87.5% of the positions",
        "detector 1 wins 8.3% of the positions",
        "detector 2 wins 4.2% of the positions",
    ]
    (tiles,) = sections[1].rows
    assert [tile.caption for tile in tiles[:2]] == ["picture 4", "picture 2"]
    picture, over = tiles[0].images
    assert picture is pictures[4].crop
    assert difference(over, picture)[:20, :20].min() > 0
    assert difference(over, picture)[90:, 90:].max() == 0


@pytest.mark.parametrize("released", [True, False])
def test_maximum_of_the_responses_is_what_the_branch_attends_to(released: bool) -> None:
    torch.manual_seed(0)
    branch = (ReleasedBranch(16, 5) if released else RationaleHead(16, detectors=5)).eval()
    features = torch.randn(3, 16, 4, 4)
    with torch.inference_mode():
        found, attention = branch.responses(features), branch.pool(features).attention.view(3, 4, 4)
        alone = branch.alone(found.amax(1, keepdim=True))[:, 0]
        maps = branch.alone(found)
    assert found.shape == maps.shape == (3, 5, 4, 4)
    if released:
        alone = (alone - alone.amin()) / (alone.amax() - alone.amin())
    torch.testing.assert_close(alone, attention)


def test_detectors_are_drawn_if_wanted(birds: Path, tmp_path: Path) -> None:
    file = write_weights(tmp_path / "w.safetensors", RationaleConfig(detectors=3), image_size=SIDE)
    run(file, birds / "test", "--limit", 6, "--detectors", "True", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    drawn = page.count("of the positions</h2>")
    assert f"{drawn} of 3 detectors are drawn" in page
    assert page.count('class="tile  pair"') == 6 + 5 * drawn > 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["WEIGHTS"], "an IMAGE or a FOLDER"),
        (["WEIGHTS", "ROOT", "--out", "WEIGHTS"], "must end in"),
        (["PLAIN", "ROOT"], "has no attention branch"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, weights: Path, birds: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    plain = tmp_path / "plain.safetensors"
    if "PLAIN" in arguments:
        write_weights(plain, RationaleConfig(enabled=False))
    stands_for = {"ROOT": birds, "WEIGHTS": weights, "PLAIN": plain}
    assert message in refused(visualize.main, *(stands_for.get(each, each) for each in arguments))
