"""Ways of doing a training step: ours and its variants, the authors' released way, and lightly's.

Each way is built from the same seed, so that encoder, head, detectors and queue start the same. Before it is timed,
`same_maths.py` compares a few of its steps with the same maths done plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastcr.config import Config, MocoConfig, ModelConfig, OptimConfig, RationaleConfig, RunConfig
from fastcr.data.views import Batch
from fastcr.encoders.backbone import build_backbone, mean_pool
from fastcr.encoders.released import ReleasedBranch
from fastcr.kernels.info_nce import info_nce_reference
from fastcr.method import build as method_build
from fastcr.method.moco import MoCo
from fastcr.presets import tuned
from fastcr.runs.context import Context
from fastcr.runs.machine import pick_dtype

SEED, TEMPERATURE, KEY_MOMENTUM, EMBEDDING_DIM = 0, MocoConfig.temperature, MocoConfig.key_momentum, 256
RELEASED_FIT_WEIGHT = 0.01  # on the sum over the batch
LR = 3e-4  # so small that rounding does not drive two ways apart within a few steps
PAPER = Config(moco=MocoConfig(embedding_dim=EMBEDDING_DIM))
FROZEN = ModelConfig(batchnorm="frozen")  # what `auto` is with pretrained weights
RELATIONAL = replace(PAPER, model=FROZEN, moco=replace(PAPER.moco, objective="relational", temperature=0.1))
SAME_SIZE = replace(
    tuned("folder"),
    model=replace(FROZEN, frozen_stages=tuned("folder").model.frozen_stages),
    views=replace(tuned("folder").views, key_scale=1.0),
)
TUNED = replace(SAME_SIZE, views=replace(SAME_SIZE.views, key_scale=2.0))  # as a whole network at half its own size
SGD: dict[str, Any] = {"lr": LR, "momentum": OptimConfig.momentum, "weight_decay": OptimConfig.weight_decay}


class Setting(NamedTuple):
    """Encoder and sizes of a step."""

    backbone: str
    last_stage: str
    image_size: int
    batch: int
    queue_size: int


class Built(NamedTuple):
    """A way on its device."""

    step: Callable[[Batch], Tensor]  # one step, its loss (a scalar on the device)
    encoder: nn.Module  # the trained one, images to features
    key_encoder: nn.Module | None = None
    queue: Tensor | None = None  # [N,D]
    dtype: torch.dtype = torch.float32  # of the images it takes
    memory_format: torch.memory_format = torch.contiguous_format
    key_size: int | None = None  # side of the keys' views, pixels; None: that of the queries'


def ours(
    setting: Setting, device: torch.device, *, recipe: Config = PAPER, rationale: bool = True, folded: bool = True,
    **run: Any,
) -> Built:  # fmt: skip
    """The step that `fastcr.train` runs with a recipe at these sizes, with the settings `run` of `RunConfig`.

    `rationale=False` is plain MoCo v2; `folded=False` runs frozen BatchNorm as passes of its own.
    """
    encoder: Any = {"backbone": setting.backbone, "last_stage": setting.last_stage, "weights": "none"}
    config = replace(
        recipe,
        run=RunConfig(**{"seed": SEED, "cuda_graph": False} | run),
        data=replace(recipe.data, image_size=setting.image_size),
        model=replace(recipe.model, **encoder),
        optim=replace(recipe.optim, batch_size=setting.batch, lr=LR),
        moco=replace(recipe.moco, queue_size=setting.queue_size),
        rationale=replace(recipe.rationale, enabled=rationale),
    )
    context = Context(device, pick_dtype(config.run.precision, device), console=Console(quiet=True))
    with nullcontext() if folded else patch.object(method_build, "fold_norms", lambda *_: None):
        training = method_build.build(config, context)
    moco = training.moco
    moco.keep_frozen(context.dtype)
    step = lambda batch: training.step(batch)[0]  # noqa: E731
    encoders, size = (moco.backbone, moco.key_backbone), config.key_size
    return Built(step, *encoders, moco.queue, context.dtype, torch.channels_last, size)


def beginning(setting: Setting) -> tuple[MoCo, int]:
    """Encoders, heads and queue as `ours` begins with them, and the channels of the features."""
    torch.manual_seed(SEED)
    backbone, channels = build_backbone(setting.backbone, setting.last_stage)
    return MoCo(backbone, channels, MocoConfig(embedding_dim=EMBEDDING_DIM, queue_size=setting.queue_size)), channels


class Released(nn.Module):
    """A step done as the released code does it: fp32, every map and every loss written out, nothing fused.

    Where what it does is not known, the cheaper choice was taken: queue positions never leave the host, batches are
    not shuffled, and the GradCAM's gradient is not itself differentiated.
    """

    queue: Tensor
    masked_queue: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        moco, channels = beginning(setting)
        self.encoder, self.head = moco.backbone, moco.head
        detectors = RationaleConfig.detectors
        self.conv, self.norm = nn.Conv2d(channels, detectors, 1, bias=False), nn.BatchNorm2d(detectors)
        self.masked_head = deepcopy(self.head)
        self.key_encoder, self.key_head = moco.key_backbone, moco.key_head
        self.masked_key_head = deepcopy(moco.key_head)
        self.register_buffer("queue", moco.queue.clone())
        self.register_buffer("masked_queue", moco.queue.clone())
        self.position = 0

    def mask(self, features: Tensor) -> Tensor:
        """Features `[B,C,H,W]` to maps `[B,H,W]`, min-max scaled over the batch."""
        peak = F.relu(self.norm(self.conv(features))).max(dim=1).values
        return (peak - peak.min()) / (peak.max() - peak.min())

    def contrast(self, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        """InfoNCE of unit rows `[B,D]` from the whole matrix of logits `[B,1+N]`, batch mean."""
        positive = (query * key).sum(dim=1, keepdim=True)
        negative = query @ queue.clone().T
        logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    @torch.no_grad()
    def update_keys(self) -> None:
        """EMA, one parameter after the other."""
        pairs = [(self.encoder, self.key_encoder), (self.head, self.key_head), (self.masked_head, self.masked_key_head)]
        for trained, follower in pairs:
            for new, old in zip(trained.parameters(), follower.parameters(), strict=True):
                old.data = old.data * KEY_MOMENTUM + new.data * (1 - KEY_MOMENTUM)

    def losses(self, batch: Batch) -> Tensor:
        """The loss of a batch; the masked half is computed, and does not enter it."""
        features = self.encoder(batch.first)
        query = F.normalize(self.head(features.mean((2, 3))), dim=1)
        with torch.no_grad():
            key_features = self.key_encoder(batch.second)
            key = F.normalize(self.key_head(key_features.mean((2, 3))), dim=1)
        contrast = self.contrast(query, key, self.queue)
        (gradient,) = torch.autograd.grad(contrast, features, retain_graph=True)
        cam = F.relu((features * gradient.mean((2, 3), keepdim=True)).sum(dim=1))
        fit = F.kl_div(F.log_softmax(self.mask(features), dim=-1), F.softmax(cam, dim=-1), reduction="sum")

        masked = (features * self.mask(features)[:, None]).mean((2, 3))
        masked_query = F.normalize(self.masked_head(masked), dim=1)
        with torch.no_grad():
            masked = (key_features * self.mask(key_features)[:, None]).mean((2, 3))
            masked_key = F.normalize(self.masked_key_head(masked), dim=1)
        self.contrast(masked_query, masked_key, self.masked_queue)
        self.enqueue(key, masked_key)
        return contrast + RELEASED_FIT_WEIGHT * fit

    @torch.no_grad()
    def enqueue(self, key: Tensor, masked_key: Tensor) -> None:
        """Replace the oldest keys of both queues; the batch must divide the queue."""
        rows = slice(self.position, self.position + len(key))
        self.queue[rows], self.masked_queue[rows] = key, masked_key
        self.position = rows.stop % len(self.queue)


def released(setting: Setting, device: torch.device) -> Built:
    """The authors' released way, in our own words: fp32, NCHW, no compiling, no autocast, SGD without foreach."""
    model = Released(setting).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, **SGD, foreach=False, fused=False)

    def step(batch: Batch) -> Tensor:
        model.update_keys()
        loss = model.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Built(step, model.encoder, model.key_encoder, model.queue)


def released_plainly(setting: Setting, device: torch.device) -> Built:
    """The same maths without what the released code wastes: one pass of the branch, no second head and queue."""
    moco, channels = beginning(setting)
    branch = ReleasedBranch(channels, RationaleConfig.detectors)
    model = nn.ModuleList([moco, branch]).to(device)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], **SGD)
    autocast = torch.autocast(device.type, enabled=False)

    def step(batch: Batch) -> Tensor:
        features, key = moco.backbone(batch.first), moco.key(batch.second, autocast)
        pooled = mean_pool(features)
        contrast = info_nce_reference(moco.query(pooled), key, moco.queue, temperature=TEMPERATURE).mean()
        (gradient,) = torch.autograd.grad(contrast, pooled, retain_graph=True)
        cam = F.relu(torch.einsum("bchw,bc->bhw", features, gradient)) / features[0, 0].numel()
        attention = branch.attention(features)
        fit = F.kl_div(attention.log_softmax(-1), cam.detach().softmax(-1), reduction="sum")
        loss = contrast + RELEASED_FIT_WEIGHT * fit
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moco.update_key_encoder(KEY_MOMENTUM)
        moco.enqueue(key)
        return loss.detach()

    return Built(step, moco.backbone, moco.key_backbone, moco.queue)


def lightly(setting: Setting, device: torch.device, *, tuned: bool = False, compile: bool = False) -> Built:
    """MoCo v2 from lightly's blocks, put together as in its example for one GPU (docs.lightly.ai/examples/moco.html).

    Head widths, learning rate, momenta and weight decay are those of the other ways. As it is: fp32, NCHW, torch's
    default SGD. `tuned`: what a user would add (autocast to 16 bits on a GPU, channels-last, fused SGD). `compile`:
    both encoders with their heads; the loss reads its position in the memory bank back to the host, and is left as it
    is.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    moco, channels = beginning(setting)
    head = MoCoProjectionHead(channels, channels, EMBEDDING_DIM)
    for mine, theirs in zip(moco.head.parameters(), head.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    query_encoder = nn.Sequential(moco.backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    key_encoder = deepcopy(query_encoder)
    deactivate_requires_grad(key_encoder)
    criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(setting.queue_size, EMBEDDING_DIM))
    criterion.memory_bank.bank.copy_(moco.queue)
    dtype = pick_dtype("auto", device) if tuned else torch.float32
    memory_format = torch.channels_last if tuned else torch.contiguous_format
    model = nn.ModuleList([query_encoder, key_encoder, criterion])
    model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(query_encoder.parameters(), **SGD, **({"fused": True} if tuned else {}))
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    if compile:
        query_encoder.compile()
        key_encoder.compile()

    def step(batch: Batch) -> Tensor:
        update_momentum(query_encoder, key_encoder, m=KEY_MOMENTUM)
        with autocast:
            query = query_encoder(batch.first)
            with torch.no_grad():
                key = key_encoder(batch.second)
            loss: Tensor = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Built(step, query_encoder[0], key_encoder[0], criterion.memory_bank.bank, dtype, memory_format)


def compiled(compile: bool | Literal["auto"], device: torch.device) -> bool:
    """Whether a way with this setting is compiled on `device`."""
    return compile is True or (compile == "auto" and device.type == "cuda")


class Way(NamedTuple):
    """A way by the function that builds it, and the same maths done plainly."""

    build: Callable[..., Built]
    plain: Callable[..., Built]
    options: dict[str, Any]
    plain_options: dict[str, Any]

    def compiled(self, device: torch.device) -> bool:
        """Whether it is compiled on `device`."""
        default = "auto" if self.build is ours else False
        return compiled(self.options.get("compile", default), device)

    @property
    def needs_cuda(self) -> bool:
        """Whether it is made of a CUDA graph."""
        return bool(self.options.get("cuda_graph"))


EAGER: dict[str, Any] = {"compile": False, "kernels": "torch", "precision": "fp32"}
MOCO = EAGER | {"rationale": False}
PLAIN: dict[str, Any] = {"compile": False, "kernels": "torch"}
TORCH_OPS = PLAIN | {"compile": True}
WAYS = {  # the most telling first: a GPU's time may end before the last
    "ours-tuned": Way(ours, ours, {"recipe": TUNED}, EAGER | {"recipe": TUNED}),
    "ours-tuned-graph": Way(ours, ours, {"recipe": TUNED, "cuda_graph": True}, EAGER | {"recipe": TUNED}),
    "ours-same-size": Way(ours, ours, {"recipe": SAME_SIZE}, EAGER | {"recipe": SAME_SIZE}),
    "tuned-eager": Way(ours, ours, PLAIN | {"recipe": TUNED}, EAGER | {"recipe": TUNED}),
    "tuned-torch-ops": Way(
        ours, ours, {"recipe": TUNED, "compile": True, "kernels": "torch"}, EAGER | {"recipe": TUNED}
    ),
    "lightly-tuned": Way(lightly, ours, {"tuned": True}, MOCO),
    "lightly-tuned-compile": Way(lightly, ours, {"tuned": True, "compile": True}, MOCO),
    "ours": Way(ours, ours, {}, EAGER),
    "ours-graph": Way(ours, ours, {"cuda_graph": True}, EAGER),
    "ours-moco": Way(ours, ours, {"rationale": False}, MOCO),
    "eager": Way(ours, ours, PLAIN, EAGER),
    "torch-ops": Way(ours, ours, TORCH_OPS, EAGER),
    "ours-relational": Way(ours, ours, {"recipe": RELATIONAL}, EAGER | {"recipe": RELATIONAL}),
    "ours-norms": Way(ours, ours, {"recipe": RELATIONAL, "folded": False}, EAGER | {"recipe": RELATIONAL}),
    "lightly": Way(lightly, ours, {}, MOCO),
    "released": Way(released, released_plainly, {}, {}),
}
