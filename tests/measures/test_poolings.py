"""Poolings without training, against plain loops in fp64 and independent libraries."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fastcr.data import crop_loader
from fastcr.data.crops import centre_crop
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.views import normalise
from fastcr.encoders.backbone import build_backbone
from fastcr.encoders.encoder import Encoder, load
from fastcr.errors import UsageError
from fastcr.measures.embeddings import embed
from fastcr.measures.poolings import (
    SIGMA,
    gaussian,
    gem,
    key_of,
    norm,
    pooled,
    weighted,
    without_training,
)
from fastcr.method import ddt
from fastcr.method.ddt import Moments
from fastcr.runs.context import Context
from fastcr.runs.distributed import Processes
from tests.shared import write_weights

CONTEXT = Context(console=Console(file=io.StringIO()))


@dataclass(frozen=True)
class Share(Processes):
    """One of several processes, without the others: notes what it would add up."""

    added: list[Tensor] = field(default_factory=list)

    def most(self, *numbers: int) -> list[int]:
        return list(numbers)

    def total(self, tensor: Tensor) -> Tensor:
        self.added.append(tensor.clone())
        return tensor


@pytest.fixture
def features() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 6, 4, 5)


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    encoder = load(write_weights(tmp_path / "weights.safetensors", seed=0))
    encoder.image_size = 80  # maps of 5 by 5: some positions are not at the border
    return encoder


@pytest.fixture
def images(birds: Path) -> ImageList:
    return read_splits(birds).train


def features_of(encoder: Encoder, images: ImageList) -> Tensor:
    """Features `[N,C,h,w]`, an image at a time."""
    crops = [centre_crop(images.rgb(i), encoder.image_size)[None] for i in range(len(images))]
    with torch.inference_mode():
        return torch.cat([encoder.backbone(normalise(crop, torch.float32)) for crop in crops])


def by_loop(features: Tensor, weight: object) -> Tensor:
    """Weighted mean of the positions; `weight(image, y, x)` gives one position's."""
    rows = []
    for image in features.double():
        _, high, wide = image.shape
        weights = {(y, x): weight(image, y, x) for y in range(high) for x in range(wide)}  # type: ignore[operator]
        total = sum(weights.values())
        rows.append(sum(value / total * image[:, y, x] for (y, x), value in weights.items()))
    return torch.stack(rows)  # type: ignore[arg-type]


def test_poolings_with_one_weight_a_position_are_those_of_a_loop(features: Tensor) -> None:
    def centred(image: Tensor, y: int, x: int) -> float:
        return math.exp(-(((y + 0.5) / 4 - 0.5) ** 2 + ((x + 0.5) / 5 - 0.5) ** 2) / (2 * SIGMA**2))

    def size(image: Tensor, y: int, x: int) -> float:
        return math.sqrt(float(image[:, y, x].square().sum()))

    for pool, weight in ((gaussian, centred), (norm, size)):
        torch.testing.assert_close(pool(features).double(), by_loop(features, weight), rtol=1e-5, atol=1e-6)


def test_gem_is_the_cube_root_of_the_mean_cube(features: Tensor) -> None:
    positive = features.abs().double()
    expected = (sum(positive[:, :, y, x] ** 3 for y in range(4) for x in range(5)) / 20) ** (1 / 3)
    torch.testing.assert_close(gem(positive).double(), expected, rtol=1e-5, atol=1e-6)
    assert gem(-positive).max() < 1e-5


def test_ddt_is_the_first_component_of_an_independent_pca() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    torch.manual_seed(0)
    features = torch.randn(12, 8, 5, 5)
    features[:, :, 1:4, 1:4] += 3 * torch.randn(8)[:, None, None]  # an object inside
    moments = Moments(8)
    for part in features.split(5):
        moments.add(part)
    axis = moments.axis()
    rows = torch.nn.functional.normalize(features.double(), dim=1).permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    pca = decomposition.PCA(n_components=1).fit(rows)
    scores = torch.from_numpy(pca.transform(rows)).view(12, 5, 5)
    inside, border = scores[:, 1:4, 1:4].mean(), (scores.sum() - scores[:, 1:4, 1:4].sum()) / (12 * 16)
    scores = scores if inside > border else -scores
    torch.testing.assert_close(axis.scores(features).double(), scores, rtol=1e-4, atol=1e-5)
    attention = scores.clamp(min=0) / scores.clamp(min=0).sum((1, 2), keepdim=True)
    torch.testing.assert_close(axis.attention(features).double(), attention, rtol=1e-4, atol=1e-5)
    pooled = without_training(axis)["ddt"](features)
    torch.testing.assert_close(pooled, weighted(features, attention.float()), rtol=1e-4, atol=1e-5)
    nothing = axis._replace(direction=torch.zeros(8))
    torch.testing.assert_close(nothing.attention(features), torch.full((12, 5, 5), 1 / 25))


def test_one_pass_gives_every_pooling(encoder: Encoder, images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(encoder, images)
    moments = Moments(features.shape[1])
    moments.add(features)
    monkeypatch.setattr(crop_loader, "BATCH_SIZE", 5)
    axis = ddt.ddt_axis(encoder, images, CONTEXT)
    torch.testing.assert_close(axis, moments.axis(), atol=1e-4, rtol=0)
    poolings = without_training(axis)
    found = embed(encoder, images, CONTEXT, title="", poolings=poolings)
    assert found.others.keys() == poolings.keys() == {"gem", "norm", "gaussian", "ddt"}
    for name, pool in poolings.items():
        assert found.others[name].dtype == torch.float32
        torch.testing.assert_close(found.others[name], F.normalize(pool(features), dim=1), atol=1e-4, rtol=0)
    alone = encoder.pooled(features)
    torch.testing.assert_close(found.mean, alone.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.rationale, alone.rationale, atol=1e-5, rtol=0)
    plain = embed(encoder, images, CONTEXT, title="")
    assert not plain.others
    assert torch.equal(plain.mean, found.mean)


def test_a_class_token_is_measured_beside_the_poolings(images: ImageList) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = Encoder(build_backbone("timm:test_vit")[0], None, {"image_size": 32})
    found = embed(encoder, images, CONTEXT, title="", poolings={"gem": gem})
    assert [*found.others] == ["gem", "cls"]
    crops = torch.stack([centre_crop(images.rgb(i), 32) for i in range(len(images))])
    with torch.no_grad(), encoder.evaluating():
        token = encoder.with_class_token(normalise(crops, torch.float32))[1]
    assert token is not None
    torch.testing.assert_close(found.others["cls"], F.normalize(token, dim=1), atol=1e-4, rtol=0)
    assert not embed(encoder, images, CONTEXT, title="").others


def test_axis_of_a_large_set_is_of_images_taken_evenly(
    encoder: Encoder, images: ImageList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ddt, "AXIS_IMAGES", 16)
    features = features_of(encoder, images)[::4]
    moments = Moments(features.shape[1])
    moments.add(features)
    torch.testing.assert_close(ddt.ddt_axis(encoder, images, CONTEXT), moments.axis(), atol=1e-4, rtol=0)


def test_processes_add_up_to_the_axis_of_one(
    encoder: Encoder, images: ImageList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crop_loader, "BATCH_SIZE", 12)  # 64 images: three batches each
    shares, alone = [Share(rank, 2) for rank in (0, 1)], Share()
    for share in (*shares, alone):
        ddt.ddt_axis(encoder, images, replace(CONTEXT, processes=share))
    for first, second, whole in zip(*(share.added for share in (*shares, alone)), strict=True):
        assert first.any()
        assert second.any()
        torch.testing.assert_close(first + second, whole)


def test_the_pooling_that_is_asked_for_is_used(encoder: Encoder, features: Tensor) -> None:
    plain = Encoder(encoder.backbone, None, {"image_size": 32})
    assert (key_of(None, encoder), key_of(None, plain)) == ("rationale", "mean")
    assert (key_of("feature-strength", plain), key_of("attention", encoder)) == ("norm", "rationale")
    with pytest.raises(UsageError, match="--pooling attention: this encoder has no branch"):
        key_of("attention", plain)
    features = torch.randn(5, 256, 4, 4)
    torch.testing.assert_close(pooled(features, encoder, "rationale"), encoder.pooled(features).rationale)
    torch.testing.assert_close(pooled(features, encoder, "norm"), F.normalize(norm(features), dim=1))
    torch.testing.assert_close(pooled(features, encoder, "mean"), F.normalize(features.mean((2, 3)), dim=1))
