"""The settings of a run, as frozen dataclasses.

Every flag is `--section.field value`; the text under a field is its `--help`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

try:
    import tyro
except ImportError:  # only the command line needs it
    tyro = None  # type: ignore[assignment]


class UsageError(Exception):
    """Something the user can put right; commands print it as one line and exit with status 2."""


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run is carried out."""

    dir: Path | None = None
    """Run folder. Default: runs/<preset>-<date>-<time>."""
    seed: int = 0
    """Seed of the weights, of the order of the images and of their augmentation."""
    steps: int | None = None
    """Stop after this many steps in all; the learning rate still follows --optim.epochs."""
    device: str = "auto"
    """auto (CUDA when there is one, else the CPU), cpu, cuda or cuda:N."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the fused ops; auto: triton on CUDA, torch elsewhere."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the encoders; auto: on CUDA only."""
    cuda_graph: bool = False
    """Replay the whole step as one CUDA graph: for steps so short that launching them takes longer."""
    overlap_keys: bool = False
    """Run the key encoder beside the query encoder, on a CUDA stream of its own."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Encoder arithmetic (autocast; fp16 with loss scaling); auto: bf16 on CUDA, fp32 on the CPU."""
    log_every: int = 10
    """Steps between two records in metrics.jsonl; the host waits for the device only then."""
    eval_every: int = 0
    """Epochs between two evaluations during training; 0: only at the end."""
    save_minutes: float = 5.0
    """Minutes between two saves of resume.pt; 0: after every step."""
    keep: int = 2
    """How many saves are kept: resume.pt, the one before as resume.1.pt, and so on."""


@dataclass(frozen=True)
class DataConfig:
    """The images and how they are loaded."""

    root: Path | None = None
    """Folder of images; see the README for the layouts. Default: the drawn synthetic set."""
    loader: Literal["auto", "dali", "torch", "fused"] = "auto"
    """fused: views cut from the cache by one kernel; auto: fused on CUDA, dali there without a cache, else torch."""
    cache: Literal["auto", "device", "host", "disk", "off"] = "auto"
    """Decode every image once and keep the pixels; auto: on the device or in memory, with ample room (not for dali)."""
    cache_side: int | None = None
    """Cached images are reduced to this shorter side, pixels, where it is longer. Default: twice --data.image_size."""
    cache_dir: Path | None = None
    """Folder of --data.cache disk. Default: fastcr in the user's cache folder."""
    image_size: int = 224
    """Side of the square views, pixels."""
    workers: int | None = None
    """Loader processes (torch) or threads (dali). Default: one per core."""
    on_corrupt: Literal["skip", "fail"] = "skip"
    """Unreadable images: skip (named, counted, the next image takes their place) or fail."""
    roi_decode: bool = False
    """DALI decodes of each image only what its two views show."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs that DALI gives to the GPU's own decoder, where it has one."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder."""

    backbone: str = "resnet50"
    """resnet18, 34, 50, 101 or 152 (torchvision), or timm:NAME, any of timm's that gives a map of features."""
    last_stage: Literal["layer3", "layer4"] = "layer4"
    """Last residual stage of a torchvision ResNet; what follows it is left out."""
    weights: str = "imagenet"
    """imagenet (torchvision's IMAGENET1K_V1, timm's default), none (random), or a .safetensors, .pt or .pth file."""
    allow_missing_weights: bool = False
    """Accept a weights file that does not fill the whole encoder; the rest stays random and is listed."""
    batchnorm: Literal["local", "sync", "frozen"] = "local"
    """Statistics of a process's own images, of all processes' (CUDA), or as loaded. Local shuffles images of keys."""


@dataclass(frozen=True)
class OptimConfig:
    """SGD with a cosine schedule."""

    epochs: int = 100
    """Passes over the training images; the learning rate reaches 0 at their end."""
    batch_size: int = 128
    """Images (pairs of views) a step; of several processes each takes its share."""
    accumulate: int = 1
    """Parts a batch is split into to save memory: gradients add up; BatchNorm and common channel weights see a part."""
    lr: float = 0.03
    """Learning rate at the start."""
    backbone_lr: float | None = None
    """That of the backbone, to protect good weights; 0, with --model.batchnorm frozen, keeps them. Default: lr."""
    backbone_warmup: float = 0.0
    """Epochs at the start in which the backbone is held, while head and branch learn."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 1e-4
    """SGD weight decay, on every parameter."""


@dataclass(frozen=True)
class MocoConfig:
    """Momentum contrast (MoCo v2)."""

    queue_size: int = 4096
    """Keys kept as negatives; more than there are images only adds stale keys of the same images. 0: the batch's."""
    temperature: float = 0.2
    """InfoNCE temperature."""
    key_momentum: float = 0.999
    """Key encoder = key_momentum * key encoder + (1 - key_momentum) * query encoder, each step."""
    embedding_dim: int = 256
    """Width of the query and the key."""


@dataclass(frozen=True)
class RationaleConfig:
    """The branch that learns where to look."""

    enabled: bool = True
    """False: plain MoCo v2."""
    fit_weight: float = 1.0
    """Weight of the fit loss (mean KL over the batch)."""
    detectors: int = 32
    """1x1 projections whose maximum is the attention logit, 1 to 128."""
    target: Literal["max-softmax", "sum", "uniform"] = "max-softmax"
    """GradCAM to distribution: softmax of GradCAM / its maximum, GradCAM / its sum, or, as a control, none of it."""
    cam_of: Literal["loss", "logit"] = "logit"
    """GradCAM of the contrast loss, or of the own key's logit: its product with the query before that is normalised."""
    cam_sign: Literal["score", "loss"] = "loss"
    """Keep places that lower the contrast loss, or raise the logit (score), or those that do the opposite (loss)."""
    cam_weights: Literal["own", "common"] = "common"
    """GradCAM's channel weights: each picture's gradient, or one set for the batch, made of all its GradCAMs."""
    temperature: float = 0.4
    """Temperature of the softmax over positions."""
    stop_gradient: bool = True
    """Keep the fit loss from changing the encoder."""
    batchnorm: bool = False
    """Batch normalisation of each detector's response, before the maximum; over a process's own images, always."""
    lr: float | None = None
    """Learning rate of the branch at the start. Default: --optim.lr."""
    pooled_contrast: float = 0.0
    """Weight of a second contrast loss: of the query pooled with the attention (a constant there), same keys."""


@dataclass(frozen=True)
class ReleasedConfig:
    """The variant of the authors' released code (fastcr/released.py).

    It replaces the rationale branch: of that section, only detectors, fit_weight and lr count.
    """

    enabled: bool = False
    """Train with the released branch and fit loss."""
    detach_target: bool = False
    """Keep the fit loss from flowing through the GradCAM."""
    fit_axis: Literal["rows", "all"] = "rows"
    """Softmax of the KL over the last spatial axis, tau 1 (MoCo), or over all positions, tau 0.4 (BYOL)."""
    stem_maxpool: bool = True
    """False: no max-pool in the stem, as in the released BYOL encoder."""


@dataclass(frozen=True)
class Config:
    """Every setting of a training run."""

    preset: tyro.conf.Suppress[str] = "synthetic"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    moco: MocoConfig = field(default_factory=MocoConfig)
    rationale: RationaleConfig = field(default_factory=RationaleConfig)
    released: ReleasedConfig = field(default_factory=ReleasedConfig)


def validate(config: Config) -> Config:
    """Return `config`, or raise `UsageError` naming the first flag whose value cannot work."""
    from fastcr.backbone import backbone_mistake  # which imports this module

    mistake = backbone_mistake(
        config.model.backbone, config.model.last_stage, stem_maxpool=config.released.stem_maxpool
    )
    checks = {
        str(mistake): mistake is None,
        "--data.image_size must be at least 32": config.data.image_size >= 32,
        "--data.cache_side must be at least --data.image_size": config.data.cache_side is None
        or config.data.cache_side >= config.data.image_size,
        "--data.hw_decoder_load must lie in [0, 1]": 0 <= config.data.hw_decoder_load <= 1,
        "--data.workers must be at least 0": config.data.workers is None or config.data.workers >= 0,
        "--optim.epochs must be at least 1": config.optim.epochs >= 1,
        "--optim.batch_size must be at least 2 (batch normalisation)": config.optim.batch_size >= 2,
        "--optim.accumulate must divide --optim.batch_size into parts of at least 2": 1
        <= config.optim.accumulate
        <= config.optim.batch_size // 2
        and config.optim.batch_size % config.optim.accumulate == 0,
        "--optim.accumulate: the released attention depends on the whole batch": not config.released.enabled
        or config.optim.accumulate == 1,
        "--optim.lr must be above 0 and finite": 0 < config.optim.lr < math.inf,
        "--optim.backbone_lr must be at least 0 and finite": config.optim.backbone_lr is None
        or 0 <= config.optim.backbone_lr < math.inf,
        "--optim.backbone_warmup must be at least 0 and finite": 0 <= config.optim.backbone_warmup < math.inf,
        "--optim.momentum must lie in [0, 1)": 0 <= config.optim.momentum < 1,
        "--optim.weight_decay must be at least 0 and finite": 0 <= config.optim.weight_decay < math.inf,
        "--run.seed must lie in 0..2**63-1": 0 <= config.run.seed < 2**63,
        "--run.save_minutes must be at least 0": config.run.save_minutes >= 0,
        "--run.keep must be at least 1": config.run.keep >= 1,
        "--run.steps must be at least 1": config.run.steps is None or config.run.steps >= 1,
        "--run.log_every must be at least 1": config.run.log_every >= 1,
        "--run.eval_every must be at least 0": config.run.eval_every >= 0,
        "--moco.queue_size must be at least 0": config.moco.queue_size >= 0,
        "--moco.temperature must be above 0 and finite": 0 < config.moco.temperature < math.inf,
        "--moco.key_momentum must lie in [0, 1]": 0 <= config.moco.key_momentum <= 1,
        "--moco.embedding_dim must be at least 1": config.moco.embedding_dim >= 1,
        "--rationale.detectors must lie in 1..128": 1 <= config.rationale.detectors <= 128,
        "--rationale.temperature must be above 0 and finite": 0 < config.rationale.temperature < math.inf,
        "--rationale.fit_weight must be at least 0 and finite": 0 <= config.rationale.fit_weight < math.inf,
        "--rationale.lr must be above 0 and finite": config.rationale.lr is None or 0 < config.rationale.lr < math.inf,
        "--rationale.pooled_contrast must be at least 0 and finite": 0 <= config.rationale.pooled_contrast < math.inf,
        "--released.enabled needs --rationale.enabled True": (config.rationale.enabled or not config.released.enabled),
    }
    for message, holds in checks.items():
        if not holds:
            raise UsageError(message)
    return config
