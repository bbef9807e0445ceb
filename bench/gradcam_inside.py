"""`python bench/gradcam_inside.py RUN --data.boxes FILE`: does the GradCAM that a run was fitted to lie on the object?

GradCAM of what the run was fitted to (`--rationale.cam_of`; of the contrast loss for plain MoCo and the released
variant), from the trained encoder on the test images, as close to training as images without augmentation allow: the
query is an image's centre crop, its key the mirror image of that, the queue the one training ended with, the encoders
in eval mode. For each map RUN/gradcam.json gets its share in the object's box and how often its peak is in the box, in
percent, beside the average of all such maps and a centred Gaussian of the map's own entropy. The maps: `loss` and
`score`, the positions that raise the loss and those that lower it, each divided by its sum; and `target`, the
distribution the branch was fitted to (there is none for plain MoCo, and the released variant's is all but uniform).
`average map` is retrieval when every image is pooled with the average attention of all: what knowing where objects
usually are is worth; `head` is retrieval by the projection head's output, which training compares. Without boxes the
file holds an empty object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from fastcr.method.objectives.contract import Objective

from bench.crops import centre_crops
from fastcr.arguments import EvaluateData
from fastcr.config import Config, DeviceConfig, tyro
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.encoders.rationale import common_cam_weights, mismatch_gradient
from fastcr.errors import UsageError
from fastcr.kernels.rationale_fit import CamKeeps, gradcam_target
from fastcr.measures.evaluation import test_images
from fastcr.measures.localisation import Objects, localisation, objects_in_crop, read_objects
from fastcr.measures.retrieval import retrieval
from fastcr.method.build import build
from fastcr.method.moco import MoCo
from fastcr.method.objectives import build_objective
from fastcr.method.step import CamOf
from fastcr.runs.checkpoint import load_torch, write_whole
from fastcr.runs.command_line import called, load_config, one_line_errors, parse
from fastcr.runs.machine import pick_device, pick_workers


def slopes(
    moco: MoCo,
    images: Tensor,
    features: Tensor,
    objective: Objective,
    cam_of: CamOf = "loss",
    common: CamKeeps | None = None,
) -> Tensor:
    """`sum_c A_c(s) g_c` `[B,S]` of images `[B,3,H,W]` with features `A [B,C,h,w]`, against their mirror images.

    The gradient `g` is that of training. `common`: make the channel weights that all images share of the positions
    that these GradCAMs keep.
    """
    key = moco.key(images.flip(3), torch.autocast(images.device.type, enabled=False))
    pooled = moco.pool(features).requires_grad_()
    projected = moco.project(pooled)
    compared = objective(F.normalize(projected, dim=1), moco.keys(key))
    if cam_of == "similarity":
        gradient = mismatch_gradient(pooled, projected, compared.positive)
    else:
        (gradient,) = torch.autograd.grad(compared.loss.sum(), pooled)
    if common:
        gradient = common_cam_weights(features, gradient, common)
    return torch.einsum("bcs,bc->bs", features.flatten(2), gradient)


def gradcam_maps(config: Config, slope: Tensor) -> dict[str, Tensor]:
    """Distributions `[N,S]` from slopes `[N,S]`: both halves, and the target of the run, if it has one of its own."""
    halves = {"score": torch.relu(-slope), "loss": torch.relu(slope)}
    maps = {name: gradcam_target(half, "sum", 1.0) for name, half in halves.items()}
    rationale = config.rationale
    if fitted(config):
        kept = halves["loss" if rationale.cam_keeps == "mismatch" else "score"]
        maps["target"] = gradcam_target(kept, rationale.target, rationale.temperature)
    return maps


def fitted(config: Config) -> bool:
    """Whether a run has a branch that was fitted to such a GradCAM."""
    return config.rationale.enabled and not config.released.enabled


def gradcam_inside(
    folder: Path, images: ImageList, objects: Objects, device: torch.device, workers: int, console: Console
) -> dict[str, Any]:
    """`{"score": {"inside", "pointing", "average inside", ...}, "loss": ..., "target": ..., "average map": ...}`."""
    config = load_config(folder / "config.yaml")
    # what makes training faster is not needed here
    config = replace(config, run=replace(config.run, compile=False, cuda_graph=False, overlap_keys=False))
    training = build(config, device, console, initial_weights=False)
    training.model.load_state_dict(load_torch(folder / "resume.pt")["model"])
    training.model.eval()
    moco, branch = training.moco, training.encoder.branch if fitted(config) else None
    cam_of = config.rationale.cam_of if branch else "loss"
    common = config.rationale.cam_keeps if branch and config.rationale.cam_weights == "common" else None
    found, sizes, kept = list[Tensor](), list[Tensor](), list[int]()
    attention, features, projected = list[Tensor](), list[Tensor](), list[Tensor]()
    saved, head = (moco.key_backbone, moco.key_head) if config.moco.saved == "key" else (moco.backbone, moco.head)
    for crops, sizes_here, indices in centre_crops(images, config.data.image_size, device, workers, console):
        with torch.no_grad():
            seen = moco.backbone(crops)
            pooled = moco.pool(seen if saved is moco.backbone else saved(crops))
            projected.append(F.normalize(head(pooled), dim=1).cpu())
            if branch:
                attention.append(branch.pool(seen).attention.cpu())
                features.append(seen.flatten(2).half().cpu())
        found.append(slopes(moco, crops, seen, build_objective(config.moco), cam_of, common))
        sizes.append(sizes_here)
        kept += indices
    boxes = Objects(objects.boxes[kept], objects.in_pixels)
    boxes = objects_in_crop(boxes, torch.cat(sizes), config.data.image_size)
    scores = {}
    for name, maps in gradcam_maps(config, torch.cat(found).cpu()).items():
        scored = localisation(maps, boxes)
        scores[name] = {"inside": scored["attention"].inside, "pointing": scored["attention"].pointing}
        for control in ("average", "gaussian"):
            scores[name] |= {f"{control} inside": scored[control].inside}
            scores[name] |= {f"{control} pointing": scored[control].pointing}
    labels = torch.tensor(images.labels)[kept]
    scores["head"] = retrieval(torch.cat(projected), labels)._asdict()
    if attention:
        average = torch.cat(attention).mean(0)
        pooled = torch.cat([each.float() @ average for each in features])
        scores["average map"] = retrieval(F.normalize(pooled, dim=1), labels)._asdict()
    return scores


@dataclass(frozen=True)
class GradcamConfig:
    """Settings of the measurement."""

    source: tyro.conf.Positional[Path]
    """A run folder."""
    data: EvaluateData = field(default_factory=EvaluateData)
    run: DeviceConfig = field(default_factory=DeviceConfig)


def main(args: Sequence[str]) -> None:
    """Write gradcam.json into the run folder that `args` name."""
    with one_line_errors("bench/gradcam_inside.py"):
        config = parse(GradcamConfig, args, prog=called("bench/gradcam_inside.py"), description=__doc__)
        root = config.data.root or load_config(config.source / "config.yaml").data.root or write_synthetic()
        images = test_images(read_splits(root))
        if images is None:
            raise UsageError(f"{root} has no labels (class folders), so nothing can be measured")
        objects, scores = read_objects(config.data.boxes, images), dict[str, Any]()
        if objects is not None:
            device, workers = pick_device(config.run.device), pick_workers(config.data.workers)
            scores = gradcam_inside(config.source, images, objects, device, workers, Console(markup=False))
        text = json.dumps(scores, indent=2) + "\n"
        write_whole(config.source / "gradcam.json", lambda file: file.write_text(text))
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
