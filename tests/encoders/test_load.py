"""`fastcr.load`: what it takes, what comes back, what it refuses."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import fastcr
from fastcr.config import RationaleConfig, ReleasedConfig
from fastcr.data.images import ImageList
from fastcr.data.views import normalise
from fastcr.encoders.encoder import Encoder
from fastcr.encoders.released import ReleasedBranch
from fastcr.errors import UsageError
from fastcr.measures import embeddings
from fastcr.runs.checkpoint import load_weights, save_weights
from tests.shared import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")
WITHIN: dict[str, Any] = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("run") / "weights.safetensors")


@pytest.fixture(scope="module")
def encoder(weights: Path) -> Encoder:
    return fastcr.load(weights)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_importing_the_package_alone_imports_no_torch() -> None:
    code = "import sys, fastcr; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        fastcr.lod  # noqa: B018


@pytest.mark.parametrize("given", ["folder", "file", "text"])
def test_a_run_folder_and_its_file_give_the_embeddings_of_the_evaluation(given: str, weights: Path) -> None:
    encoder = fastcr.load({"folder": weights.parent, "file": weights, "text": str(weights.parent)}[given])
    _, facts = load_weights(weights)
    mean, rationale, attention = encoder.both(images(3))
    found = encoder(images(3))
    torch.testing.assert_close(found.embedding, rationale)
    torch.testing.assert_close(found.attention, attention)
    torch.testing.assert_close(encoder.mean_embedding(images(3)), mean)
    assert not torch.allclose(found.embedding, mean, atol=1e-4)
    assert (encoder.image_size, encoder.ignored, encoder.facts["detectors"]) == (32, (), facts["detectors"])
    assert (encoder.mean, encoder.std) == (tuple(facts["mean"]), tuple(facts["std"]))


def test_what_comes_back_is_unit_vectors_and_maps_that_sum_to_one(encoder: Encoder) -> None:
    embeddings, attention = encoder(images(4))
    assert (embeddings.shape, attention.shape) == ((4, 256), (4, 2, 2))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(4))
    alone = encoder(images(4)[3:])
    torch.testing.assert_close(alone.embedding[0], embeddings[3], atol=1e-5, rtol=0)


def test_a_cpu_encodes_crops_a_few_at_a_time(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = encoder.features(normalise(crops, torch.float32))
    monkeypatch.setattr("fastcr.encoders.encoder.FEW", 2 * 32**2)
    seen = list[int]()
    hook = encoder.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    features, token = encoder.of_crops(crops)
    hook.remove()
    assert seen == [2, 2, 1]
    assert token is None
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features, whole, atol=1e-5, rtol=1e-4)


def test_an_encoder_comes_frozen_and_in_eval_mode_and_can_be_tuned(weights: Path) -> None:
    encoder = fastcr.load(weights)
    assert not any(module.training for module in encoder.modules())
    assert not encoder(images(1)).embedding.requires_grad
    encoder.requires_grad_(True).train()
    encoder(images(4)).embedding[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_without_a_branch_the_attention_is_uniform_and_the_embedding_the_mean_one(tmp_path: Path) -> None:
    encoder = fastcr.load(write_weights(tmp_path / "plain.safetensors", RationaleConfig(enabled=False)))
    embeddings, attention = encoder(images(2))
    assert torch.equal(attention, torch.full((2, 2, 2), 0.25))
    assert torch.equal(embeddings, encoder.mean_embedding(images(2)))


def test_the_weights_file_comes_before_an_exported_one(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    assert fastcr.load(tmp_path).image_size == 32
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"weights\.safetensors is not a whole safetensors file"):
        fastcr.load(tmp_path)


@pytest.mark.parametrize("size", [(96, 128), (128, 96), (20, 37), (1, 1)])
def test_the_transform_is_that_of_the_evaluation(size: tuple[int, int], encoder: Encoder, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    same_as_the_evaluation(encoder, tmp_path / "noise.png")


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_the_transform_takes_pictures_of_any_mode(mode: str, encoder: Encoder, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(noise).convert(mode)
    picture.save(tmp_path / "noise.tif")
    assert Image.open(tmp_path / "noise.tif").mode == mode
    same_as_the_evaluation(encoder, tmp_path / "noise.tif")


def same_as_the_evaluation(encoder: Encoder, file: Path) -> None:
    crop = embeddings._Crops(ImageList(file.parent, (file.name,), None, ()), 32)[0]
    assert crop is not None
    with Image.open(file) as picture:
        pixels = encoder.transform(picture)
    torch.testing.assert_close(pixels, normalise(crop[0][None], torch.float32)[0], atol=1e-5, rtol=0)


def test_the_transform_can_be_sent_to_loader_processes(encoder: Encoder) -> None:
    picture = Image.new("L", (50, 40), 99)
    again = pickle.loads(pickle.dumps(encoder.transform))
    assert torch.equal(again(picture), encoder.transform(picture))


def released(kind: str, file: Path, branch: ReleasedBranch) -> Path:
    """A checkpoint as the authors' code writes it; every number of the encoder is 0, of the other parts 1."""
    with torch.device("meta"):  # names and shapes
        model = torchvision.models.resnet50().state_dict()
    shapes = {name: value for name, value in model.items() if not name.startswith("fc.")}

    def expanded(number: int, prefix: str) -> dict[str, Tensor]:  # a file of one number a tensor
        return {
            prefix + name: torch.tensor(number, dtype=value.dtype).expand(value.shape) for name, value in shapes.items()
        }

    state = {"conv16.weight": branch.conv.weight.detach()}
    state |= {f"bn16.{key}": value for key, value in branch.norm.state_dict().items()}
    if kind == "moco":
        others = ("encoder_q.fc.0.weight", "encoder_k.fc.2.bias", "queue", "fc.bias", "qmax.0.weight", "kmax.0.weight")
        state |= expanded(0, "encoder_q.") | expanded(1, "encoder_k.")
        state |= {name: torch.ones(1) for name in (*others, "conv16_2.weight", "bn16_2.bias")}
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    else:
        state |= expanded(0, "online_encoder.0.") | expanded(1, "target_encoder.0.")
        state |= {name: torch.ones(1) for name in ("online_encoder.1.0.weight", "online_predictor.0.weight")}
        torch.save(state, file)
    return file


@pytest.mark.parametrize("kind", ["moco", "byol"])
def test_released_checkpoints_load_and_say_what_is_left_out(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    branch = ReleasedBranch(2048, RationaleConfig(), ReleasedConfig())
    encoder = fastcr.load(released(kind, tmp_path / "released.pth.tar", branch))
    assert capfd.readouterr() == ("", "")
    assert not any(value.any() for value in encoder.backbone.state_dict().values())  # the query's zeros
    assert isinstance(encoder.branch, ReleasedBranch)
    assert torch.equal(encoder.branch.conv.weight, branch.conv.weight)
    assert encoder.image_size == 224
    kinds = {
        "moco": {"encoder_q", "encoder_k", "queue", "fc", "qmax", "kmax", "conv16_2", "bn16_2"},
        "byol": {"online_encoder", "target_encoder", "online_predictor"},
    }
    assert {key.split(".")[0] for key in encoder.ignored} == kinds[kind]
    head = {"moco": "encoder_q.fc.0.weight", "byol": "online_encoder.1.0.weight"}[kind]
    assert [key for key in encoder.ignored if key.startswith(head.split(".")[0])] == [head]
    everything = len(encoder.state_dict()) + len(encoder.ignored)
    content = torch.load(tmp_path / "released.pth.tar", weights_only=True)
    assert everything == len(content.get("state_dict", content))


@pytest.mark.parametrize("training", [False, True])
def test_a_released_branch_gives_the_numbers_of_the_authors_code(training: bool, tmp_path: Path) -> None:
    file = Path(os.environ.get("FASTCR_TEST_DATA", "")) / "golden" / "official_branch.npz"
    if not file.is_file():
        pytest.skip("FASTCR_TEST_DATA names no folder with golden/official_branch.npz")
    with np.load(file) as arrays:
        golden = {name: torch.from_numpy(arrays[name]).float() for name in arrays}
    branch = ReleasedBranch(2048, RationaleConfig(detectors=32), ReleasedConfig())
    state = {f"norm.{name}": golden[f"bn_{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    branch.load_state_dict(state | {"conv.weight": golden["branch_weight"][:, :, None, None]})
    encoder = fastcr.load(released("moco", tmp_path / "released.pth", branch))
    encoder.backbone = nn.Identity()  # the arrays begin at the features
    embeddings, attention = encoder.train(training)(golden["features"])
    mask = golden["train_mask"]
    if not training:
        peak = golden["eval_branch"].amax(1)
        mask = (peak - peak.min()) / (peak.max() - peak.min())
    torch.testing.assert_close(embeddings, golden["train_embedding" if training else "eval_embedding"], **WITHIN)
    torch.testing.assert_close(attention, mask, **WITHIN)
    mean = F.normalize(golden["features"].mean((2, 3)), dim=1)
    torch.testing.assert_close(encoder.mean_embedding(golden["features"]), mean)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of the file was run",)


def pickled_code(file: Path, weights: Path) -> None:
    torch.save({"state_dict": {"conv16.weight": torch.ones(1)}, "extra": Code()}, file)


def truncated(file: Path, weights: Path) -> None:
    file.write_bytes(weights.read_bytes()[:5000])


def foreign(file: Path, weights: Path) -> None:
    torch.save({"model": {"stem.weight": torch.ones(1), "head.bias": torch.ones(1)}}, file)


def part_of_a_released_one(file: Path, weights: Path) -> None:
    state = {"encoder_q.conv1.weight": torch.ones(64, 3, 7, 7), "conv16.weight": torch.ones(32, 2048, 1, 1)}
    torch.save({**state, "queue": torch.ones(1)}, file)


def other_facts(file: Path, weights: Path) -> None:
    save_weights(file, {"backbone.conv1.weight": torch.ones(1)}, {"backbone": "resnet18", "detectors": 3})


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (pickled_code, "w.pth", "is refused: it holds pickled code"),
        (truncated, "w.safetensors", "is not a whole safetensors file"),
        (truncated, "w.pth", r"is (broken|refused)"),
        (foreign, "w.pth", r"no fastcr metadata\); its keys begin head\.bias, stem\.weight"),
        (part_of_a_released_one, "w.pth", "does not hold what a released checkpoint does: .*bn1.weight"),
        (other_facts, "w.safetensors", "does not hold what its metadata says"),
        (lambda file, weights: None, "w.pth", "no run folder or weights file"),
        (lambda file, weights: file.mkdir(), "folder", r"no weights\.safetensors in it"),
    ],
)
def test_what_is_no_encoder_is_refused_in_one_line(
    make: Any, name: str, message: str, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / name, weights)
    with pytest.raises(UsageError, match=message) as refused:
        fastcr.load(tmp_path / name)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_a_device_that_is_not_there_is_named(weights: Path) -> None:
    with pytest.raises(UsageError, match="cuda:99"):
        fastcr.load(weights, device="cuda:99")
