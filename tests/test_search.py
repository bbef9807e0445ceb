"""Search: the nearest are the nearest, the encoder is the same one; nothing is overwritten."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastcr
from fastcr import embed, search
from fastcr.config import RationaleConfig
from fastcr.measures.reranking import expand, whiten
from tests.shared import ROOT, decoded, write_weights
from tests.test_embed import table

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ("--run.device", "cpu", "--run.precision", "fp32")


def embedded(weights: Path, root: Path, out: Path) -> Path:
    embed.main([*map(str, (weights, root, "--out", out)), *CPU, "--data.workers", "0"])
    return out


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
    rows = table(whole)
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
    assert [file.name for file in (tmp_path / "out").glob("*.npy")] == ["mean.npy"]
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
    assert "no run folder or weights file nope" in refused(search.main, out, query, "--encoder", "nope")
    run(out, query, "--encoder", moved, "--k", "1")
    assert found(capfd.readouterr().out)[0][0] == "1.0000"
    write_weights(weights, seed=1)
    assert f"{weights} is not the encoder that made these embeddings" in refused(search.main, out, query)
    assert "is not the encoder" in refused(search.main, out, query, "--encoder", weights)


def test_without_itself_and_with_all_rows_as_csv_and_json(
    whole: Path, birds: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LISTED", 10)
    run(whole, birds, "--k", "3")
    output = capsys.readouterr().out
    assert len(found(output)) == 10
    assert "86 further rows: --csv and --json print all" in output
    run(whole, birds, "--k", "4", "--csv", "--out", "not.drawn")
    with_self = [*csv.DictReader(capsys.readouterr().out.splitlines())]
    run(whole, birds, "--k", "3", "--exclude-self", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3 * 32
    assert [row["rank"] for row in rows] == [1, 2, 3] * 32
    others = [row for row in with_self if os.path.join(birds, row["path"]) != row["query"]]
    assert [row["path"] for row in rows] == [row["path"] for row in others]


def test_near_copies_and_outliers_among_the_embedded(
    weights: Path, whole: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "birds"
    root.mkdir()
    files = sorted((birds / "test").glob("*/*.jpg"))
    for name, file in {"a.jpg": files[0], "b.jpg": files[9], "c.jpg": files[0], "d.jpg": files[20]}.items():
        shutil.copyfile(file, root / name)
    Image.new("RGB", (60, 60), "red").save(root / "odd.png")
    out = embedded(weights, root, tmp_path / "out")
    capsys.readouterr()
    run(out, "--duplicates", "0.99999", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [(row["group"], row["path"], row["label"]) for row in rows] == [(1, "a.jpg", ""), (1, "c.jpg", "")]
    run(out, "--duplicates", "0.99999")
    assert "2 of 5 images have near copies, in 1 groups" in capsys.readouterr().out
    run(out, "--outliers", "2", "--csv")
    first, second = csv.DictReader(capsys.readouterr().out.splitlines())
    vectors = torch.from_numpy(np.load(out / "rationale.npy"))
    similar = (vectors @ vectors.T).fill_diagonal_(-1).amax(1)
    assert [float(row["similarity"]) for row in (first, second)] == pytest.approx(similar.sort().values[:2].tolist())
    assert first["path"] == "odd.png"


@pytest.mark.parametrize("options", [["--whiten"], ["--centre", "--expand"], ["--whiten", "--expand"]])
def test_queries_are_treated_as_the_embedded_images_were(
    options: list[str], weights: Path, birds: Path, query: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed.main([*map(str, (weights, birds, "--out", tmp_path / "out")), *CPU, "--data.workers", "0", *options])
    plain = torch.from_numpy(np.load(tmp_path / "out" / "plain.npy"))
    moved = whiten(plain, plain) if "--whiten" in options else F.normalize(plain - plain.mean(0), dim=1)
    own = moved[[row["path"] for row in table(tmp_path / "out")].index(str(query.relative_to(birds)))]
    if "--expand" in options:
        own, moved = expand(moved, own[None])[0], expand(moved)
    capsys.readouterr()
    run(tmp_path / "out", query, "--k", "7", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [row["similarity"] for row in rows] == pytest.approx((moved @ own).topk(7).values.tolist(), abs=1e-3)


def test_the_python_of_the_documentation_runs(weights: Path, whole: Path, birds: Path) -> None:
    plain, sklearn, qdrant = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "search.md").read_text(), re.DOTALL)
    files = sorted((birds / "test").glob("*/*.jpg"))
    names = {"files": files, "labels": [file.parent.name for file in files]}
    for code in (plain, sklearn):
        code, named = re.subn(r'"runs/.*?"', repr(str(weights)), code)
        assert named == 1
        exec(compile(code, "docs/search.md", "exec"), names)
    assert names["similarity"].shape == (32, 32)  # type: ignore[attr-defined]
    assert names["classifier"].predict(files[:2]).shape == (2,)  # type: ignore[attr-defined]
    pytest.importorskip("qdrant_client")
    Path("EMB").symlink_to(whole)
    exec(compile(qdrant, "docs/search.md", "exec"), names)
    (first, *_) = names["nearest"]
    assert (round(first.score, 3), first.payload["row"]) == (1, "0")  # type: ignore[attr-defined]


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
        (["WHOLE", "QUERY", "--outliers", "3"], "and no IMAGE"),
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
