"""`python bench/gradcam_inside.py RUN --data.boxes FILE`: does the GradCAM that a run was fitted to lie on the object?

The GradCAM is that of the trained encoder on the test images, as close to training as images without augmentation
allow: the query is an image's centre crop, its key the mirror image, the queue the one training ended with, and the
encoders are in eval mode. RUN/gradcam.json gets, in percent, the share of each map inside the object's box and how
often its peak is inside, beside the same of the average of all maps and of a centred Gaussian of the map's own entropy:

- `loss`, `score`: the half of GradCAM that keeps the positions which raise the loss, and the half which lower it
- `target`: the distribution that the attention is fitted to; only runs with a branch have it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from fastcr.arguments import EvaluateData
from fastcr.config import Config, DeviceConfig, tyro
from fastcr.data.crop_loader import BATCH_SIZE, load_crops
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.data.views import normalise
from fastcr.encoders.rationale import common_cam_weights, mismatch_gradient
from fastcr.errors import UsageError
from fastcr.kernels.rationale_fit import gradcam_target
from fastcr.measures.evaluation import test_images
from fastcr.measures.localisation import localisation, objects_in_crop, read_objects
from fastcr.method.build import Training, build
from fastcr.method.objectives import build_objective
from fastcr.runs.checkpoint import load_torch, write_whole
from fastcr.runs.command_line import called, load_config, one_line_errors, parse
from fastcr.runs.context import Context

Scores = dict[str, dict[str, float]]


def slopes(training: Training, config: Config, images: Tensor) -> Tensor:
    """`sum_c A_c(s) g_c` `[B,S]` of images `[B,3,H,W]` against their mirror images; the gradient `g` is training's."""
    moco, branch, rationale = training.moco, training.encoder.branch, config.rationale
    with torch.no_grad():
        features = moco.backbone(images)
        key = moco.key(images.flip(3), training.autocast, training.pool)
        pooled = training.pool(features)
    pooled.requires_grad_()
    projected = moco.head(pooled)
    compared = build_objective(config.moco)(F.normalize(projected, dim=1), moco.keys(key))
    if branch and rationale.cam_of == "similarity":
        gradient = mismatch_gradient(pooled, projected, compared.positive)
    else:
        (gradient,) = torch.autograd.grad(compared.loss.sum(), pooled)
    if branch and rationale.cam_weights == "common":
        gradient = common_cam_weights(features, gradient, rationale.cam_keeps)
    return torch.einsum("bcs,bc->bs", features.flatten(2), gradient)


def gradcam_maps(config: Config, slope: Tensor) -> dict[str, Tensor]:
    """Distributions `[N,S]` from slopes `[N,S]`: both halves of GradCAM, and the target of a run with a branch."""
    halves = {"match": torch.relu(-slope), "mismatch": torch.relu(slope)}
    maps = {name: gradcam_target(halves[half], "sum", 1.0) for name, half in (("score", "match"), ("loss", "mismatch"))}
    if config.rationale.enabled:
        kept = halves[config.rationale.cam_keeps]
        maps["target"] = gradcam_target(kept, config.rationale.target, config.rationale.temperature)
    return maps


def gradcam_inside(folder: Path, images: ImageList, objects: Tensor, context: Context) -> Scores:
    """`{"score": {"inside", "pointing", "average inside", ...}, "loss": ..., "target": ...}`, percent."""
    config = load_config(folder / "config.yaml")
    config = replace(config, run=replace(config.run, compile=False, cuda_graph=False))  # nothing is trained here
    training = build(config, context, initial_weights=False)
    training.model.load_state_dict(load_torch(folder / "resume.pt")["model"])
    training.model.eval()
    batches = [list(range(len(images)))[at : at + BATCH_SIZE] for at in range(0, len(images), BATCH_SIZE)]
    loader = load_crops([images], batches, config.data.image_size, context)
    found, sizes, kept = list[Tensor](), list[Tensor](), list[int]()
    for batch, (pixels, sizes_here, readable) in zip(batches, loader, strict=True):
        if readable:
            crops = normalise(pixels.to(context.device), torch.float32)
            found.append(slopes(training, config, crops).cpu())
            sizes.append(sizes_here)
            kept += [batch[i] for i in readable]
    boxes = objects_in_crop(objects[kept], torch.cat(sizes), config.data.image_size)
    scores = Scores()
    for name, maps in gradcam_maps(config, torch.cat(found)).items():
        scored = localisation(maps, boxes)
        scores[name] = {
            f"{prefix}{key}": scored[kind][key]
            for kind, prefix in (("attention", ""), ("average", "average "), ("gaussian", "gaussian "))
            for key in ("inside", "pointing")
        }
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
        objects = read_objects(config.data.boxes, images) if images and config.data.boxes else None
        if images is None or objects is None:
            raise UsageError(f"{root} needs labels (class folders), and boxes (--data.boxes)")
        context = Context.of(config.run.device, "fp32", config.data.workers)
        text = json.dumps(gradcam_inside(config.source, images, objects, context), indent=2) + "\n"
        write_whole(config.source / "gradcam.json", lambda file: file.write_text(text))
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
