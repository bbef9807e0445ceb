"""`fastcr.load`: what it takes, what comes back, what it refuses."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

import fastcr
from fastcr.config import RationaleConfig
from fastcr.data.crop_loader import _Crops
from fastcr.data.images import ImageList
from fastcr.data.views import normalise
from fastcr.encoders.encoder import Encoder
from fastcr.errors import UsageError
from fastcr.runs.checkpoint import load_weights, save_weights
from tests.shared import write_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder(weights: Path) -> Encoder:
    return fastcr.load(weights)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("given", ["folder", "file", "text"])
def test_a_run_folder_and_its_file_give_the_embeddings_of_the_evaluation(given: str, weights: Path) -> None:
    encoder = fastcr.load({"folder": weights.parent, "file": weights, "text": str(weights.parent)}[given])
    _, facts = load_weights(weights)
    mean, rationale, attention = encoder.both(images(3))
    found = encoder(images(3))
    torch.testing.assert_close(found.embedding, rationale)
    torch.testing.assert_close(found.attention, attention)
    torch.testing.assert_close(encoder.both(images(3)).mean, mean)
    assert not torch.allclose(found.embedding, mean, atol=1e-4)
    assert (encoder.image_size, encoder.facts["detectors"]) == (32, facts["detectors"])
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
    first = normalise(crops[3:4], torch.float32)[0, 0, 0, 0]
    spoil = lambda module, args, out: out / (args[0][:, :1, :1, :1] != first)  # noqa: E731  # 0 / 0 of one image
    hook = encoder.backbone.register_forward_hook(spoil)
    with pytest.raises(UsageError, match=r"the features of 'd\.jpg' are not finite: this encoder gives"):
        encoder.of_crops(crops, names=["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"])
    hook.remove()


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
    assert torch.equal(embeddings, encoder.both(images(2)).mean)


def test_the_weights_file_comes_before_an_exported_one(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    assert fastcr.load(tmp_path).image_size == 32
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"weights\.safetensors is not a whole safetensors file"):
        fastcr.load(tmp_path)


@pytest.mark.parametrize(
    ("size", "mode", "turned"),
    [
        *(((96, 128), "RGB", orientation) for orientation in range(1, 9)),
        *((size, "RGB", 1) for size in ((20, 37), (1, 1))),
        *(((50, 40), mode, 1) for mode in ("P", "CMYK", "I;16")),
    ],
)
def test_the_transform_is_that_of_the_evaluation(
    size: tuple[int, int], mode: str, turned: int, encoder: Encoder, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    deep = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    file = tmp_path / ("phone.png" if turned > 1 else "noise.tif")
    (exif := Image.Exif())[ExifTags.Base.Orientation] = turned
    (deep if mode == "I;16" else Image.fromarray(noise).convert(mode)).save(file, exif=exif)
    crop = _Crops(ImageList(tmp_path, (file.name,), None, ()), 32)[0]
    assert crop is not None
    with Image.open(file) as picture:
        assert picture.mode == mode
        pixels = encoder.transform(picture)
    torch.testing.assert_close(pixels, normalise(crop[0][None], torch.float32)[0], atol=1e-5, rtol=0)


def test_files_and_pictures_are_embedded_without_more_ado(weights: Path, flat: Path, tmp_path: Path) -> None:
    encoder, files = fastcr.load(weights), [*sorted(flat.iterdir())[:7], tmp_path / "phone.jpg"]
    (exif := Image.Exif())[ExifTags.Base.Orientation] = 6
    Image.open(files[0]).save(files[-1], exif=exif)
    with torch.inference_mode():
        expected = torch.cat([encoder(encoder.transform(Image.open(file))[None]).embedding for file in files])
    for given in (files, map(str, files), [Image.open(file) for file in files]):
        torch.testing.assert_close(encoder.embed(given, batch_size=3), expected, atol=1e-5, rtol=0)
    assert encoder.embed([]).shape == (0, 0)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"broken\.jpg' is not a readable image"):
        encoder.embed([*files, tmp_path / "broken.jpg"])


def test_the_transform_can_be_sent_to_loader_processes(encoder: Encoder) -> None:
    picture = Image.new("L", (50, 40), 99)
    again = pickle.loads(pickle.dumps(encoder.transform))
    assert torch.equal(again(picture), encoder.transform(picture))


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


def not_a_number(file: Path, weights: Path) -> None:
    state, facts = load_weights(weights)
    save_weights(file, state | {"branch.bias": torch.full_like(state["branch.bias"], torch.nan)}, facts)


def torchscript(file: Path, weights: Path) -> None:
    """As OpenAI publishes CLIP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (pickled_code, "w.pth", "is refused: it holds pickled code"),
        (torchscript, "w.pt", "is refused: it is a TorchScript program, not tensors"),
        (not_a_number, "w.safetensors", r"not finite \(NaN or infinity\) in branch.bias"),
        (truncated, "w.safetensors", "is not a whole safetensors file"),
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
