"""What a run trains: encoders, queue, branch, optimiser and the step, put together as the settings say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from fastcr.config import Config
from fastcr.data.images import ImageList
from fastcr.data.views import Batch
from fastcr.errors import UsageError
from fastcr.kernels import launch
from fastcr.method.backbone import backbone_mistake, build_backbone, freeze_stages, synchronise_norms
from fastcr.method.depthwise import FastGradients, has_slow_gradients
from fastcr.method.encoder import Branch, Encoder, build_branch, describe
from fastcr.method.folded import fold_norms
from fastcr.method.moco import MoCo
from fastcr.method.objectives import QUEUED, build_objective
from fastcr.method.parallel import Synchronised
from fastcr.method.rationale import RationaleHead
from fastcr.method.released import load_byol_heads, released_losses
from fastcr.method.step import Losses, LossFunction, Replayed, contrast_losses, cosine_lr, train_step
from fastcr.method.weights import load_initial_weights
from fastcr.runs.distributed import ALONE, Processes
from fastcr.runs.machine import keep_compiled, pick_dtype

C = TypeVar("C", bound=Config)
Step = Callable[[Batch], tuple[Tensor, Losses]]


class Schedule(NamedTuple):
    """Steps of a run, counted from 1."""

    steps_per_epoch: int
    total: int  # in which the learning rate falls to 0
    last: int  # after which the run ends

    @classmethod
    def of(cls, config: Config, images: int) -> Schedule:
        """The schedule of a run with so many training images; the short last batch of an epoch is dropped."""
        steps_per_epoch = images // config.optim.batch_size
        total = config.optim.epochs * steps_per_epoch
        return cls(steps_per_epoch, total, min(total, config.run.steps or total))


@dataclass(frozen=True)
class Training:
    """What a run trains, and how: everything but its images and its files."""

    encoder: Encoder  # the query or the key encoder's backbone, and the branch: what is measured and saved
    moco: MoCo
    model: nn.ModuleDict  # moco and branch
    optimizer: torch.optim.Optimizer
    rates: list[float]  # learning rate at the start of each of its groups: backbone, head, branch
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    step: Step

    @torch.no_grad()
    def fill_queue(self, batches: Iterator[Batch]) -> None:
        """Fill the queue with the keys of images, by the encoder as it is."""
        keys = 0
        while keys < len(self.moco.queue):
            batch = next(batches)
            key = self.moco.key(batch.second, self.autocast)
            self.moco.wait_for_keys()
            self.moco.enqueue(key, [batch.images])
            keys += len(key)

    def set_learning_rates(self, step: int, schedule: Schedule, warmup: float) -> None:
        """Half a cosine from each group's rate to 0; the backbone is held for the first `warmup` epochs."""
        held = step <= warmup * schedule.steps_per_epoch
        if held != self.moco.held:
            self.hold(held)
        for i, (group, rate) in enumerate(zip(self.optimizer.param_groups, self.rates, strict=True)):
            # the first group is the backbone
            group["lr"].fill_(0.0 if held and i == 0 else cosine_lr(rate, step - 1, schedule.total))

    def hold(self, held: bool) -> None:
        """Hold the backbone from the next step on, or train it, if it is ever trained; not before `load_state`."""
        self.moco.hold(held)
        if self.moco.alone and not self.moco.trained:  # they will always be the same: one is enough
            self.encoder.backbone = self.moco.key_backbone = self.moco.backbone
        if isinstance(self.step, Replayed):
            self.step.capture_anew()

    def gradient_norm(self) -> Tensor | None:
        """Norm of the step's gradient, a scalar; None with loss scaling, whose gradients may overflow now and then."""
        if self.scaler.is_enabled():
            return None
        gradients = [each.grad for each in trained(self.optimizer) if each.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, but for the batch and the random generators."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; torch's own errors if it is of another model."""
        unknown = torch.full_like(self.moco.queue_images, -1)  # of a run begun before this was kept
        self.model.load_state_dict({"moco.queue_images": unknown, **state["model"]})
        # momentum comes back; the settings are today's
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])


def build(
    config: Config,
    device: torch.device,
    console: Console,
    *,
    initial_weights: bool = True,
    processes: Processes = ALONE,
) -> Training:
    """Encoders, queue, branch, optimiser and the step on `device`; a run that is resumed needs no initial weights."""
    torch.manual_seed(config.run.seed)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    moco, branch = _modules(config, console, initial_weights, processes)
    saved = moco.key_backbone if config.moco.saved == "key" else moco.backbone
    encoder = Encoder(saved, branch, describe(config))
    model = nn.ModuleDict({"moco": moco, **({"branch": branch} if branch else {})})
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, rates = _optimizer(config, moco, branch, device)
    if compiles(config, device):
        keep_compiled()
        # both views in one pass are twice as many images: not a reason to compile for any number of them
        moco.backbone.compile(dynamic=False)
        moco.key_backbone.compile(dynamic=False)
    elif device.type == "cpu" and has_slow_gradients(moco.backbone):
        moco.gradients = FastGradients()
    if config.run.overlap_keys:
        moco.key_stream = torch.cuda.Stream(device)
    loss_function, options = _loss_function(config, branch), dict[str, Any]()
    if processes.ranks > 1:
        loss_function = Synchronised(model, loss_function, config.optim.accumulate)
        options["no_sync"] = loss_function.no_sync
        torch.manual_seed(config.run.seed + processes.rank)  # for what a model draws in training, such as dropout
    dtype = pick_dtype(config.run.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    step: Step = partial(
        train_step,
        moco,
        loss_function,
        optimizer,
        fit_weight=config.rationale.fit_weight,
        key_momentum=config.moco.key_momentum,
        autocast=autocast,
        scaler=scaler,
        accumulate=config.optim.accumulate,
        **options,
    )
    step = Replayed(step) if config.run.cuda_graph else step
    return Training(encoder, moco, model, optimizer, rates, scaler, autocast, step)


def _modules(
    config: Config, console: Console, initial_weights: bool, processes: Processes
) -> tuple[MoCo, Branch | None]:
    """Encoders with their initial weights, queue and branch, still on the CPU."""
    backbone, channels = build_backbone(
        config.model.backbone,
        config.model.last_stage,
        stem_maxpool=config.released.stem_maxpool,
        image_size=config.data.image_size,
    )
    with processes.local_first():  # one process downloads, the others find the file
        missing = load_initial_weights(backbone, config.model) if initial_weights else []
    if missing:
        names = ", ".join(sorted(missing))
        console.print(f"{len(missing)} weights stay random: {names}", highlight=False, soft_wrap=True)
    backbone.requires_grad_(config.optim.backbone_lr != 0)  # if it is not trained, no gradient has to pass through it
    freeze_stages(backbone, config.model.frozen_stages)
    if config.model.norms == "frozen":
        fold_norms(backbone, config.data.image_size)
    moco = MoCo(backbone, channels, config.moco)
    if initial_weights:
        load_byol_heads(moco, Path(config.model.weights))
    branch = build_branch(channels, config.rationale, config.released, config.run.kernels, processes)
    if isinstance(branch, RationaleHead) and not config.rationale.fit_weight:
        branch.requires_grad_(False)  # it stays as it is, without weight decay too
    encoders = nn.ModuleList([moco.backbone, moco.key_backbone])
    norms = [module for module in encoders.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if isinstance(branch, RationaleHead) and config.moco.pooling == "rationale":
        moco.pool = branch.attended
    moco.processes = processes
    moco.shuffle = processes.ranks > 1 and config.model.norms == "local" and bool(norms)
    if config.model.norms == "sync":
        synchronise_norms(moco)
    elif config.model.norms == "frozen":
        for norm in norms:
            norm.eval()
    return moco, branch


def _optimizer(
    config: Config, moco: MoCo, branch: Branch | None, device: torch.device
) -> tuple[torch.optim.Optimizer, list[float]]:
    """A group each for backbone, head (and predictor) and branch, and the groups' learning rates at the start."""
    optim = config.optim
    heads = nn.ModuleList([moco.head, *([moco.predictor] if moco.predictor else [])])
    own = {moco.backbone: optim.backbone_lr, heads: optim.head_lr, branch: config.rationale.lr}
    parts = {part: optim.lr if rate is None else rate for part, rate in own.items() if part is not None}
    # rates are tensors, so that a CUDA graph sees them change
    groups = [{"params": part.parameters(), "lr": torch.tensor(rate, device=device)} for part, rate in parts.items()]
    rates = list(parts.values())
    if optim.optimizer == "adamw":
        betas = optim.momentum, 0.999
        return torch.optim.AdamW(groups, betas=betas, weight_decay=optim.weight_decay, fused=True), rates
    optimizer = torch.optim.SGD(groups, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)
    for parameter in trained(optimizer):
        # torch leaves it uninitialised where the scaler skips the first step; from 0 the sum is the same
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer, rates


def _loss_function(config: Config, branch: Any) -> LossFunction:
    """The method's losses, or those of the released code."""
    objective = build_objective(config.moco, config.run.kernels)
    if config.released.enabled:
        return partial(released_losses, branch=branch, objective=objective)
    fitted = branch if config.rationale.fit_weight else None  # GradCAM serves the fit alone
    return partial(contrast_losses, branch=fitted, objective=objective, cam_of=config.rationale.cam_of)


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimiser trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the encoders are compiled."""
    return config.run.compile is True or (config.run.compile == "auto" and device.type == "cuda")


def check_settings(config: Config, device: torch.device, console: Console, processes: Processes = ALONE) -> None:
    """`UsageError` for an encoder that does not exist, and for what this device or these processes cannot do."""
    model, batch_size, parts = config.model, config.optim.batch_size, processes.ranks * config.optim.accumulate
    if wrong := backbone_mistake(model.backbone, model.last_stage, stem_maxpool=config.released.stem_maxpool):
        raise UsageError(wrong)
    if batch_size % parts or batch_size < 2 * parts:
        shares = f"{processes.ranks} processes with --optim.accumulate {config.optim.accumulate}"
        raise UsageError(f"--optim.batch_size {batch_size} does not divide among {shares} into parts of at least 2")
    if config.released.enabled and processes.ranks > 1:
        raise UsageError("--released.enabled works in one process only: its attention depends on the whole batch")
    if config.optim.cached_views and processes.ranks > 1:
        raise UsageError("--optim.cached_views works in one process only")
    if config.run.cuda_graph and processes.ranks > 1:
        raise UsageError("--run.cuda_graph works in one process only")
    if model.norms == "sync" and device.type != "cuda":
        raise UsageError(f"--model.batchnorm sync needs CUDA, and this run is on {device}: take local or frozen")
    for flag in ("cuda_graph", "overlap_keys"):
        if getattr(config.run, flag) and device.type != "cuda":
            raise UsageError(f"--run.{flag} needs CUDA, and this run is on {device}")
    try:
        launch.use_triton(config.run.kernels, {"features": torch.empty(0, device=device)})
    except ValueError as error:
        raise UsageError(f"--run.kernels {config.run.kernels}: {error}") from None
    if model.weights == "none" and config.moco.objective in QUEUED and config.optim.epochs:
        console.print(
            f"warning: {config.moco.objective} learns from keys of the initial weights, and those are random: "
            "docs/training.md has a recipe for them (--moco.objective infonce ...)",
            highlight=False,
            soft_wrap=True,
        )
    if device.type == "cuda" and config.run.kernels == "auto" and launch.triton is None:
        console.print("Triton is not installed: plain torch is used in place of the kernels")


def fit_sizes(config: C, images: ImageList, console: Console) -> C:
    """The settings for so many images; `UsageError` where a batch is larger than the data.

    A queue that is larger is cut to the data where it holds what a query shall resemble; else there is a warning.
    """
    count, moco = len(images), config.moco
    if count < config.optim.batch_size:
        raise UsageError(f"{images.root} has {count} training images: set --optim.batch_size to at most that")
    if moco.queue_size <= count:
        return config
    if moco.objective in QUEUED:
        if count <= moco.neighbours:
            raise UsageError(f"{images.root} has {count} training images: set --moco.neighbours to less")
        return replace(config, moco=replace(moco, queue_size=count))
    console.print(
        f"warning: the queue ({moco.queue_size}) is larger than the data set ({count} images): "
        "stale keys of the same images become negatives",
        highlight=False,
    )
    return config
