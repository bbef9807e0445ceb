"""`python bench/gradcam_inside.py RUN --data.boxes FILE`: does the GradCAM that a run was fitted to lie on the object?

GradCAM of the trained encoder's contrast loss, or of the own key's logit where that is what the run was fitted to
(`--rationale.cam_of logit`), on the test images, as close to training as images without augmentation allow: the
query is the picture's centre crop, its key the mirror image of that, the queue the one training ended with, the
encoders in eval mode. RUN/gradcam.json gets the share of each map in the box and how often its peak is in it, percent,
beside the average of all such maps and a centred Gaussian of its own entropy, for three maps: `score` and `loss`, the
two halves of the GradCAM divided by their sums, and `target`, the distribution the branch was fitted to (not for plain
MoCo, nor for the released variant, whose target is all but uniform). `average map` is what every picture retrieves when
all are pooled with the average of the attention that the branch gives them: what knowing where objects usually are is
worth. Without boxes it is an empty object.
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
from rich.progress import track
from torch import Tensor

from fastcr.config import Config, tyro
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.synthetic import write_synthetic
from fastcr.data.views import normalise
from fastcr.errors import UsageError
from fastcr.evaluate import EvaluateData, EvaluateRun
from fastcr.kernels.rationale_fit import CamSign, gradcam_target
from fastcr.measures.embeddings import BATCH_SIZE, load_crops
from fastcr.measures.evaluation import test_images
from fastcr.measures.localisation import Objects, localisation, objects_in_crop, read_objects
from fastcr.measures.retrieval import retrieval
from fastcr.method.build import prepare
from fastcr.method.moco import MoCo, mean_pool
from fastcr.method.rationale import RationaleHead, common_cam_weights
from fastcr.method.step import CamOf
from fastcr.runs.checkpoint import load_torch, write_whole
from fastcr.runs.command_line import load_config, one_line_errors, parse
from fastcr.runs.machine import pick_device, pick_workers


def slopes(
    moco: MoCo,
    images: Tensor,
    features: Tensor,
    temperature: float,
    cam_of: CamOf = "loss",
    common: CamSign | None = None,
) -> Tensor:
    """`Σ_c A_c(s) g_c` `[B,S]` of images `[B,3,H,W]`, whose features `[B,C,h,w]` are, against their mirror images.

    `g` is as in training. `common`: the half of whose GradCAMs the channel weights are made that all images share, if
    they do.
    """
    key = moco.key(images.flip(3), torch.autocast(images.device.type, enabled=False))
    pooled = mean_pool(features).requires_grad_()
    if cam_of == "loss":
        explained = moco.contrast(moco.query(pooled), key, temperature)
    else:
        explained = -(moco.head(pooled) * key).sum(1)
    (gradient,) = torch.autograd.grad(explained.sum(), pooled)
    if common:
        gradient = common_cam_weights(features, gradient, common)
    return torch.einsum("bcs,bc->bs", features.flatten(2), gradient)


def gradcam_maps(config: Config, slope: Tensor) -> dict[str, Tensor]:
    """Distributions `[N,S]` from slopes `[N,S]`: both halves, and the target of the run, if it has one of its own."""
    halves = {"score": torch.relu(-slope), "loss": torch.relu(slope)}
    maps = {name: gradcam_target(half, "sum", 1.0) for name, half in halves.items()}
    rationale = config.rationale
    if rationale.enabled and not config.released.enabled:
        maps["target"] = gradcam_target(halves[rationale.cam_sign], rationale.target, rationale.temperature)
    return maps


def gradcam_inside(
    folder: Path, images: ImageList, objects: Objects, device: torch.device, workers: int, console: Console
) -> dict[str, Any]:
    """`{"score": {"inside", "pointing", "average inside", ...}, "loss": ..., "target": ..., "average map": ...}`."""
    config = load_config(folder / "config.yaml")
    # of what speeds training up nothing is needed here
    config = replace(config, run=replace(config.run, compile=False, cuda_graph=False, overlap_keys=False))
    training = prepare(config, device, console, initial_weights=False)
    training.model.load_state_dict(load_torch(folder / "resume.pt")["model"])
    training.model.eval()
    numbers, size = list(range(len(images))), config.data.image_size
    branch = training.branch
    fitted = isinstance(branch, RationaleHead)  # what else there is was trained with the loss
    cam_of = config.rationale.cam_of if fitted else "loss"
    common = config.rationale.cam_sign if fitted and config.rationale.cam_weights == "common" else None
    batches = [numbers[start : start + BATCH_SIZE] for start in numbers[::BATCH_SIZE]]
    found, sizes, kept = list[Tensor](), list[Tensor](), list[int]()
    attention, features = list[Tensor](), list[Tensor]()
    loader = load_crops([images], batches, image_size=size, workers=workers, pin=False)
    shown = track(loader, "GradCAM", len(batches), console=console, transient=True, disable=not console.is_terminal)
    for batch, (pixels, sizes_here, readable) in zip(batches, shown, strict=True):
        if readable:
            crops = normalise(pixels.to(device), torch.float32)
            with torch.no_grad():
                seen = training.moco.backbone(crops)
                if isinstance(branch, RationaleHead):
                    attention.append(branch.pool(seen).attention.cpu())
                    features.append(seen.flatten(2).half().cpu())
            found.append(slopes(training.moco, crops, seen, config.moco.temperature, cam_of, common))
            sizes.append(sizes_here)
            kept += [batch[i] for i in readable]
    boxes = objects_in_crop(Objects(objects.boxes[kept], None, objects.in_pixels), torch.cat(sizes), size)
    scores = {}
    for name, maps in gradcam_maps(config, torch.cat(found).cpu()).items():
        scored = localisation(maps, boxes)
        scores[name] = {"inside": scored["attention"].inside, "pointing": scored["attention"].pointing}
        for control in ("average", "gaussian"):
            scores[name] |= {f"{control} inside": scored[control].inside}
            scores[name] |= {f"{control} pointing": scored[control].pointing}
    if attention:
        labels = torch.tensor(images.labels)[kept]
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
    run: EvaluateRun = field(default_factory=EvaluateRun)


def main(args: Sequence[str]) -> None:
    """Write gradcam.json into the run folder that `args` name."""
    with one_line_errors("gradcam_inside"):
        config = parse(GradcamConfig, args, prog="python bench/gradcam_inside.py", description=__doc__)
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
