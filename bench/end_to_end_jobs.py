"""The work of other libraries that `end_to_end.py` times: `python bench/end_to_end_jobs.py WAY PHASE SETTINGS`.

SETTINGS is JSON: see `Settings`. Each way prints "first step" once its optimiser has stepped, and at the end a line of
JSON: how many steps it made, how many images it embedded, or its scores. All train a network with random weights, in
bf16, with the batch, the views' size and the loader processes they are told; their own defaults decide the rest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader


class Settings(NamedTuple):
    """What all ways are told."""

    images: str  # a folder of JPEGs
    out: str  # the way's own folder
    backbone: str  # timm's name
    batch: int
    epochs: int
    size: int  # pixels
    workers: int
    embeddings: str  # of the retrieval: .npz of `embeddings` [N,C] and `labels` [N]


def say(**facts: Any) -> None:
    """Print a line of JSON for `end_to_end.py`."""
    print(json.dumps(facts), flush=True)


def count_steps() -> list[int]:
    """A list of one number, the optimisers' steps from now on; prints "first step" after the first."""
    steps = [0]

    def stepped(*_: Any) -> None:
        steps[0] += 1
        if steps[0] == 1:
            print("first step", flush=True)

    register_optimizer_step_post_hook(stepped)
    return steps


def encoder(settings: Settings) -> nn.Module:
    """The network without its classifier, images to mean-pooled features."""
    import timm

    made: nn.Module = timm.create_model(settings.backbone, pretrained=False, num_classes=0)
    return made


# --- lightly ---


def lightly_train_loop(settings: Settings, *, tuned: bool = False) -> None:
    """MoCo v2 as in lightly's example for one device, in bf16; `tuned`: what a user would add."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.moco_transform import MoCoV2Transform

    steps = count_steps()
    dataset = LightlyDataset(settings.images, transform=MoCoV2Transform(input_size=settings.size))
    keep: dict[str, Any] = {"persistent_workers": True} if tuned and settings.workers else {}
    loader = DataLoader(
        dataset, batch_size=settings.batch, shuffle=True, drop_last=True, num_workers=settings.workers, **keep
    )
    backbone = encoder(settings)
    query = nn.Sequential(backbone, MoCoProjectionHead(backbone.num_features, backbone.num_features, 128))
    if tuned:
        query = query.to(memory_format=torch.channels_last)
    key = deepcopy(query)
    deactivate_requires_grad(key)
    queue = min(4096, len(dataset) // settings.batch * settings.batch)
    criterion = NTXentLoss(memory_bank_size=(queue, 128))
    optimizer = torch.optim.SGD(query.parameters(), lr=0.06, **({"fused": True} if tuned else {}))
    for _ in range(settings.epochs):
        for (first, second), *_ in loader:
            if tuned:
                first, second = (each.to(memory_format=torch.channels_last) for each in (first, second))
            update_momentum(query, key, m=0.99)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with torch.no_grad():
                    keys = key(second)
                loss = criterion(query(first), keys)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save(backbone.state_dict(), Path(settings.out) / "backbone.pt")
    say(steps=steps[0])


def lightly_embed(settings: Settings, *, tuned: bool = False) -> None:
    """The trained backbone over the folder, as lightly's tutorials embed: a DataLoader and a loop."""
    from lightly.data import LightlyDataset
    from torchvision.transforms import v2

    crop = [v2.Resize(round(settings.size * 8 / 7), antialias=True), v2.CenterCrop(settings.size)]
    dataset = LightlyDataset(settings.images, transform=v2.Compose([*crop, *to_floats()]))
    backbone = encoder(settings)
    backbone.load_state_dict(torch.load(Path(settings.out) / "backbone.pt", weights_only=True))
    write(settings, backbone, DataLoader(dataset, batch_size=settings.batch, num_workers=settings.workers), tuned=tuned)


def to_floats() -> list[Any]:
    """PIL's image to a normalised tensor."""
    from torchvision.transforms import v2

    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), normalise]


@torch.inference_mode()
def write(settings: Settings, model: nn.Module, loader: Any, *, tuned: bool) -> None:
    """Embeddings of unit length, in bf16 computed, as an .npy file."""
    model.eval()
    if tuned:
        model = model.to(memory_format=torch.channels_last)
    found: list[Tensor] = []
    for images, *_ in loader:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images = images.to(memory_format=torch.channels_last) if tuned else images
            found.append(nn.functional.normalize(model(images).float()))
    embeddings = torch.cat(found).numpy()
    np.save(Path(settings.out) / "embeddings.npy", embeddings)
    say(embedded=len(embeddings))


# --- LightlyTrain ---


def lightlytrain_train(settings: Settings) -> None:
    """LightlyTrain's SimCLR: of its methods without a second, larger network the one nearest to MoCo."""
    import lightly_train

    steps = count_steps()
    lightly_train.pretrain(
        out=Path(settings.out) / "lightlytrain",
        data=settings.images,
        model=f"timm/{settings.backbone}",
        model_args={"pretrained": False},
        method="simclr",
        epochs=settings.epochs,
        batch_size=settings.batch,
        num_workers=settings.workers,
        accelerator="cpu",
        precision="bf16-mixed",
        transform_args={"image_size": (settings.size, settings.size)},
    )
    say(steps=steps[0])


def lightlytrain_embed(settings: Settings) -> None:
    """LightlyTrain's own command for embeddings."""
    import lightly_train

    lightly_train.embed(
        out=Path(settings.out) / "embeddings.pt",
        data=settings.images,
        checkpoint=Path(settings.out) / "lightlytrain" / "checkpoints" / "last.ckpt",
        format="torch",
        image_size=(settings.size, settings.size),
        batch_size=settings.batch,
        num_workers=settings.workers,
        accelerator="cpu",
        precision="bf16-mixed",
        overwrite=True,
    )
    found = torch.load(Path(settings.out) / "embeddings.pt", weights_only=True)
    say(embedded=len(found["embeddings"]))


# --- timm ---


def timm_embed(settings: Settings) -> None:
    """timm's own dataset, transform and loader around the channels-last model, as its script for inference has them."""
    from timm.data import ImageDataset, create_loader

    loader = create_loader(
        ImageDataset(settings.images), (3, settings.size, settings.size), settings.batch, interpolation="bilinear",
        crop_pct=7 / 8, num_workers=settings.workers, use_prefetcher=False, device=torch.device("cpu"),
    )  # fmt: skip
    write(settings, encoder(settings), loader, tuned=True)


# --- retrieval ---


def given(settings: Settings) -> tuple[Tensor, Tensor]:
    """The embeddings and labels to score."""
    with np.load(settings.embeddings) as file:
        return torch.from_numpy(file["embeddings"]), torch.from_numpy(file["labels"])


def scored(settings: Settings, score: Callable[[Tensor, Tensor], tuple[float, float]]) -> None:
    """Time `score`, which gives rank-1 and mAP in percent."""
    embeddings, labels = given(settings)
    began = time.perf_counter()
    rank1, mean_ap = score(embeddings, labels)
    say(scoring=time.perf_counter() - began, rank1=rank1, mAP=mean_ap)


def fastcr_retrieval(embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """`fastcr.retrieval`."""
    from fastcr import retrieval

    found = retrieval(embeddings, labels)
    return found.rank1, found.mAP


def pml_retrieval(embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """pytorch-metric-learning's AccuracyCalculator over the whole ranking."""
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision"), k=len(labels) - 1, device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity()),
    )  # fmt: skip
    found = calculator.get_accuracy(embeddings, labels)
    return 100 * found["precision_at_1"], 100 * found["mean_average_precision"]


def oml_retrieval(embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """Open Metric Learning's functions over the whole ranking."""
    from oml.functional.knn import batched_knn
    from oml.functional.metrics import calc_retrieval_metrics

    every, most = torch.arange(len(labels)), len(labels) - 1
    _, found, relevant = batched_knn(
        embeddings=embeddings, ids_query=every, ids_gallery=every, labels_gt=labels, top_n=most
    )
    scores = calc_retrieval_metrics(
        found, relevant, cmc_top_k=(1,), precision_top_k=(), map_top_k=(most,), verbose=False
    )
    return 100 * float(scores["cmc"][1]), 100 * float(scores["map"][most])


JOBS: dict[tuple[str, str], Callable[[Settings], None]] = {
    ("lightly", "train"): lightly_train_loop,
    ("lightly", "embed"): lightly_embed,
    ("lightly-tuned", "train"): lambda settings: lightly_train_loop(settings, tuned=True),
    ("lightly-tuned", "embed"): lambda settings: lightly_embed(settings, tuned=True),
    ("lightlytrain", "train"): lightlytrain_train,
    ("lightlytrain", "embed"): lightlytrain_embed,
    ("timm-tuned", "embed"): timm_embed,
    ("fastcr", "retrieval"): lambda settings: scored(settings, fastcr_retrieval),
    ("pytorch-metric-learning", "retrieval"): lambda settings: scored(settings, pml_retrieval),
    ("open-metric-learning", "retrieval"): lambda settings: scored(settings, oml_retrieval),
}

if __name__ == "__main__":
    JOBS[sys.argv[1], sys.argv[2]](Settings(**json.loads(sys.argv[3])))
