"""The shapes that docs/walkthrough.md names, from the code it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastcr import preset
from fastcr.data.crops import centre_crop
from fastcr.data.synthetic import CLASSES, draw_bird
from fastcr.data.torch_views import cut_image
from fastcr.data.views import Batch, ViewParameters, draw_parameters, normalise, step_indices
from fastcr.encoders.backbone import build_backbone, mean_pool
from fastcr.encoders.encoder import Encoder, describe
from fastcr.encoders.rationale import RationaleHead, common_cam_weights, mismatch_gradient
from fastcr.method.moco import MoCo
from fastcr.method.objectives import build_objective
from fastcr.method.step import contrast_losses, train_step

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"
pytestmark = pytest.mark.usefixtures("one_thread")


class Stub(nn.Module):
    """In place of a ResNet-50: views to random features of the shape that the real one gives."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.weight = shape, nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return torch.rand(len(images), *self.shape[1:]) * self.weight


def shapes() -> Iterator[tuple[str, Any]]:
    """Each name of the page, in its order, with what it stands for."""
    config = preset("cub200")
    size, batch_size = config.data.image_size, config.optim.batch_size
    picture = draw_bird(CLASSES[0], np.random.default_rng(0))

    epoch, indices = step_indices(5994, batch_size, seed=0, step=0)
    parameters = draw_parameters(0, epoch, indices, np.tile([picture.height, picture.width], (batch_size, 1)))
    view = cut_image(picture, ViewParameters(*(values[:1] for values in parameters)), size)[0]
    batch = Batch(*(normalise(view.expand(batch_size, -1, -1, -1), torch.float32) for _ in range(2)))
    yield from {
        "indices": indices,
        "parameters.crop": parameters.crop,
        "parameters.factors": parameters.factors,
    }.items()
    yield from {"view": view, "batch.first": batch.first, "batch.second": batch.second}.items()

    with torch.device("meta"):  # shapes without arithmetic
        resnet, channels = build_backbone(config.model.backbone, config.model.last_stage)
        features = resnet(torch.empty(batch.first.shape))
    moco, objective = MoCo(Stub(features.shape), channels, config.moco), build_objective(config.moco)
    branch, autocast = RationaleHead(channels, config.rationale), torch.autocast("cpu", enabled=False)
    yield "features", features
    features = moco.backbone(batch.first)
    pooled = mean_pool(features)
    projected, key = moco.head(pooled), moco.key(batch.second, autocast)
    query = moco.query(pooled)
    yield from {"pooled": pooled, "projected": projected, "query": query, "key": key, "queue": moco.queue}.items()

    compared = objective(query, moco.keys(key))
    gradient = mismatch_gradient(pooled, projected, compared.positive)
    yield from {"contrast": compared.loss, "positive": compared.positive}.items()
    yield "gradient", gradient
    yield "common", common_cam_weights(features, gradient, config.rationale.cam_keeps)
    divergence, attention, target = branch.fit(features, gradient)
    yield from {"branch.weight": branch.weight, "attention": attention, "target": target}.items()
    yield "divergence", divergence

    optimizer = torch.optim.SGD([*moco.parameters(), *branch.parameters()], lr=0.1)
    loss, _ = train_step(
        moco,
        partial(contrast_losses, branch=branch, objective=objective),
        optimizer,
        batch,
        fit_weight=1.0,
        key_momentum=0.99,
        autocast=autocast,
    )
    yield from {"loss": loss, "queue": moco.queue}.items()
    assert int(moco.queue_position) == batch_size

    both = Encoder(moco.backbone, branch, describe(config)).both(batch.first)
    yield "crop", centre_crop(picture, size)
    yield from {"both.mean": both.mean, "both.rationale": both.rationale, "both.attention": both.attention}.items()


def test_every_shape_on_the_page_is_that_of_the_code() -> None:
    named = re.findall(r"^\| `([\w.]+)` \| `(\[.*?\])` \|", PAGE.read_text(), re.MULTILINE)
    assert named == [(name, str(list(each.shape))) for name, each in shapes()]


def test_every_file_and_function_on_the_page_is_there() -> None:
    text, root = PAGE.read_text(), PAGE.parents[1]
    files = set(re.findall(r"`((?:\w+/)?\w+\.py)", text))
    sources = [next((each for each in root.glob(f"**/{file}")), None) for file in files]
    assert len(files) > 10
    assert None not in sources, dict(zip(files, sources, strict=True))
    code = "\n".join(source.read_text() for source in root.glob("fastcr/**/*.py"))
    for file, function in re.findall(r"`((?:\w+/)?\w+\.py):\s+(\w+)`", text):
        source = next(root.glob(f"fastcr/{file}"), None)
        assert source, file
        assert re.search(rf"^\s*(def|class) {function}\b", source.read_text(), re.MULTILINE), (file, function)
    for function in re.findall(r"`(\w+_\w+)`", text):
        assert re.search(rf"\b{function}\b", code), function
