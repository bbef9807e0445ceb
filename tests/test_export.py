"""Exports: each format loads where it is meant to and agrees with the encoder; what is refused; what the Hub gets."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from safetensors.torch import load_file
from torch import Tensor

import fastcr
from fastcr import export
from fastcr.config import RationaleConfig
from fastcr.encoders.encoder import Encoder
from fastcr.measures.poolings import key_of, pooled
from tests.shared import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder(finished: Path) -> Encoder:
    return fastcr.load(finished)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def agrees(found: Any, encoder: Encoder, count: int, tolerance: float) -> None:
    for got, expected in zip(found, encoder(images(count)), strict=True):
        torch.testing.assert_close(torch.as_tensor(got), expected, atol=tolerance, rtol=0)


def test_torchvision_takes_all_but_its_classifier_from_the_safetensors_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = write_weights(tmp_path / "mine.safetensors", last_stage="layer4")
    export.main([str(weights), "--format", "safetensors"])
    file = tmp_path / "mine-export.safetensors"
    assert capfd.readouterr() == (f"exported: {file}\n", "")
    resnet = torchvision.models.resnet18()
    missing, unexpected = resnet.load_state_dict(load_file(file), strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert sorted(unexpected) == ["branch.bias", "branch.weight"]
    resnet.fc = torch.nn.Identity()
    encoder = fastcr.load(weights)
    with torch.no_grad():
        mean = torch.nn.functional.normalize(resnet.eval()(images(2)), dim=1)
    torch.testing.assert_close(mean, encoder.both(images(2)).mean, atol=1e-5, rtol=0)
    agrees(fastcr.load(file)(images(2)), encoder, 2, 0)


@pytest.fixture(scope="module")
def graph(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("torch") / "new folder" / "encoder.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the user would see it
        export.main([str(finished), "--format", "torch", "--out", str(file)])
    return file


@pytest.mark.parametrize("count", [1, 5])
def test_the_torch_graph_agrees_at_any_batch(count: int, graph: Path, encoder: Encoder) -> None:
    extra = {"fastcr.json": ""}
    program = torch.export.load(graph, extra_files=extra)
    found = program.module()(images(count))
    assert type(found) is tuple  # no class of fastcr
    agrees(found, encoder, count, 1e-5)
    facts = json.loads(extra["fastcr.json"])
    assert facts["mean"] == pytest.approx(encoder.mean)
    assert facts["pooling"] == "rationale"


@pytest.mark.parametrize("pooling", ["gem", "feature-strength"])
def test_the_graph_pools_as_it_is_asked_to(pooling: str, tmp_path: Path) -> None:
    encoder = fastcr.load(write_weights(tmp_path / "plain.safetensors", RationaleConfig(enabled=False)))
    module = export.graph_of(encoder, pooling).module()
    for count in (1, 5):
        embedding, attention = module(images(count))
        expected = pooled(encoder.features(images(count)), encoder, key_of(pooling, encoder))
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(attention, torch.full((count, 2, 2), 0.25))


def test_timm_takes_the_safetensors_file_of_one_of_its_models_and_its_graph_agrees(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    weights = write_weights(tmp_path / "mine.safetensors", backbone="timm:test_vit", last_stage="layer4")
    export.main([str(weights), "--format", "safetensors"])
    state = load_file(tmp_path / "mine-export.safetensors")
    model = timm.create_model("test_vit", num_classes=0)
    assert set(model.load_state_dict(state, strict=False).unexpected_keys) == {"branch.weight", "branch.bias"}
    encoder = fastcr.load(weights)
    agrees(fastcr.load(tmp_path / "mine-export.safetensors")(images(2)), encoder, 2, 0)
    agrees(export.graph_of(encoder).module()(images(5)), encoder, 5, 1e-5)


@pytest.fixture(scope="module")
def onnx_file(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    file = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    export.main([str(finished), "--format", "onnx", "--out", str(file)])
    return file


@pytest.mark.parametrize("count", [1, 5])
def test_onnxruntime_agrees_at_any_batch(count: int, onnx_file: Path, encoder: Encoder) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    found = session.run(["embedding", "attention"], {"images": images(count).numpy()})
    agrees(found, encoder, count, 1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["fastcr"])["image_size"] == 32


def test_the_onnx_file_is_one_file_of_plain_operators(onnx_file: Path) -> None:
    import onnx

    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", export.OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert [each.name for each in model.graph.input] == ["images"]
    assert list(onnx_file.parent.iterdir()) == [onnx_file]


def test_the_hub_folder_loads_and_its_card_says_what_was_measured(
    finished: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub, hub = pytest.importorskip("huggingface_hub"), tmp_path / "mine"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)  # not needed to write it
        export.main([str(finished), "--format", "hub", "--out", str(hub)])
    assert {file.name for file in hub.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert list(tmp_path.iterdir()) == [hub]  # nothing half-written beside it
    agrees(fastcr.load(hub)(images(3)), encoder, 3, 0)
    assert json.loads((hub / "config.json").read_text())["facts"] == json.loads(json.dumps(encoder.facts))

    card = huggingface_hub.ModelCard.load(hub / "README.md")
    results = json.loads((finished / "results.json").read_text())
    assert (card.data.library_name, card.data.license, card.data.model_name) == ("fastcr", "apache-2.0", "mine")
    (line,) = [line for line in card.text.splitlines() if line.startswith("| attention |")]
    scores = [
        part["retrieval"]["rationale"][key] for part in (results["frozen_init"], results) for key in ("rank1", "mAP")
    ]
    assert line == "| attention | " + " | ".join(f"{score:.2f}" for score in scores) + " |"
    assert "birds, 32 images of 16 classes" in card.text
    assert "best pooling, " in card.text
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert settings["moco"]["queue_size"] == 24


def test_nothing_for_the_hub_names_a_path_of_this_machine(finished: Path, copied: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["model"]["weights"], config["data"]["root"] = "/home/someone/trunk.pth", "/home/someone/pictures"
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    results = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text(json.dumps(results | {"folder": "/home/someone/pictures/train"}))
    export.main([str(copied), "--format", "hub"])
    for file in (copied / "weights-hub").iterdir():
        content = file.read_bytes()
        assert b"someone" not in content
        assert str(finished.parent).encode() not in content
        assert str(tmp_path).encode() not in content
    card = (copied / "weights-hub" / "README.md").read_text()
    assert "weights: trunk.pth" in card
    assert "pictures, 32 images of 16 classes" in card


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--format hub", "results.json is broken"),
        ("--format hub --pooling gem", "--pooling goes with --format torch and onnx"),
        ("--format onnx", 'needs onnxscript: pip install "fastcr[onnx]"'),
        ("--format torch", "weights.pt2 is there already"),
    ],
)
def test_mistakes_get_one_line_and_nothing_is_written(
    args: str, message: str, copied: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    (copied / "results.json").write_text('{"images": 3}')
    (copied / "weights.pt2").write_text("precious")
    before = {file.name: file.read_bytes() for file in copied.iterdir()}
    assert message in refused(export.main, copied, *args.split())
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == before


def test_an_encoder_that_cannot_be_exported_gets_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def pooled(self: Encoder, features: Tensor) -> Any:
        raise NotImplementedError("no such\nop")

    monkeypatch.setattr(Encoder, "pooled", pooled)
    line = refused(export.main, finished, "--format", "torch", "--out", tmp_path / "x.pt2")
    assert "resnet18 cannot be made a graph: no such op" in line
    assert not list(tmp_path.iterdir())


def test_a_released_branch_gets_no_graph_and_a_warning_on_its_card(tmp_path: Path, refused: Callable[..., str]) -> None:
    weights = write_weights(tmp_path / "released.safetensors", released=True)
    assert "scaled over the whole batch" in refused(export.main, weights, "--format", "torch")
    export.main([str(weights), "--format", "hub"])
    folder = tmp_path / "released-hub"
    assert "depends on the images beside it" in (folder / "README.md").read_text()
    agrees(fastcr.load(folder)(images(3)), fastcr.load(weights), 3, 0)
