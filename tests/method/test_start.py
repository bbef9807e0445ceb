"""What the first pass over the images sets, against the encoder it was made with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RationaleConfig, ViewsConfig
from fastcr.data.crop_loader import load_crops
from fastcr.data.images import ImageList
from fastcr.data.views import normalise
from fastcr.encoders.backbone import mean_pool
from fastcr.errors import UsageError
from fastcr.method import start
from fastcr.method.build import Training, build, fit_sizes
from fastcr.runs.context import Context
from tests.shared import write_noise

CONFIG = Config(
    data=DataConfig(image_size=32),
    model=ModelConfig(backbone="resnet18", last_stage="layer2", weights="none", batchnorm="frozen"),
    optim=OptimConfig(epochs=1, batch_size=8),
    moco=MocoConfig(objective="relational", queue_size=20, head="linear", embedding_dim=8, pooling="rationale"),
    rationale=RationaleConfig(detectors=3, init="ddt"),
)
BROKEN = 10


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    return write_noise(tmp_path_factory.mktemp("images"), broken=BROKEN)


def features_of(training: Training, images: ImageList, size: int = 32) -> Tensor:
    ((pixels, _, readable),) = load_crops([images], [list(range(len(images)))], size, Context())
    assert len(readable) == len(images) - 1
    with torch.no_grad():
        return training.encoder.eval().features(normalise(pixels, torch.float32))


@pytest.mark.parametrize(
    ("most", "scale"),
    [(2048, 1.0), (7, 1.0), (7, 1.5)],
    ids=["all images at once", "the queue's other images afterwards", "larger keys"],
)
def test_head_and_queue_are_made_of_the_images_features(
    images: ImageList, most: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "AXIS_IMAGES", most)
    config = replace(CONFIG, views=ViewsConfig(key_scale=scale))
    training = build(config, Context())
    moco = training.moco
    sample = start.begin(training, images, config, Context())
    features = features_of(training, images, round(32 * scale))
    owners = [index for index in range(24) if index != BROKEN]

    if scale > 1:  # it is not what the encoder will be used for
        assert sample is None
    else:
        torch.testing.assert_close(
            sample, F.normalize(mean_pool(features), dim=1)[: len(sample)] if most > 24 else sample
        )
    pooled = F.normalize(training.pool(features), dim=1)
    seen = moco.queue_images.tolist()
    assert len(set(seen)) == 20
    assert BROKEN not in seen
    of_queue = pooled[[owners.index(index) for index in seen]]
    if most > 24:
        axes = np.linalg.svd(pooled.double().numpy(), full_matrices=False)[2][:8]
        products = np.abs((moco.head[0].weight.detach().double().numpy() * axes).sum(1))
        np.testing.assert_allclose(products, 1, atol=1e-4)  # the same directions, either way round
    torch.testing.assert_close(moco.queue, F.normalize(of_queue @ moco.head[0].weight.T, dim=1), atol=1e-4, rtol=1e-4)
    assert torch.equal(moco.key_head[0].weight, moco.head[0].weight)


def test_a_size_of_the_keys_that_the_encoder_cannot_take_is_refused() -> None:
    pytest.importorskip("timm")
    model = ModelConfig(backbone="timm:test_vit", weights="none", batchnorm="frozen")
    config = replace(CONFIG, model=model, views=ViewsConfig(key_scale=1.25))
    with pytest.raises(
        UsageError, match=r"^timm:test_vit cannot take --views\.key_scale 1\.25, 40 px \(1 is always right\)"
    ):
        build(config, Context())


@pytest.mark.parametrize(
    ("backbone", "size", "options", "scale"),
    [
        ("resnet18", 112, {}, 2.0),
        ("resnet18", 64, {}, 2.0),  # no more than was measured
        ("resnet18", 224, {}, 1.0),
        ("resnet18", 320, {}, 1.0),
        ("resnet18", 112, {"last_stage": "layer3"}, 1.0),
        ("resnet18", 112, {"weights": "none"}, 1.0),
        ("timm:test_vit", 128, {}, 1.25),
    ],
)
def test_keys_get_the_size_that_the_weights_of_a_whole_encoder_were_made_for(
    images: ImageList, backbone: str, size: int, options: dict[str, Any], scale: float
) -> None:
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    model = ModelConfig(backbone=backbone, **{"weights": "imagenet"} | options)
    views = ViewsConfig(key_scale="auto")
    config = replace(CONFIG, data=DataConfig(image_size=size), model=model, views=views)
    assert config.key_size == size  # not settled yet
    settled = fit_sizes(config, images, Context())
    assert settled.views.key_scale == scale
    assert settled.key_size == round(scale * size)
    assert fit_sizes(replace(config, views=ViewsConfig(key_scale=1.3)), images, Context()).views.key_scale == 1.3


def test_a_queue_larger_than_the_images_holds_them_again(images: ImageList) -> None:
    config = replace(CONFIG, moco=replace(CONFIG.moco, queue_size=30))
    training = build(config, Context())
    start.begin(training, images, config, Context())
    assert training.moco.queue_images[23:].tolist() == training.moco.queue_images[:7].tolist()
    assert torch.equal(training.moco.queue[23:], training.moco.queue[:7])


def test_a_head_of_more_dimensions_than_the_features_stays_as_it_is(images: ImageList) -> None:
    config = replace(CONFIG, moco=replace(CONFIG.moco, embedding_dim=200))
    training = build(config, Context())
    before = training.moco.head[0].weight.clone()
    start.begin(training, images, config, Context())
    assert torch.equal(training.moco.head[0].weight, before)


def test_random_weights_that_ask_for_nothing_look_at_nothing() -> None:
    nothing = ImageList(Path("nowhere"), (), None, ())
    config = replace(CONFIG, moco=MocoConfig(), rationale=RationaleConfig(detectors=3))
    assert start.begin(build(config, Context()), nothing, config, Context()) is None


def test_images_that_cannot_be_read_are_an_error(images: ImageList) -> None:
    broken = ImageList(images.root, (images.files[BROKEN],), None, ())
    with pytest.raises(UsageError, match="none of the 1 images"):
        start.begin(build(CONFIG, Context()), broken, CONFIG, Context())
