"""What a run trains: encoders, queue, branch, optimiser and the step, put together as the settings say."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastcr.config import Config
from fastcr.data.images import ImageList
from fastcr.encoders.backbone import (
    TimmEncoder,
    backbone_mistake,
    build_backbone,
    check_size,
    freeze_stages,
    mean_pool,
    synchronise_norms,
    usual_size,
)
from fastcr.encoders.encoder import Encoder, describe
from fastcr.encoders.folding import fold_norms
from fastcr.encoders.rationale import RationaleHead, attention_entropy
from fastcr.encoders.weights import load_initial_weights
from fastcr.errors import UsageError
from fastcr.kernels import launch
from fastcr.method.depthwise import FastGradients, has_slow_gradients
from fastcr.method.moco import MoCo, Pool
from fastcr.method.objectives import build_objective
from fastcr.method.step import Losses, LossFunction, Replayed, Step, contrast_losses, synchronised, train_step
from fastcr.runs.context import Context
from fastcr.runs.machine import keep_compiled
from fastcr.runs.validate import validate

C = TypeVar("C", bound=Config)
LARGEST_KEYS = 2.0  # times the queries' side, by `--views.key_scale auto`: the most that was measured


class Schedule(NamedTuple):
    """Steps of a run, counted from 1."""

    steps_per_epoch: int
    total: int  # in which the learning rate falls to 0
    last: int  # after which the run ends
    warmup: int = 0  # steps in which the learning rate rises

    @classmethod
    def of(cls, config: Config, images: int) -> Schedule:
        """The schedule of a run with so many training images; the short last batch of an epoch is dropped."""
        steps_per_epoch = images // config.optim.batch_size
        total = config.optim.epochs * steps_per_epoch
        warmup = round(config.optim.warmup * total)
        return cls(steps_per_epoch, total, min(total, config.run.steps or total), warmup)

    def share_of_rate(self, step: int) -> float:
        """Share of its highest value that the learning rate has in `step`: a line up, then half a cosine down to 0."""
        if step <= self.warmup:
            return step / self.warmup
        done = (step - 1 - self.warmup) / max(self.total - self.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))


@dataclass(frozen=True)
class Training:
    """What a run trains, and how: everything but its images and its files."""

    encoder: Encoder  # the query encoder's backbone and the branch: what is measured and saved
    moco: MoCo
    model: nn.ModuleDict  # moco and branch
    optimizer: torch.optim.Optimizer
    rates: list[float]  # learning rate at the start of each of its groups: backbone, head, branch
    pool: Pool  # of the features, before the projection head
    step: Step

    def set_learning_rates(self, step: int, schedule: Schedule) -> None:
        """Each group's rate of `step`."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"].fill_(rate * schedule.share_of_rate(step))

    def figures(self, loss: Tensor, losses: Losses) -> dict[str, float]:
        """Losses and the state of health of the embeddings and of a branch that is fitted; waits for the device."""
        # unit vectors that lie everywhere have a variance of nearly 1 in all; those of a collapsed encoder 0
        spread = losses.key.var(0, correction=0).sum().sqrt()
        found = {"loss": loss, "contrast_loss": losses.contrast, "embedding_spread": spread}
        if losses.fit is not None and losses.attention is not None:
            found["fit_loss"] = losses.fit
            found["attention_entropy"] = attention_entropy(losses.attention)
            branch: Any = self.model["branch"]
            if len(branch.bias) > 1:
                found["effective_detectors"] = branch.effective_detectors(losses.features)
        return {name: figure.item() for name, figure in found.items()}

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, but for the batch and the random generators."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; torch's own errors if it is of another model."""
        self.model.load_state_dict(state["model"])
        # momentum comes back; the settings are today's
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})


def build(config: Config, context: Context, *, initial_weights: bool = True) -> Training:
    """Encoders, queue, branch, optimiser and the step; a run that is resumed needs no initial weights."""
    device, processes = context.device, context.processes
    torch.manual_seed(config.run.seed)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    moco, branch = _modules(config, context, initial_weights)
    encoder = Encoder(moco.backbone, branch, describe(config))
    model = nn.ModuleDict({"moco": moco, **({"branch": branch} if branch else {})})
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, rates = _optimizer(config, moco, branch, device)
    if config.run.compile is True or (config.run.compile == "auto" and device.type == "cuda"):
        keep_compiled()
        # evaluations bring other numbers of images: not a reason to compile for any number of them
        moco.backbone.compile(dynamic=False)
        moco.key_backbone.compile(dynamic=False)
    # in fp32 torch's own gradients of depthwise convolutions are as fast on a CPU
    slow = device.type == "cpu" and context.dtype != torch.float32 and has_slow_gradients(moco.backbone)
    pool = branch.attended if branch and config.moco.pooling == "rationale" else mean_pool
    loss_function: LossFunction = partial(
        contrast_losses,
        branch=branch if config.rationale.fit_weight else None,  # GradCAM serves the fit alone
        objective=build_objective(config.moco, config.run.kernels),
        pool=pool,
        cam_of=config.rationale.cam_of,
        recording=FastGradients() if slow else nullcontext(),
    )
    if processes.ranks > 1:
        loss_function = synchronised(model, loss_function)
        torch.manual_seed(config.run.seed + processes.rank)  # for what a model draws in training, such as dropout
    step: Step = partial(
        train_step,
        moco,
        loss_function,
        optimizer,
        fit_weight=config.rationale.fit_weight,
        key_momentum=config.moco.key_momentum,
        autocast=torch.autocast(device.type, dtype=context.dtype, enabled=context.dtype != torch.float32),
    )
    graph = config.run.cuda_graph
    if graph is True or (graph == "auto" and device.type == "cuda" and processes.ranks == 1):
        step = Replayed(step, fall_back=context.say if graph == "auto" else None)
    return Training(encoder, moco, model, optimizer, rates, pool, step)


def _modules(config: Config, context: Context, initial_weights: bool) -> tuple[MoCo, RationaleHead | None]:
    """Encoders with their initial weights, queue and branch, still on the CPU."""
    model, processes = config.model, context.processes
    backbone, channels = build_backbone(
        model.backbone, model.last_stage, image_size=config.data.image_size, colours=(model.mean, model.std)
    )
    if isinstance(backbone, TimmEncoder) and config.key_size != config.data.image_size:
        setting = f"--views.key_scale {config.views.key_scale}, {config.key_size} px (1 is always right)"
        check_size(backbone, model.backbone, config.key_size, setting)
    with processes.local_first():  # one process downloads, the others find the file
        missing = load_initial_weights(backbone, model) if initial_weights else []
    if missing:
        context.say(f"{len(missing)} weights stay random: {', '.join(sorted(missing))}")
    backbone.requires_grad_(config.optim.backbone_lr != 0)  # if it is not trained, no gradient has to pass through it
    freeze_stages(backbone, model.frozen_stages)
    if model.norms == "frozen":
        fold_norms(backbone, config.data.image_size)
        for norm in backbone.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.eval()
    moco = MoCo(backbone, channels, config.moco, dtype=context.dtype, processes=processes)
    branch = None
    if config.rationale.enabled:
        branch = RationaleHead(channels, config.rationale, config.run.kernels, processes=processes)
    if branch and not config.rationale.fit_weight:
        branch.requires_grad_(False)  # it stays as it is, without weight decay too
    if model.norms == "sync":
        synchronise_norms(moco)
    return moco, branch


def _optimizer(
    config: Config, moco: MoCo, branch: RationaleHead | None, device: torch.device
) -> tuple[torch.optim.Optimizer, list[float]]:
    """A group each for backbone, head and branch, and the groups' learning rates at the start."""
    optim = config.optim
    own = [(moco.backbone, optim.backbone_lr), (moco.head, None), (branch, config.rationale.lr)]
    rates = [optim.lr if rate is None else rate for part, rate in own if part is not None]
    parts = [part for part, _ in own if part is not None]
    groups = [
        {"params": part.parameters(), "lr": torch.tensor(rate, device=device)}  # a tensor: a CUDA graph sees it change
        for part, rate in zip(parts, rates, strict=True)
    ]
    if optim.optimizer == "adamw":
        betas = optim.momentum, 0.999
        # capturable: its count of steps lies on the device, where a CUDA graph can go on counting
        kind: dict[str, Any] = {"fused": True, "capturable": device.type == "cuda"}
        return torch.optim.AdamW(groups, betas=betas, weight_decay=optim.weight_decay, **kind), rates
    return torch.optim.SGD(groups, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True), rates


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimiser trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_settings(config: Config, context: Context) -> None:
    """`UsageError` for an encoder that does not exist, and for what this device or these processes cannot do."""
    model, device, processes = config.model, context.device, context.processes
    batch_size = config.optim.batch_size
    if wrong := backbone_mistake(model.backbone, model.last_stage):
        raise UsageError(wrong)
    if batch_size % processes.ranks or batch_size < 2 * processes.ranks:
        parts = f"{processes.ranks} processes into parts of at least 2"
        raise UsageError(f"--optim.batch_size {batch_size} does not divide among {parts}")
    if config.run.cuda_graph is True and processes.ranks > 1:
        raise UsageError("--run.cuda_graph works in one process only")
    needs_cuda = {"--run.cuda_graph": config.run.cuda_graph is True, "--model.batchnorm sync": model.norms == "sync"}
    for flag in (name for name, asked in needs_cuda.items() if asked and device.type != "cuda"):
        raise UsageError(f"{flag} needs CUDA, and this run is on {device}")
    try:
        launch.use_triton(config.run.kernels, {"features": torch.empty(0, device=device)})
    except ValueError as error:
        raise UsageError(f"--run.kernels {config.run.kernels}: {error}") from None
    if model.weights == "none" and config.moco.objective != "infonce" and config.optim.epochs:
        context.say(
            f"warning: --moco.objective {config.moco.objective} learns from the initial weights, and those are random: "
            "docs/training.md has a recipe for them (--moco.objective infonce ...)"
        )
    if device.type == "cuda" and config.run.kernels == "auto" and launch.triton is None:
        context.say("Triton is not installed: plain torch is used in place of the kernels")


def fit_sizes(config: C, images: ImageList, context: Context) -> C:
    """The settings for these training images; `UsageError` where a batch is larger than the data.

    A queue that is larger than the data is cut to it for the objective relational. For infonce there is a warning.
    `--views.key_scale auto` becomes a number: keys larger than the weights were made for, or of an encoder that was cut
    short, teach worse (docs/choices.md).
    """
    if config.views.key_scale == "auto":
        model, size = config.model, config.data.image_size
        whole = model.weights != "none" and model.last_stage == "layer4"
        scale = min(max((usual_size(model.backbone) or size) / size, 1.0), LARGEST_KEYS) if whole else 1.0
        config = replace(config, views=replace(config.views, key_scale=scale))
    count, moco = len(images), config.moco
    if count < config.optim.batch_size:
        raise UsageError(f"{images.root} has {count} training images: set --optim.batch_size to at most that")
    if moco.queue_size <= count:
        return config
    if moco.objective != "infonce":
        return validate(replace(config, moco=replace(moco, queue_size=count)))
    context.say(
        f"warning: the queue ({moco.queue_size}) is larger than the data set ({count} images): "
        "stale keys of the same images become negatives"
    )
    return config
