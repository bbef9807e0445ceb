"""`python bench/ceilings.py RUN --data.boxes FILE --out FILE`: what is the best retrieval that any map could give?

The test images' features under a run's initial weights (RUN/init.safetensors) are pooled with two kinds of maps: some
know the objects' boxes, which the method does not, and bound what a branch can reach; some need no learning at all, and
are what it must beat. Detectors of the branch's own form are also fitted to the boxes of the training images (Adam, 300
steps of 256 images, learning rate 0.02): the best that a maximum of so many linear detectors can do. RUN is the frozen
row of a study, or any run. `python bench/evidence_table.py FILE` shows FILE, which has the form of an evidence.json.
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from bench.crops import centre_crops
from fastcr.arguments import EvaluateData
from fastcr.config import DeviceConfig, tyro
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.encoders.encoder import Encoder, load
from fastcr.encoders.rationale import RationaleHead
from fastcr.errors import UsageError
from fastcr.measures.localisation import Objects, covered, localisation, objects_in_crop, read_objects
from fastcr.measures.retrieval import retrieval
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called, load_config, one_line_errors, parse
from fastcr.runs.machine import pick_device, pick_workers

STEPS, IMAGES, RATE = 300, 256, 0.02


class Seen(NamedTuple):
    """Images whose object is known, as the encoder sees them."""

    features: Tensor  # [N,C,S]
    cells: Tensor  # [N,S] share of each cell in the box
    objects: Objects  # in fractions of the crop
    labels: Tensor  # [N]


@torch.inference_mode()
def see(encoder: Encoder, images: ImageList, objects: Objects, workers: int, console: Console) -> Seen:
    """Features and boxes of the images that can be read and have a box. `UsageError` without labels."""
    if images.labels is None:
        raise UsageError(f"{images.root} has no labels (class folders)")
    device, found, sizes, kept = next(encoder.parameters()).device, list[Tensor](), list[Tensor](), list[int]()
    for crops, sizes_here, indices in centre_crops(images, encoder.image_size, device, workers, console):
        found.append(encoder.backbone(crops).flatten(2).cpu())
        sizes.append(sizes_here)
        kept += indices
    in_crop = Objects(objects.boxes[kept], objects.in_pixels)
    in_crop = objects_in_crop(in_crop, torch.cat(sizes), encoder.image_size)
    known = ~in_crop.boxes.isnan().any(1)
    features, boxes = torch.cat(found)[known], in_crop.boxes[known]
    labels = torch.tensor(images.labels)[kept][known]
    return Seen(features, covered(boxes, round(features.shape[2] ** 0.5)).float(), Objects(boxes, False), labels)


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
    run: DeviceConfig = field(default_factory=DeviceConfig)


def main(args: Sequence[str]) -> None:
    """Write what the maps buy into the file that `args` name."""
    with one_line_errors("bench/ceilings.py"):
        config = parse(CeilingsConfig, args, prog=called("bench/ceilings.py"), description=__doc__)
        trained = load_config(config.source / "config.yaml")
        root = config.data.root or trained.data.root
        if root is None:
            raise UsageError("--data.root: which images?")
        splits, console = read_splits(root), Console(markup=False)
        if splits.test is None:
            raise UsageError(f"{root} has no test split")
        device, workers = pick_device(config.run.device), pick_workers(config.data.workers)
        encoder = load(config.source / "init.safetensors", device)
        seen = []
        for images in (splits.train, splits.test):
            objects = read_objects(config.data.boxes, images)
            if objects is None:
                raise UsageError(f"--data.boxes: {images.root} comes with no boxes of its own")
            seen.append(see(encoder, images, objects, workers, console))
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
