"""Sheets: the pictures and maps that evaluation sees, in their places; any name, any number of images."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops, ImageFont

from fastcr import visualize
from fastcr.config import Config, DataConfig, RationaleConfig, ReleasedConfig
from fastcr.data.layouts import read_splits
from fastcr.data.views import normalise
from fastcr.encoders.encoder import build_branch, load
from fastcr.measures import overlays
from fastcr.measures.embeddings import load_crops
from fastcr.output.overlays import FONT_SIZE, GAP, LINE, Tile, as_evaluated, contact_sheet, fitted, overlay
from fastcr.runs.command_line import save_config
from fastcr.visualize import detector_sheet
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


@pytest.fixture
def headings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[Tile]]]:
    """The rows of the sheet that is made."""
    rows: list[tuple[str, Sequence[Tile]]] = []

    def noted(given: Any) -> Image.Image:
        rows.extend(given)
        return contact_sheet(given)

    for module in (visualize, overlays):
        monkeypatch.setattr(module, "contact_sheet", noted)
    return rows


def test_overlay_covers_where_the_map_is_high_and_only_there() -> None:
    picture = Image.new("RGB", (112, 112), "#4080c0")
    attention = torch.zeros(7, 7)
    attention[1, 5] = 0.3
    found = difference(overlay(picture, attention), picture)
    assert found[20:28, 84:92].min() > 50
    assert found[:, :40].max() == 0
    assert found[60:].max() == 0
    assert overlay(picture, torch.zeros(7, 7)).tobytes() == picture.tobytes()


@pytest.mark.parametrize("size", [(200, 150), (60, 90), (112, 112)])
def test_crop_is_that_of_evaluation(size: tuple[int, int], tmp_path: Path) -> None:
    Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "noise.png")
    images = read_splits(tmp_path).train
    found = as_evaluated(images.rgb(0), SIDE)
    ((pixels, _, _),) = load_crops([images], [[0]], image_size=SIDE, workers=0, pin=False)
    assert found.size == (SIDE, SIDE)
    assert found.tobytes() == bytes(pixels.flatten().tolist())


def test_each_picture_stands_beside_its_attention(weights: Path, birds: Path, tmp_path: Path) -> None:
    run(weights, birds, "--out", tmp_path, "--limit", 5, "--columns", 3)
    assert [file.name for file in tmp_path.iterdir()] == ["attention.png"]
    sheet, images = Image.open(tmp_path / "attention.png"), read_splits(birds).test
    assert images
    assert sheet.size == (GAP + 3 * TILE, GAP + 2 * ROW)
    encoder = load(weights)
    for place, index in enumerate([0, 6, 12, 19, 25]):  # evenly spread over 32
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
    before = (tmp_path / "attention.png").read_bytes()
    run(weights, birds, "--out", tmp_path, "--limit", 5, "--columns", 3)
    assert (tmp_path / "attention.png").read_bytes() == before


def test_captions_are_classes_or_else_files(
    weights: Path, birds: Path, flat: Path, tmp_path: Path, headings: list[tuple[str, Sequence[Tile]]]
) -> None:
    one = sorted(flat.iterdir())[7]
    run(weights, birds / "test", one, "--out", tmp_path, "--limit", 33, "--columns", 20)
    captions = [tile.caption for _, tiles in headings for tile in tiles]
    classes = sorted(folder.name for folder in (birds / "test").iterdir())
    assert captions == [*(name for name in classes for _ in range(2)), one.name]
    assert [len(tiles) for _, tiles in headings] == [20, 13]


def test_one_image_in_more_columns(weights: Path, flat: Path, tmp_path: Path) -> None:
    run(weights, next(flat.iterdir()), "--out", tmp_path / "new" / "folder")
    assert Image.open(tmp_path / "new" / "folder" / "attention.png").size == (GAP + TILE, GAP + ROW)


def test_sheets_go_beside_the_weights_unless_told_otherwise(weights: Path, flat: Path) -> None:
    run(weights.parent, next(flat.iterdir()))
    assert (weights.parent / "attention.png").is_file()


def test_a_run_shows_its_own_images(
    weights: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(weights, folder / "weights.safetensors")
    save_config(Config(data=DataConfig(root=birds)), folder / "config.yaml")
    run(folder, "--limit", "3")
    run(folder, birds, "--limit", "3", "--out", tmp_path)
    assert (folder / "attention.png").read_bytes() == (tmp_path / "attention.png").read_bytes()
    assert str(folder / "attention.png") in capsys.readouterr().out


def test_unreadable_images_are_named_and_left_out(
    weights: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted(flat.iterdir())[:2]
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    run(weights, tmp_path / "broken.jpg", *good, tmp_path / "gone.png", "--out", tmp_path, "--detectors", "True")
    out = capsys.readouterr().out
    assert out.count(f"left out: '{tmp_path}/broken.jpg'") == out.count(f"left out: '{tmp_path}/gone.png'") == 1
    assert Image.open(tmp_path / "attention.png").width == GAP + 2 * TILE
    with pytest.raises(SystemExit, match="2"):
        run(weights, tmp_path / "broken.jpg", "--out", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of the 1 images can be read" in line
    assert "broken.jpg" in line


def test_any_name_can_be_a_caption(
    weights: Path, flat: Path, tmp_path: Path, headings: list[tuple[str, Sequence[Tile]]]
) -> None:
    picture = next(flat.iterdir()).read_bytes()
    names = ["鳥 ptáček птица", "two\nlines\t\x1b[31m", os.fsdecode(b"\xff\xfe"), "عصفور", "long " * 45, "🦜", " "]
    for name in names:
        (tmp_path / f"{name}.jpg").write_bytes(picture)
    run(weights, tmp_path, "--out", tmp_path / "out", "--columns", 7)
    assert {tile.caption for tile in headings[0][1]} == {f"{name}.jpg" for name in names}
    assert Image.open(tmp_path / "out" / "attention.png").size == (GAP + 7 * TILE, GAP + ROW)


def test_captions_are_cut_to_their_width() -> None:
    font = ImageFont.load_default(FONT_SIZE)
    assert fitted("Geococcyx", font, 224) == "Geococcyx"
    assert fitted("a\nb\x1b" + os.fsdecode(b"\xff"), font, 224) == r"a\nb\x1b\udcff"
    for text in ("W" * 100_000, "." * 100_000):
        cut = fitted(text, font, 224)
        assert cut[-1] == "…"
        assert 200 < font.getlength(cut) <= 224


def test_detectors_stand_by_their_share_of_the_positions(headings: list[tuple[str, Sequence[Tile]]]) -> None:
    pictures = [(f"picture {i}", Image.new("RGB", (112, 112), (40 * i, 0, 0))) for i in range(6)]
    answers = torch.zeros(6, 4, 2, 2)
    answers[:, 0], answers[:, 3] = -1, 1  # 0 never wins, 3 nearly everywhere
    answers[4, 1, 0, 0], answers[2, 1, 1, 1], answers[5, 2, 0, 1] = 9, 8, 7
    answers[3, 3, 1, 0] = 2
    maps = torch.zeros(6, 4, 2, 2)
    maps[4, 1, 0, 0] = 1
    detector_sheet(pictures, answers, maps)
    assert [heading for heading, _ in headings] == [
        "detector 3: wins 87.5 % of the positions",
        "detector 1: wins 8.3 % of the positions",
        "detector 2: wins 4.2 % of the positions",
    ]
    assert all(len(tiles) == 5 for _, tiles in headings)
    assert headings[0][1][0].caption == "picture 3"
    assert [tile.caption for tile in headings[1][1][:2]] == ["picture 4", "picture 2"]
    picture, over = headings[1][1][0].images
    assert picture is pictures[4][1]
    assert difference(over, picture)[:20, :20].min() > 0
    assert difference(over, picture)[90:, 90:].max() == 0


@pytest.mark.parametrize("released", [True, False])
def test_maximum_of_the_responses_is_what_the_branch_attends_to(released: bool) -> None:
    torch.manual_seed(0)
    branch = build_branch(16, RationaleConfig(detectors=5), ReleasedConfig(enabled=released))
    assert branch
    branch.eval()
    features = torch.randn(3, 16, 4, 4)
    with torch.inference_mode():
        found, attention = branch.responses(features), branch.pool(features).attention.view(3, 4, 4)
        best = found.amax(1, keepdim=True)
        alone = branch.alone(best)[:, 0]
        maps = branch.alone(found)
    assert found.shape == maps.shape == (3, 5, 4, 4)
    if released:
        alone = (alone - alone.amin()) / (alone.amax() - alone.amin())
    torch.testing.assert_close(alone, attention)


@pytest.mark.parametrize("released", [True, False])
def test_detector_sheet_is_written_if_wanted(released: bool, birds: Path, tmp_path: Path) -> None:
    rationale = RationaleConfig(detectors=3)
    file = write_weights(tmp_path / "w.safetensors", rationale, released=released, image_size=SIDE)
    run(file, birds / "test", "--detectors", "True")
    width, height = Image.open(tmp_path / "detectors.png").size
    assert width == GAP + 5 * TILE
    assert (height - GAP) % (ROW + LINE) == 0
    assert 1 <= (height - GAP) // (ROW + LINE) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "ROOT"], "no run folder or weights file nowhere"),
        (["WEIGHTS", "nowhere"], "no folder nowhere"),
        (["WEIGHTS", "WEIGHTS"], "neither a folder of images"),
        (["WEIGHTS"], "an IMAGE or a FOLDER"),
        (["WEIGHTS", "ROOT", "--limit", "0"], "--limit must be at least 1"),
        (["WEIGHTS", "ROOT", "--columns", "0"], "--columns must be at least 1"),
        (["WEIGHTS", "ROOT", "--out", "WEIGHTS"], "weights.safetensors"),
        (["PLAIN", "ROOT"], "has no rationale branch"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str],
    message: str,
    weights: Path,
    birds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = tmp_path / "plain.safetensors"
    if "PLAIN" in arguments:
        write_weights(plain, RationaleConfig(enabled=False))
    stands_for = {"ROOT": str(birds), "WEIGHTS": str(weights), "PLAIN": str(plain)}
    with pytest.raises(SystemExit) as stop:
        visualize.main([stands_for.get(each, each) for each in arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
