"""What a run trains: encoders, queue, branch, optimiser and the step, put together as the settings say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from fastcr.backbone import build_backbone, load_initial_weights
from fastcr.config import Config, UsageError
from fastcr.embed import Branch, build_branch
from fastcr.kernels.launch import use_triton
from fastcr.machine import keep_compiled
from fastcr.moco import MoCo
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
    scaler: torch.amp.GradScaler
    step: Callable[[Batch], tuple[Tensor, Losses]]


def prepare(config: Config, device: torch.device, console: Console, *, initial_weights: bool = True) -> Training:
    """Encoders, queue, branch, optimiser and the step on `device`; a run that goes on needs no initial weights."""
    torch.manual_seed(config.run.seed)
    torch.backends.cudnn.benchmark = True  # every batch has one shape
    backbone, channels = build_backbone(
        config.model.backbone,
        config.model.last_stage,
        stem_maxpool=config.released.stem_maxpool,
        image_size=config.data.image_size,
    )
    missing = load_initial_weights(backbone, config.model) if initial_weights else []
    if missing:
        names = ", ".join(sorted(missing))
        console.print(f"{len(missing)} weights stay random: {names}", highlight=False, soft_wrap=True)
    moco = MoCo(backbone, channels, embedding_dim=config.moco.embedding_dim, queue_size=config.moco.queue_size)
    branch = build_branch(channels, config.rationale, config.released, config.run.kernels)
    model = nn.ModuleDict({"moco": moco, **({"branch": branch} if branch else {})})
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=torch.tensor(config.optim.lr, device=device),  # a tensor, so that a CUDA graph sees it change
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    for parameter in optimizer.param_groups[0]["params"]:
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
    step: Callable[[Batch], tuple[Tensor, Losses]] = partial(
        train_step,
        moco,
        pick_loss_function(config, branch),
        optimizer,
        fit_weight=config.rationale.fit_weight,
        key_momentum=config.moco.key_momentum,
        autocast=torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        scaler=scaler,
        accumulate=config.optim.accumulate,
    )
    return Training(moco, branch, model, optimizer, scaler, Replayed(step) if config.run.cuda_graph else step)


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the encoders are compiled."""
    return config.run.compile is True or (config.run.compile == "auto" and device.type == "cuda")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What `--run.precision` means on `device`."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return DTYPES[precision]


def check_device(config: Config, device: torch.device) -> None:
    """`UsageError` for what the settings ask of a device that cannot do it."""
    for flag in ("cuda_graph", "overlap_keys"):
        if getattr(config.run, flag) and device.type != "cuda":
            raise UsageError(f"--run.{flag} needs CUDA, and this run is on {device}")
    try:
        use_triton(config.run.kernels, {"features": torch.empty(0, device=device)})
    except ValueError as error:
        raise UsageError(f"--run.kernels {config.run.kernels}: {error}") from None


def pick_loss_function(config: Config, branch: Branch | None) -> LossFunction:
    """The method's losses, or the released code's."""
    temperature = config.moco.temperature
    if isinstance(branch, ReleasedBranch):
        return partial(released_losses, branch=branch, temperature=temperature)
    return partial(contrast_losses, branch=branch, temperature=temperature, impl=config.run.kernels)
