"""Evaluation: the same scores whenever, in whatever batches; what is left out; what embeddings and crops are."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.transforms import v2

from fastcr import embed as embed_command
from fastcr import evaluate, search
from fastcr.config import RationaleConfig
from fastcr.data import crop_loader
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.encoders.encoder import load
from fastcr.measures.poolings import SHOWN
from fastcr.measures.retrieval import retrieval
from fastcr.runs.context import Context
from tests.shared import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")
SECTIONS = {
    "retrieval": {"rank1", "rank5", "mAP"},
    "knn": {"top1"},
    "linear": {"top1", "top5"},
    "few_label": {"20", "50"},  # of four a class; 1 and 10 % are the same picture as 20 %
}
CPU = ("--run.device", "cpu", "--data.workers", "0")


@pytest.fixture
def images(birds: Path) -> ImageList:
    test = read_splits(birds).test
    assert test is not None
    return test


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def test_run_folder_gives_the_results_of_the_runs_end_and_more(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(copied)
    (copied / "results.json").unlink()
    evaluate.main([str(copied), *CPU, "--all", "--linear.epochs", "20"])
    captured, found = capsys.readouterr(), results(copied)
    assert captured.err == ""
    assert found["retrieval"] == before["retrieval"]
    assert not {"knn", "linear"} & before.keys()
    poolings = {"mean", "rationale", "gem", "norm", "gaussian", "ddt"}
    for part in (found, found["frozen_init"]):
        assert part["retrieval"].keys() == part["retrieval_centred"].keys() == poolings
        for section, keys in SECTIONS.items():
            assert section == "retrieval" or part[section].keys() == {"mean", "rationale"}
            for scores in part[section].values():
                assert scores.keys() == keys
                assert all(0 <= score <= 100 and f"{score:.2f}" in captured.out for score in scores.values())
    assert found["linear"]["mean"]["top5"] > found["linear"]["mean"]["top1"]
    best, sections = found["best"], ("retrieval", "retrieval_centred")
    for name, part in (("trained", found), ("baseline", found["frozen_init"])):
        assert best[name]["mAP"] == max(each["mAP"] for section in sections for each in part[section].values())
    compared = found["comparison"]
    assert (compared["before"], compared["after"]) == (best["baseline"], best["trained"])
    assert compared["queries"] == 32
    changed = 32 * (best["trained"]["rank1"] - best["baseline"]["rank1"]) / 100
    assert compared["gained"] - compared["lost"] == pytest.approx(changed)
    assert compared["mAP_difference"] == pytest.approx(best["trained"]["mAP"] - best["baseline"]["mAP"])


def some_classes(birds: Path, root: Path, train: slice, test: slice) -> Path:
    """The birds with some of the classes in each split."""
    for split, part in (("train", train), ("test", test)):
        (root / split).mkdir(parents=True)
        for folder in sorted((birds / split).iterdir())[part]:
            (root / split / folder.name).symlink_to(folder)
    return root


@pytest.mark.parametrize(
    ("train_", "test", "known"),
    [
        (slice(4, 9), slice(2, 6), slice(4, 6)),  # the test split lacks classes, and has others besides
        (slice(8), slice(8, 16), None),  # it has only others
    ],
)
def test_splits_need_not_have_the_same_classes(
    copied: Path,
    birds: Path,
    tmp_path: Path,
    train_: slice,
    test: slice,
    known: slice | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Retrieval is that of the test images alone; classifiers get those whose class has training images."""
    odd = some_classes(birds, tmp_path / "odd", train_, test)
    few = ["--all", "--linear.epochs", "2", "--linear.few", "50"]
    evaluate.main([str(copied), "--data.root", str(odd), *CPU, *few])
    found, said = results(copied), capsys.readouterr().out
    evaluate.main([str(copied), "--data.root", str(odd / "test"), *CPU])
    assert found["retrieval"]["mean"] == results(copied)["retrieval"]["mean"]
    assert (found["images"], found["classes"]) == (2 * (test.stop - (test.start or 0)), test.stop - (test.start or 0))
    left_out = found["images"] - (0 if known is None else 2 * (known.stop - (known.start or 0)))
    assert (f"{left_out} of {found['images']} test images are of classes without training images" in said) == (
        left_out > 0
    )
    assert {"knn", "linear", "few_label"} & found.keys() == ({"knn", "linear", "few_label"} if known else set())
    if known:
        shared = some_classes(birds, tmp_path / "shared", train_, known)
        evaluate.main([str(copied), "--data.root", str(shared), *CPU, *few])
        assert found["knn"] == results(copied)["knn"]


def test_what_cannot_be_retrieved_gets_no_score(
    copied: Path, birds: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    for folder in (birds / "test").iterdir():
        (tmp_path / "root" / folder.name).mkdir(parents=True)
        shutil.copy(min(folder.iterdir()), tmp_path / "root" / folder.name)
    line = refused(evaluate.main, copied, "--data.root", tmp_path / "root", *CPU)
    assert "has no class of two images, so nothing can be measured" in line


def test_boxes_say_where_the_attention_lies(
    copied: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((birds / "test").glob("*/*.jpg"))
    rows = [f"test/{file.relative_to(birds / 'test')},0.25,0.25,0.75,0.75" for file in files]
    (tmp_path / "boxes.csv").write_text("path,left,top,right,bottom\n" + "\n".join(rows) + "\n")
    boxes = ["--data.boxes", str(tmp_path / "boxes.csv")]
    # the shorter side becomes 37 pixels, of which 32 are seen
    sizes = [Image.open(file).size for file in files]
    seen = [math.prod(0.5 * (37 * side // min(size)) / 32 for side in size) for size in sizes]
    evaluate.main([str(copied), *CPU, *boxes])
    out = capsys.readouterr().out
    for part in (results(copied), results(copied)["frozen_init"]):
        found = part["localisation"]
        assert found.keys() == {"attention", "average", "gaussian", "uniform"}
        assert found["uniform"]["inside"] == pytest.approx(100 * sum(seen) / len(seen))
        assert found["gaussian"]["pointing"] == 100
        assert f"{found['attention']['inside']:.2f}" in out


def test_frozen_and_trained_encoder_see_crops_decoded_once(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoded, decode = Counter[str](), ImageList.rgb

    def count(self: ImageList, index: int, least: int) -> Image.Image:
        decoded[self.path(index)] += 1
        return decode(self, index, least)

    monkeypatch.setattr(ImageList, "rgb", count)
    evaluate.main([str(copied), *CPU, "--all", "--linear.enabled", "False"])
    kept = results(copied)
    assert {"retrieval", "knn"} <= kept.keys()
    assert not {"linear", "few_label", "localisation"} & kept.keys()  # not wanted, or nothing to measure it with
    assert set(decoded.values()) == {1}
    monkeypatch.setattr(crop_loader, "free_memory", lambda: 0)
    decoded.clear()
    evaluate.main([str(copied), *CPU, "--all", "--linear.enabled", "False"])
    assert max(decoded.values()) == 4  # training images, for DDT's axis and for kNN, of both
    assert results(copied) == kept
    capsys.readouterr()


def test_unreadable_image_is_named_left_out_and_counted(
    copied: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(birds, tmp_path / "birds"))
    broken = sorted((root / "test").glob("*/*.jpg"))[3]
    broken.write_bytes(broken.read_bytes()[:300])
    evaluate.main([str(copied), "--data.root", str(root), *CPU])
    assert str(broken) in capsys.readouterr().out
    assert results(copied)["images"] == 31
    broken_scores = results(copied)["retrieval"]

    # the others are scored as if it had never been there
    broken.unlink()
    evaluate.main([str(copied), "--data.root", str(root), *CPU])
    assert results(copied)["images"] == 31
    assert broken_scores == results(copied)["retrieval"]


# --- encoders by name, without a run ---


def test_a_frozen_vit_is_judged_by_every_pooling(
    birds: Path, images: ImageList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    settings = ["--model.weights", "none", "--data.image_size", "32", "--data.root", str(birds), *CPU]
    evaluate.main(["timm:vit_tiny_patch16_224", *settings, "--all", "--linear.enabled", "False"])
    out, found = capsys.readouterr().out, json.loads(Path("timm-vit_tiny_patch16_224-results.json").read_text())
    assert found["encoder"] == {"name": "timm:vit_tiny_patch16_224", "weights": "none", "image_size": 32}
    poolings = {"mean", "gem", "norm", "gaussian", "ddt", "cls"}
    assert found["retrieval"].keys() == found["retrieval_centred"].keys() == poolings
    assert found["best"].keys() == {"baseline"}
    every = [each["mAP"] for part in ("retrieval", "retrieval_centred") for each in found[part].values()]
    assert found["best"]["baseline"]["mAP"] == max(every)
    assert f"best: {SHOWN.get(best := found['best']['baseline']['pooling'], best)}" in out
    assert all(f"{precision:.2f}" in out for precision in every)
    assert "after" not in out

    # timm's own class token, of the images that evaluation sees
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    ((crops, _, _),) = crop_loader.load_crops([images], [[*range(32)]], 32, Context())
    seen = v2.functional.normalize(
        crops.permute(0, 3, 1, 2) / 255, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    )
    with torch.inference_mode():
        token = torch.nn.functional.normalize(model.forward_features(seen)[:, 0], dim=1)
    expected = retrieval(token, torch.tensor(images.labels))
    assert found["retrieval"]["cls"]["mAP"] == pytest.approx(expected.mAP, abs=0.05)


def test_a_resnet_by_name_and_weights_is_that_encoder(birds: Path, tmp_path: Path) -> None:
    plain = write_weights(tmp_path / "plain.safetensors", RationaleConfig(enabled=False))
    backbone = load(plain).backbone
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    root = ["--data.root", str(birds), *CPU, "--all", "--linear.epochs", "1"]
    evaluate.main([str(plain), *root, "--out", str(tmp_path / "file.json")])
    named = {
        "--model.weights": str(tmp_path / "backbone.pt"),
        "--model.last_stage": "layer3",
        "--data.image_size": "32",
    }
    evaluate.main(["resnet18", *chain.from_iterable(named.items()), *root, "--out", str(tmp_path / "name.json")])
    of_file, of_name = (json.loads((tmp_path / f"{kind}.json").read_text()) for kind in ("file", "name"))
    for section in ("retrieval", "retrieval_centred", "knn", "linear", "few_label"):
        assert of_name[section] == of_file[section]
    assert not (tmp_path / "results.json").exists()


def test_encoders_are_ranked_and_the_best_one_searches(
    finished: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(load(finished).backbone.state_dict(), "backbone.pt")
    names = [str(finished), "resnet18=none", "resnet18=backbone.pt", "resnet18=nowhere.pt"]
    named = ["--model.last_stage", "layer3", "--data.image_size", "32"]
    evaluate.main([*names, *named, "--data.root", str(birds), *CPU])
    out, found = capsys.readouterr().out, json.loads(Path("ranking.json").read_text())
    rows = {row["encoder"]: row for row in found["ranking"]}
    assert rows.keys() == {*names[:3]}  # and of the last it says why not
    assert "left out: resnet18=nowhere.pt: " in out
    assert [row["mAP"] for row in found["ranking"]] == sorted((row["mAP"] for row in rows.values()), reverse=True)
    (tmp_path / "alone").mkdir()
    evaluate.main([str(finished), "--all", "--linear.enabled", "False", "--out", "alone/results.json", *CPU])
    alone = results(tmp_path / "alone")
    for row, pooling in ((rows[names[0]], "rationale"), (rows["resnet18=backbone.pt"], "mean")):
        assert (row["pooling"], row["image_size"], row["seconds"] > 0) == (pooling, 32, True)
        assert row["mAP"] == pytest.approx(alone["retrieval"][pooling]["mAP"])
        assert row["knn"] == alone["knn"][pooling]["top1"]
    capsys.readouterr()

    # an encoder by name embeds and searches as one with weights of its own does
    size = ["--data.image_size", "32", *CPU]
    embed_command.main(["resnet18=none", str(birds / "test"), "--out", "index", *size])
    search.main(["index", str(birds / "test"), "--k", "1", "--run.device", "cpu"])
    assert capsys.readouterr().out.count("1.0000") == 32  # each finds itself


def test_pairs_measure_a_run_before_and_after(
    copied: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [sorted(folder.iterdir()) for folder in sorted((birds / "test").iterdir())]
    lines = [f"{a},{b},same" for a, b in files] + [f"{a[0]},{b[1]},different" for a, b in pairwise(files)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    evaluate.main([str(copied), "--pairs", str(tmp_path / "pairs.csv"), *CPU])
    out, found = capsys.readouterr().out, json.loads((tmp_path / "pairs-results.json").read_text())
    assert found["pairs"] == {"same": 16, "different": 15, "left_out": 0}
    names = [(row["encoder"], row["pooling"]) for row in found["encoders"]]
    assert names == [(each, name) for each in (f"{copied}, before", str(copied)) for name in ("mean", "rationale")]
    encoder = load(copied)
    vectors = {file: encoder(encoder.transform(Image.open(file))[None]).embedding[0] for row in files for file in row}
    cosines = [float(vectors[a] @ vectors[b]) for a, b in files]
    cosines += [float(vectors[a[0]] @ vectors[b[1]]) for a, b in pairwise(files)]
    assert found["encoders"][-1]["auc"][0] == pytest.approx(100 * roc_auc_score([1] * 16 + [0] * 15, cosines), abs=0.5)
    assert "the last row's AUC is {:+.1f}".format(found["gained"][0]) in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet18"], "needs --data.root"),
        ([], "name a RUN, or an encoder such as timm:NAME"),
        (["resnet18", "RUN", "--all"], "--all and --data.boxes are for one encoder"),
        (["timm:vit_tinny", "--data.root", "BIRDS"], "no encoder 'timm:vit_tinny'"),
        (["RUN", "--model.weights", "none"], "is for encoders by name"),
        (["RUN", "--out", "nowhere/results.json"], "--out nowhere/results.json names no file"),
    ],
)
def test_mistakes_with_names_get_one_line(
    args: list[str], message: str, copied: Path, birds: Path, refused: Callable[..., str]
) -> None:
    pytest.importorskip("timm")
    stands_for = {"RUN": str(copied), "BIRDS": str(birds)}
    assert message in refused(evaluate.main, *(stands_for.get(each, each) for each in args), *CPU)
