"""What a run begins with: one pass of its encoder over training images, before the first step.

The images' centre crops, in the size of the keys' views, give all that a start needs: DDT's axis (`ddt.py`), to which
the detectors are fitted; the principal axes of the pooled features, at which a linear projection head begins; the first
keys of the queue; and embeddings with which later ones of the same images are compared (`measures/health.py`).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.config import Config
from fastcr.data.crop_loader import BATCH_SIZE, in_batches
from fastcr.data.images import ImageList
from fastcr.encoders.backbone import mean_pool
from fastcr.encoders.rationale import RationaleHead
from fastcr.method.build import Training
from fastcr.method.ddt import AXIS_IMAGES, Axis, Moments, detectors_like, evenly, features_of
from fastcr.method.moco import MoCo
from fastcr.runs.context import Context

DETECTOR_IMAGES = 512  # to whose DDT the detectors are fitted
SAMPLE = 512  # images whose embeddings are followed during the training


def begin(training: Training, images: ImageList, config: Config, context: Context) -> Tensor | None:
    """Set detectors, projection head and queue as the settings ask; returns the mean embeddings `[n,C]` of `SAMPLE`.

    None where nothing is asked for, as of a MoCo v2 from random weights, and where the keys' views are larger than the
    images that the encoder is for. Of several processes the first looks at the
    images, and the others take what it found. `UsageError` if no image can be read.
    """
    like_ddt = training.encoder.branch is not None and config.rationale.init == "ddt"
    wanted = like_ddt or config.moco.head == "linear" or config.moco.objective != "infonce"
    if not wanted and config.model.weights == "none":
        return None
    first = evenly(len(images), AXIS_IMAGES if wanted else SAMPLE)
    state, sample = context.processes.once(partial(_look, training, images, first, config, context, like_ddt))
    training.model.load_state_dict(state, strict=False)
    return sample if config.key_size == config.data.image_size else None


@torch.no_grad()
def _look(
    training: Training, images: ImageList, first: list[int], config: Config, context: Context, like_ddt: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """What `begin` sets, as entries of the model's state dict, and the sample's embeddings; all on the CPU.

    The `first` images are looked at together, then as many others as the queue has room for.
    """
    moco, branch, count = training.moco, training.encoder.branch, len(images)
    with training.encoder.evaluating(), torch.compiler.set_stance("force_eager"):
        look = partial(features_of, training.encoder, images, context=context, image_size=config.key_size)
        see = partial(look, title="looking at the images")
        # these features are kept: the attention that pools them is known when all of them have been seen
        found = [(part, features.cpu()) for part, features in see(in_batches(first))]
        if not found:
            raise images.none_readable()
        indices, features = [index for part, _ in found for index in part], torch.cat([part for _, part in found])
        sample = F.normalize(mean_pool(features[_among(indices, evenly(count, SAMPLE))]), dim=1)
        if like_ddt and isinstance(branch, RationaleHead):
            some = features[_among(indices, evenly(count, DETECTOR_IMAGES))].float()
            moments = Moments(features.shape[1], context.device)
            for part in features.split(BATCH_SIZE):
                moments.add(part.to(context.device))
            axis = Axis(*(each.cpu() for each in moments.axis()))
            weight, bias = detectors_like(axis, some, len(branch.bias), config.run.seed)
            temperature = branch.config.temperature
            branch.load_state_dict({"weight": temperature * weight, "bias": temperature * bias})
        pooled = torch.cat([training.pool(part.to(context.device)) for part in features.split(BATCH_SIZE)])
        if config.moco.head == "linear":
            begin_at_axes(moco, pooled)
        if config.moco.objective != "infonce":
            others = sorted(set(range(count)) - set(first))[: max(len(moco.queue) - len(indices), 0)]
            keys, owners = [moco.embed_keys(pooled)], list(indices)
            for part, more in see(in_batches(others)):
                keys.append(moco.embed_keys(training.pool(more)))
                owners += part
            fill_queue(moco, torch.cat(keys), owners)
    names = ("branch.", "moco.head.", "moco.key_head.", "moco.queue")
    state = {name: value.cpu() for name, value in training.model.state_dict().items() if name.startswith(names)}
    return state, sample


def begin_at_axes(moco: MoCo, pooled: Tensor) -> None:
    """Set a linear head to the directions that keep the cosines of pooled features `[N,C]` best.

    They are the leading eigenvectors of the second moment of the features at unit length, whose mean is left in. A head
    with more dimensions than features have stays as it is.
    """
    weight: Tensor = moco.head[0].weight  # type: ignore[assignment]
    if len(weight) > pooled.shape[1]:
        return
    unit = F.normalize(pooled.double(), dim=1)
    axes = torch.linalg.eigh(unit.T @ unit).eigenvectors.flip(1)[:, : len(weight)].T
    for head in (moco.head, moco.key_head):
        head[0].weight.copy_(axes)  # type: ignore[operator]


def fill_queue(moco: MoCo, keys: Tensor, images: list[int]) -> None:
    """Fill the queue with keys `[n,D]` of these images, again from the first where they do not suffice."""
    slots = torch.arange(len(moco.queue), device=keys.device) % len(keys)
    moco.queue.copy_(keys[slots])
    moco.queue_images.copy_(torch.tensor(images, device=keys.device)[slots])


def _among(indices: list[int], wanted: list[int]) -> list[int]:
    """The places of the wanted ones in `indices`."""
    some = set(wanted)
    return [place for place, index in enumerate(indices) if index in some]
