"""Search: the nearest are the nearest, the encoder is the same one; nothing is overwritten."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastcr
from fastcr import embed, search
from fastcr.config import RationaleConfig
from fastcr.measures.reranking import expand
from tests.shared import decoded, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ("--run.device", "cpu", "--run.precision", "fp32")


def embedded(weights: Path, root: Path, out: Path) -> Path:
    embed.main([*map(str, (weights, root, "--out", out)), *CPU, "--data.workers", "0"])
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


@pytest.fixture(scope="module")
def whole(weights: Path, birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn birds embedded; not to be changed."""
    return embedded(weights, birds, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture
def query(birds: Path) -> Path:
    return sorted((birds / "test").glob("*/*.jpg"))[5]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # no path is broken into two lines


def run(*args: object) -> None:
    search.main([*map(str, args), *CPU])


def found(output: str) -> list[tuple[str, str, str]]:
    """Similarity, label and path of the rows of the tables."""
    rows = re.findall(r"^│ +\d+ │ +(-?[\d.]+) │ (.*?) +│ (.*?) +│$", output, re.MULTILINE)
    return [(similarity, label.strip(), path) for similarity, label, path in rows]


@pytest.mark.parametrize("expanded", [False, True])
def test_the_nearest_are_the_most_similar(
    expanded: bool, weights: Path, whole: Path, birds: Path, query: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = fastcr.load(weights)
    with torch.inference_mode():
        own = encoder(encoder.transform(Image.open(query))[None]).embedding[0]
    vectors = torch.from_numpy(np.load(whole / "rationale.npy"))
    if expanded:
        own, vectors = expand(vectors, own[None])[0], expand(vectors)
    similarity, places = (vectors @ own).topk(7)
    with open(whole / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(rows[i]["label"], rows[i]["path"]) for i in places.tolist()]
    run(whole / "images.csv", query, "--k", "7", *["--expand"] * expanded)  # a file of the folder names it too
    shown = found(capsys.readouterr().out)
    assert [each[1:] for each in shown] == expected
    assert [float(each[0]) for each in shown] == pytest.approx(similarity.tolist(), abs=1e-4)
    if not expanded:
        assert shown[0] == ("1.0000", query.parent.name, str(query.relative_to(birds)))


def test_a_folder_is_searched_for_image_by_image(
    whole: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(birds / "test", tmp_path / "birds"))
    broken, *rest = sorted(root.glob("*/*.jpg"))
    broken.write_bytes(b"no picture")
    monkeypatch.setattr(search, "BATCH_SIZE", 5)
    monkeypatch.setattr(search, "DRAWN", 8)
    run(whole, root, "--k", "1")
    output = capsys.readouterr().out
    assert [path for _, _, path in found(output)] == [f"test/{file.relative_to(root)}" for file in rest]
    assert f"left out: {str(broken)!r} is not a readable image" in output
    assert "drawn are the first 8 of 31 images" in output
    assert Path("search.html").read_text().count("<h2>") == 8


def test_the_page_shows_each_image_beside_the_nearest_with_their_attention(
    whole: Path, birds: Path, query: Path
) -> None:
    run(whole, query, birds / "test" / "finch-masked", "--k", "3")
    page = Path("search.html").read_text()
    sources = re.findall(r'<img src="(data:[^"]+)" alt="(.*?)">', page)
    assert len(sources) == 3 * (1 + 3) * 2  # a picture and its overlay each
    pictures = [decoded(source, "jpeg") for source, _ in sources]
    assert len(set(pictures[:2])) == 2
    assert pictures[0] == pictures[2]  # the nearest is the image itself
    assert pictures[1] == pictures[3]
    assert [alt.startswith("attention over the image: ") for _, alt in sources] == [False, True] * 12
    assert f"1.000 {query.parent.name} {query.name}" in page


def test_without_a_branch_the_mean_is_searched_and_no_attention_drawn(
    birds: Path, query: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_weights(tmp_path / "plain.safetensors", RationaleConfig(enabled=False))
    run(embedded(plain, birds, tmp_path / "out"), query, "--k", "2")
    assert found(capsys.readouterr().out)[0][0] == "1.0000"
    page = Path("search.html").read_text()
    assert page.count("<img ") == 3
    assert "attention" not in page


def test_the_encoder_is_the_one_that_made_the_embeddings(
    birds: Path, query: Path, tmp_path: Path, refused: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    weights = write_weights(tmp_path / "weights.safetensors")
    out = embedded(weights, birds, tmp_path / "out")
    moved = weights.rename(tmp_path / "moved.safetensors")
    line = refused(search.main, out, query)
    assert f"the encoder of these embeddings, {weights}, is gone: --encoder says where it is now" in line
    run(out, query, "--encoder", moved, "--k", "1")
    assert found(capfd.readouterr().out)[0][0] == "1.0000"
    write_weights(weights, seed=1)
    assert f"{weights} is not the encoder that made these embeddings" in refused(search.main, out, query)
    assert "is not the encoder" in refused(search.main, out, query, "--encoder", weights)


def test_pictures_that_are_gone_are_counted(
    weights: Path, birds: Path, query: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(birds, tmp_path / "birds"))
    out = embedded(weights, root, tmp_path / "out")
    shutil.rmtree(root / "train")
    run(out, query, "--k", "10")
    output = capsys.readouterr().out
    gone = sum(path.startswith("train/") for _, _, path in found(output))
    assert 0 < gone < 10
    assert f"{gone} of the nearest images are no longer under {root}, so they are not drawn" in output
    assert Path("search.html").read_text().count("<figure") == 1 + 10 - gone


def test_broken_embeddings_are_refused_in_a_line(
    weights: Path, flat: Path, query: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out, name = embedded(weights, flat, tmp_path / "out"), "rationale.npy"
    whole, facts = (out / name).read_bytes(), json.loads((out / "encoder.json").read_text())
    for content in (whole[:-1000], b"no embeddings"):
        (out / name).write_bytes(content)
        assert f"{name} is missing or broken" in refused(search.main, out, query)
    (out / name).write_bytes(whole)
    (out / "encoder.json").write_text(json.dumps(facts | {"root": None}))
    assert "encoder.json is missing or broken" in refused(search.main, out, query)
    (out / "encoder.json").write_text(json.dumps(facts))
    lines = (out / "images.csv").read_text().splitlines(keepends=True)
    (out / "images.csv").write_text("".join(lines[:-1]))
    assert "64 embeddings of 63 images" in refused(search.main, out, query)
    (out / "images.csv").unlink()
    assert "images.csv is missing or broken" in refused(search.main, out, query)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["WHOLE"], "name an IMAGE"),
        (["WHOLE", "nowhere"], "no folder nowhere"),
        (["WHOLE", "nowhere.jpg"], "none of the 1 images can be read"),
        (["nowhere", "QUERY"], "no embeddings at nowhere"),
        (["WHOLE", "QUERY", "--out", "mine.html"], "left as it is"),
    ],
)
def test_mistakes_get_one_line(
    args: list[str], message: str, whole: Path, query: Path, refused: Callable[..., str]
) -> None:
    Path("mine.html").write_text("mine")
    stands_for = {"WHOLE": whole, "QUERY": query}
    assert message in refused(search.main, *(stands_for.get(each, each) for each in args), *CPU)
