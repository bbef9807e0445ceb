"""What a run trains: encoders, queue, branch, optimiser and the step, put together as the settings say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from fastcr.backbone import build_backbone, load_initial_weights
from fastcr.config import Config, UsageError
from fastcr.distributed import ALONE, Processes, Synchronised
from fastcr.embed import Branch, build_branch
from fastcr.kernels import launch
from fastcr.machine import keep_compiled
from fastcr.moco import MoCo
from fastcr.rationale import RationaleHead
from fastcr.released import ReleasedBranch, released_losses
from fastcr.step import Losses, LossFunction, Replayed, contrast_losses, train_step
from fastcr.views import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Training(NamedTuple):
    """What a run trains, and how: everything but its images and its files."""

    moco: MoCo
    branch: Branch | None
    model: nn.ModuleDict  # both of them
    optimizer: torch.optim.Optimizer
    rates: list[float]  # learning rate at the start of each of its groups: backbone, head, branch
    scaler: torch.amp.GradScaler
    step: Callable[[Batch], tuple[Tensor, Losses]]


def prepare(
    config: Config,
    device: torch.device,
    console: Console,
    *,
    initial_weights: bool = True,
    processes: Processes = ALONE,
) -> Training:
    """Encoders, queue, branch, optimiser and the step on `device`; a run that goes on needs no initial weights."""
    torch.manual_seed(config.run.seed)
    torch.backends.cudnn.benchmark = True  # every batch has one shape
    backbone, channels = build_backbone(
        config.model.backbone,
        config.model.last_stage,
        stem_maxpool=config.released.stem_maxpool,
        image_size=config.data.image_size,
    )
    with processes.local_first():  # one of them downloads
        missing = load_initial_weights(backbone, config.model) if initial_weights else []
    if missing:
        names = ", ".join(sorted(missing))
        console.print(f"{len(missing)} weights stay random: {names}", highlight=False, soft_wrap=True)
    backbone.requires_grad_(config.optim.backbone_lr != 0)  # else nothing needs to be carried back through it
    moco = MoCo(backbone, channels, embedding_dim=config.moco.embedding_dim, queue_size=config.moco.queue_size)
    branch = build_branch(channels, config.rationale, config.released, config.run.kernels)
    model = nn.ModuleDict({"moco": moco, **({"branch": branch} if branch else {})})
    if config.model.batchnorm == "sync":
        nn.SyncBatchNorm.convert_sync_batchnorm(moco)  # not the branch's, which the ops know nothing of
    elif config.model.batchnorm == "frozen":
        for norm in batchnorms(moco):
            norm.eval()
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # a group a part, in the order of the model; the rates are tensors, so that a CUDA graph sees them change
    own = {moco.backbone: config.optim.backbone_lr, moco.head: None, branch: config.rationale.lr}
    parts = {part: config.optim.lr if rate is None else rate for part, rate in own.items() if part is not None}
    optimizer = torch.optim.SGD(
        [{"params": part.parameters(), "lr": torch.tensor(rate, device=device)} for part, rate in parts.items()],
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    for parameter in trained(optimizer):
        # torch would leave them uninitialised where the scaler passes over the first step; from 0 it is the same sum
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    dtype = pick_dtype(config.run.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if compiles(config, device):
        keep_compiled()
        moco.backbone.compile()
        moco.key_backbone.compile()
    if config.run.overlap_keys:
        moco.key_stream = torch.cuda.Stream(device)
    loss_function = pick_loss_function(config, branch)
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    if processes.ranks > 1:
        moco.processes, moco.shuffle = processes, config.model.batchnorm == "local" and bool(batchnorms(moco))
        if isinstance(branch, RationaleHead):
            branch.processes = processes
        loss_function = Synchronised(model, loss_function, config.optim.accumulate)
        no_sync = loss_function.no_sync
        torch.manual_seed(config.run.seed + processes.rank)  # what a model draws while it trains, such as dropout
    step: Callable[[Batch], tuple[Tensor, Losses]] = partial(
        train_step,
        moco,
        loss_function,
        optimizer,
        fit_weight=config.rationale.fit_weight,
        pooled_weight=config.rationale.pooled_contrast,
        key_momentum=config.moco.key_momentum,
        autocast=torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        scaler=scaler,
        accumulate=config.optim.accumulate,
        no_sync=no_sync,
    )
    step = Replayed(step) if config.run.cuda_graph else step
    return Training(moco, branch, model, optimizer, list(parts.values()), scaler, step)


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that it trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def batchnorms(moco: MoCo) -> list[nn.Module]:
    """The batch normalisations of both encoders."""
    return [module for module in moco.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the encoders are compiled."""
    return config.run.compile is True or (config.run.compile == "auto" and device.type == "cuda")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What `--run.precision` means on `device`."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return DTYPES[precision]


def check_device(config: Config, device: torch.device, console: Console, processes: Processes = ALONE) -> None:
    """`UsageError` for what the settings ask of a device, or of several processes, that cannot do it."""
    batch_size, parts = config.optim.batch_size, processes.ranks * config.optim.accumulate
    if batch_size % parts or batch_size < 2 * parts:
        shares = f"{processes.ranks} processes with --optim.accumulate {config.optim.accumulate}"
        raise UsageError(f"--optim.batch_size {batch_size} does not divide among {shares} into parts of at least 2")
    if config.released.enabled and processes.ranks > 1:
        raise UsageError("--released.enabled works in one process only: its attention depends on the whole batch")
    if config.run.cuda_graph and processes.ranks > 1:
        raise UsageError("--run.cuda_graph works in one process only")
    if config.model.batchnorm == "sync" and device.type != "cuda":
        raise UsageError(f"--model.batchnorm sync needs CUDA, and this run is on {device}: take local or frozen")
    for flag in ("cuda_graph", "overlap_keys"):
        if getattr(config.run, flag) and device.type != "cuda":
            raise UsageError(f"--run.{flag} needs CUDA, and this run is on {device}")
    try:
        launch.use_triton(config.run.kernels, {"features": torch.empty(0, device=device)})
    except ValueError as error:
        raise UsageError(f"--run.kernels {config.run.kernels}: {error}") from None
    if device.type == "cuda" and config.run.kernels == "auto" and launch.triton is None:
        console.print("Triton is not installed: plain torch takes the kernels' place")


def pick_loss_function(config: Config, branch: Branch | None) -> LossFunction:
    """The method's losses, or the released code's."""
    temperature, pooled = config.moco.temperature, config.rationale.pooled_contrast > 0
    if isinstance(branch, ReleasedBranch):
        return partial(released_losses, branch=branch, temperature=temperature)
    return partial(
        contrast_losses,
        branch=branch,
        temperature=temperature,
        cam_of=config.rationale.cam_of,
        pooled_contrast=pooled,
        impl=config.run.kernels,
    )
