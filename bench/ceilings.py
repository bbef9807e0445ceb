"""`python bench/ceilings.py RUN --data.boxes FILE --out FILE`: what could any map buy on a run's initial features?

Pools the test images' features of RUN/init.safetensors with maps that the method cannot have, for they know the
objects' boxes, or that need no learning at all: what a branch can reach at best, and what it must beat. Detectors of
the branch's own form are also fitted to the boxes of the training images (Adam, 300 steps of 256 images, lr 0.02), the
best that a maximum of so many linear detectors can do. FILE has the form of a study's evidence.json, so
`python bench/evidence_table.py FILE` shows it; RUN is the frozen row of a study, or any run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from fastcr.config import tyro
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.views import normalise
from fastcr.errors import UsageError
from fastcr.evaluate import EvaluateData, EvaluateRun
from fastcr.measures.embeddings import BATCH_SIZE, load_crops
from fastcr.measures.localisation import Objects, covered, localisation, objects_in_crop, read_objects
from fastcr.measures.retrieval import retrieval
from fastcr.method.encoder import load_encoder
from fastcr.method.rationale import RationaleHead
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import load_config, one_line_errors, parse
from fastcr.runs.machine import pick_device, pick_workers

STEPS, IMAGES, RATE = 300, 256, 0.02


class Seen(NamedTuple):
    """Images whose object is known, as the encoder sees them."""

    features: Tensor  # [N,C,S]
    cells: Tensor  # [N,S] share of each cell in the box
    objects: Objects  # in fractions of the crop
    labels: Tensor  # [N]


@torch.inference_mode()
def see(backbone: nn.Module, images: ImageList, objects: Objects, size: int, workers: int, console: Console) -> Seen:
    """Features and boxes of the images that can be read and have a box."""
    device, numbers = next(backbone.parameters()).device, range(len(images))
    batches = [list(numbers[start : start + BATCH_SIZE]) for start in numbers[::BATCH_SIZE]]
    loader = load_crops([images], batches, image_size=size, workers=workers, pin=False)
    shown = track(loader, images.root.name, len(batches), console=console, transient=True)
    found, sizes, kept = list[Tensor](), list[Tensor](), list[int]()
    for batch, (pixels, sizes_here, readable) in zip(batches, shown, strict=True):
        if readable:
            found.append(backbone(normalise(pixels.to(device), torch.float32)).flatten(2).cpu())
            sizes.append(sizes_here)
            kept += [batch[i] for i in readable]
    in_crop = objects_in_crop(Objects(objects.boxes[kept], None, objects.in_pixels), torch.cat(sizes), size)
    known = ~in_crop.boxes.isnan().any(1)
    features, boxes = torch.cat(found)[known], in_crop.boxes[known]
    if images.labels is None:
        raise UsageError(f"{images.root} has no labels (class folders)")
    labels = torch.tensor(images.labels)[kept][known]
    return Seen(features, covered(boxes, round(features.shape[2] ** 0.5)).float(), Objects(boxes, None, False), labels)


def maps(train: Seen, test: Seen) -> Iterator[tuple[str, str, Tensor]]:
    """Name, meaning and maps `[N,S]` of the test images, not yet summing to 1."""
    side = round(test.features.shape[2] ** 0.5)
    norm, box = test.features.norm(dim=1), test.cells + 1e-6
    y, x = torch.meshgrid(*[torch.arange(side) - (side - 1) / 2] * 2, indexing="ij")
    yield "mean", "the same everywhere: mean pooling", torch.ones_like(box)
    for sigma in (1.0, 1.5, 2.0):
        gaussian = torch.exp(-(x.square() + y.square()).flatten() / (2 * sigma**2))
        yield f"gaussian{sigma}", f"a centred Gaussian, sigma {sigma} cells", gaussian.expand_as(box)
    for power in (1, 2, 3):
        yield f"norm{power}", f"norm of the features, to the power of {power}", norm**power
    yield "box", "the box itself", box
    yield "box-norm2", "the box times the squared norm of the features", box * norm**2
    for count in (1, 4, 32):
        for temperature in (0.1, 0.05):
            meaning = f"{count} detectors, temperature {temperature}, fitted to the boxes of the training images"
            yield f"fitted-k{count}-tau{temperature}", meaning, fitted(train, test, count, temperature)


def fitted(train: Seen, test: Seen, detectors: int, temperature: float) -> Tensor:
    """Attention `[N,S]` to the test images of detectors fitted to the training images' boxes by KL."""
    torch.manual_seed(0)
    side = round(train.features.shape[2] ** 0.5)
    head = RationaleHead(train.features.shape[1], detectors=detectors, temperature=temperature, impl="torch")
    optimizer = torch.optim.Adam(head.parameters(), lr=RATE)
    target = train.cells / train.cells.sum(1, keepdim=True).clamp_min(1e-12)
    for _ in range(STEPS):
        some = torch.randint(len(target), (IMAGES,))
        attention = head.pool(train.features[some].unflatten(2, (side, side))).attention
        loss = F.kl_div(attention.clamp_min(1e-12).log(), target[some], reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return head.pool(test.features.unflatten(2, (side, side))).attention


def measured(map_: Tensor, test: Seen) -> dict[str, Any]:
    """What evidence.json has of a run: retrieval with this map's pooling, and how much of it is in the box."""
    attention = map_ / map_.sum(1, keepdim=True)
    pooled = F.normalize(torch.einsum("ncs,ns->nc", test.features, attention), dim=1)
    scores = retrieval(pooled, test.labels)._asdict()
    where = {name: score._asdict() for name, score in localisation(attention, test.objects).items()}
    return {
        "retrieval": {"rationale": {key: round(scores[key], 4) for key in ("rank1", "rank5", "mAP")}},
        "localisation": {name: {key: round(each[key], 4) for key in ("inside", "pointing")}
                         for name, each in where.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class CeilingsConfig:
    """Settings of the measurement."""

    source: tyro.conf.Positional[Path]
    """A run folder."""
    out: Path
    """The file to write."""
    data: EvaluateData = field(default_factory=EvaluateData)
    run: EvaluateRun = field(default_factory=EvaluateRun)


def main(args: Sequence[str]) -> None:
    """Write what the maps buy into the file that `args` name."""
    with one_line_errors("ceilings"):
        config = parse(CeilingsConfig, args, prog="python bench/ceilings.py", description=__doc__)
        trained = load_config(config.source / "config.yaml")
        root = config.data.root or trained.data.root
        if root is None:
            raise UsageError("--data.root: which images?")
        splits, console = read_splits(root), Console(markup=False)
        if splits.test is None:
            raise UsageError(f"{root} has no test split")
        device, workers = pick_device(config.run.device), pick_workers(config.data.workers)
        backbone, _, _ = load_encoder(config.source / "init.safetensors", device)
        seen = []
        for images in (splits.train, splits.test):
            objects = read_objects(config.data.boxes, images)
            if objects is None:
                raise UsageError(f"--data.boxes: {images.root} comes with no boxes of its own")
            seen.append(see(backbone, images, objects, trained.data.image_size, workers, console))
        train, test = seen
        runs = {
            name: {"row": name, "seed": 0, "meaning": meaning, "flags": [], "status": "finished",
                   "facts": {"torch": torch.__version__}, "images": len(test.labels), **measured(map_, test)}
            for name, meaning, map_ in maps(train, test)
        }  # fmt: skip
        model = asdict(trained.model)
        common = [f"{key}={Path(str(model[key])).name}" for key in ("backbone", "last_stage", "weights")]
        boxes = config.data.boxes and config.data.boxes.name
        study = {"data": f"{root.name}, maps on the initial features", "boxes": boxes,
                 "common": [*common, f"image_size={trained.data.image_size}"], "runs": runs}  # fmt: skip
        write_whole(config.out, lambda file: file.write_text(json.dumps(study, indent=1) + "\n"))
        print(f"results: {config.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
