"""Visualize: the pictures and maps that evaluation sees, in their places."""

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
from fastcr.output.gallery import as_evaluated, overlay, spread
from fastcr.output.sheets import GAP
from fastcr.runs.command_line import save_config
from fastcr.runs.context import Context
from tests.shared import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, TILE = 112, 2 * 112 + GAP
ROW = SIDE + GAP


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors", image_size=SIDE)


def run(*args: object) -> None:
    visualize.main([*map(str, args), "--run.device", "cpu"])


@pytest.mark.parametrize("size", [(200, 150), (60, 90)])
def test_crop_is_that_of_evaluation(size: tuple[int, int], tmp_path: Path) -> None:
    Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "noise.png")
    images = read_splits(tmp_path).train
    found = as_evaluated(images.rgb(0), SIDE)
    ((pixels, _, _),) = load_crops([images], [[0]], SIDE, Context())
    assert found.size == (SIDE, SIDE)
    assert found.tobytes() == bytes(pixels.flatten().tolist())


def test_each_picture_of_a_run_stands_beside_its_attention(weights: Path, birds: Path, tmp_path: Path) -> None:
    shutil.copyfile(weights, tmp_path / "weights.safetensors")
    save_config(Config(data=DataConfig(root=birds)), tmp_path / "config.yaml")
    run(tmp_path, "--limit", 8)
    sheet, images = Image.open(tmp_path / "attention.png"), read_splits(birds).test
    assert images
    assert sheet.size == (GAP + 6 * TILE, GAP + 2 * ROW)
    encoder = load(weights)
    for place, index in enumerate(spread(range(32), 8)):
        crop = as_evaluated(images.rgb(index), SIDE)
        pixels = torch.tensor(bytearray(crop.tobytes())).view(1, SIDE, SIDE, 3)
        with torch.inference_mode():
            attention = encoder.both(normalise(pixels, torch.float32)).attention
        assert attention is not None
        left, top = GAP + place % 6 * TILE, GAP + place // 6 * ROW
        shown = sheet.crop((left, top, left + SIDE, top + SIDE))
        assert shown.tobytes() == crop.tobytes()
        over = sheet.crop((left + SIDE, top, left + 2 * SIDE, top + SIDE))
        assert max(high for _, high in ImageChops.difference(over, overlay(crop, attention[0])).getextrema()) <= 2
    run(tmp_path, "--limit", 8, "--out", tmp_path / "attention.html")
    assert (tmp_path / "attention.html").read_text().count("attention over the image: ") == 8


def test_unreadable_images_are_named_and_left_out(
    weights: Path, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = sorted(flat.iterdir())[:2], tmp_path / "sheet.png"
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    run(weights, tmp_path / "broken.jpg", *good, tmp_path / "gone.png", "--out", out)
    said = capsys.readouterr().out
    assert said.count(f"left out: '{tmp_path}/broken.jpg'") == said.count(f"left out: '{tmp_path}/gone.png'") == 1
    assert Image.open(out).width == GAP + 2 * TILE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["WEIGHTS"], "an IMAGE or a FOLDER"),
        (["WEIGHTS", "ROOT", "--out", "WEIGHTS"], "must end in"),
        (["WEIGHTS", "gone.jpg", "--out", "OUT"], "none of the 1 images can be read: './gone.jpg'"),
        (["PLAIN", "ROOT"], "has no attention branch"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, weights: Path, birds: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    plain = write_weights(tmp_path / "plain.safetensors", RationaleConfig(enabled=False))
    stands_for = {"ROOT": birds, "WEIGHTS": weights, "PLAIN": plain, "OUT": tmp_path / "out.png"}
    assert message in refused(visualize.main, *(stands_for.get(each, each) for each in arguments))
