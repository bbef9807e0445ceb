"""A query encoder, a key encoder that follows it, and a queue of keys: what MoCo v2 trains, and its kin.

Momentum contrast is arXiv 1911.05722 and 2003.04297; `objectives/` has what the query is trained to be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastcr.config import MocoConfig
from fastcr.data.views import Batch
from fastcr.method.objectives.byol import byol_head
from fastcr.method.objectives.contract import Keys
from fastcr.runs.distributed import ALONE, Processes

EMBEDDING_DIM = 256  # of queries and keys, as in MoCo v2


def projection_head(channels: int, config: MocoConfig) -> nn.Sequential:
    """`[B,channels]` to `[B,embedding_dim]`: MoCo v2's two layers, BYOL's, or one that keeps all angles it can."""
    dim = config.embedding_dim or EMBEDDING_DIM
    if config.objective == "byol":
        return byol_head(channels, dim)
    if config.head == "mlp":
        return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))
    linear = nn.Linear(channels, config.embedding_dim or channels, bias=False)
    nn.init.orthogonal_(linear.weight)
    return nn.Sequential(linear)


def mean_pool(features: Tensor) -> Tensor:
    """Features `[B,C,H,W]` to their mean `[B,C]` in fp32, so that GradCAM's gradient is fp32 under autocast too.

    Their gradient is channels-last and in their dtype: expanded in fp32, written once in 16 bits.
    """
    # the division comes last: before it, the backward pass would write the gradients of all positions in fp32
    return features.permute(0, 2, 3, 1).sum((1, 2), dtype=torch.float32) / (features.shape[2] * features.shape[3])


class MoCo(nn.Module):
    """Query encoder (`backbone`, `head`, BYOL's `predictor`), EMA key encoder, queue of keys `[N,D]`, N 0 for none."""

    queue: Tensor
    queue_images: Tensor  # [N]: the index of the image that each key is of; -1: unknown
    queue_position: Tensor

    def __init__(self, backbone: nn.Module, channels: int, config: MocoConfig) -> None:
        super().__init__()
        self.backbone, self.head = backbone, projection_head(channels, config)
        dim, byol = list(self.head.parameters())[-1].shape[0], config.objective == "byol"
        self.predictor = byol_head(dim, dim) if byol else None
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        pairs = zip(self.key_backbone.parameters(), self.backbone.parameters(), strict=True)
        self.trained = [(key, query) for key, query in pairs if query.requires_grad]  # of the backbones
        self.cached = False  # whether batches hold features in place of views
        self.held: bool | None = None  # whether the backbone is, and
        self.alone = False  # whether it encodes both views: see `hold`
        self.key_stream: torch.cuda.Stream | None = None  # on which keys are encoded in parallel with the queries
        self.processes: Processes = ALONE  # that share the queue
        self.pool: Callable[[Tensor], Tensor] = mean_pool  # features [B,C,h,w] to what the head gets
        self.gradients: AbstractContextManager[Any] = nullcontext()  # in which the backbone's forward pass is recorded
        self.shuffle = False  # the images of keys among them
        self.register_buffer("queue", F.normalize(torch.randn(0 if byol else config.queue_size, dim), dim=1))
        self.register_buffer("queue_images", torch.full((len(self.queue),), -1))
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))

    def hold(self, held: bool) -> None:
        """Keep the query's backbone as it is from now on, without gradients, or train it.

        While it stays, and is the same as the key's, it encodes both views, in one pass on CUDA; but for BatchNorm in
        training mode, whose statistics are those of a view.
        """
        for _, query in self.trained:
            query.requires_grad_(not held)
        stays = held or not self.trained
        norms = [each for each in self.backbone.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        ours, theirs = (each.state_dict() for each in (self.backbone, self.key_backbone))
        same = stays and not any(norm.training for norm in norms)
        self.held, self.alone = held, same and all(torch.equal(ours[name], theirs[name]) for name in ours)

    def encode(self, batch: Batch, autocast: torch.autocast) -> tuple[Tensor, Tensor]:
        """The query's features `[B,C,h,w]` of the first views, and the unit keys `[B*ranks,D]` of the second ones."""
        if self.cached:
            return batch.first, self._key_of(batch.second)
        if self.alone:
            with record_function("both forward"), torch.no_grad(), autocast:
                if batch.first.is_cuda:
                    features, others = self.backbone(torch.cat([batch.first, batch.second])).chunk(2)
                else:  # twice as many images at once leave a CPU's caches
                    features, others = self.backbone(batch.first), self.backbone(batch.second)
            return features, self._key_of(others)
        key = self.key(batch.second, autocast)
        features = self.features(batch.first, autocast)
        self.wait_for_keys()
        return features, key

    def features(self, images: Tensor, autocast: torch.autocast) -> Tensor:
        """Images `[B,3,H,W]` to the query encoder's features `[B,C,h,w]`, made under `autocast`."""
        with record_function("query forward"), autocast, self.gradients:
            return self.backbone(images)

    def project(self, pooled: Tensor) -> Tensor:
        """Pooled features `[B,C]` to queries `[B,D]` before they are normalised."""
        projected = self.head(pooled)
        return self.predictor(projected) if self.predictor else projected

    def query(self, pooled: Tensor) -> Tensor:
        """Pooled features `[B,C]` to unit queries `[B,D]`."""
        return F.normalize(self.project(pooled), dim=1)

    @torch.no_grad()
    def key(self, images: Tensor, autocast: torch.autocast) -> Tensor:
        """Images `[B,3,H,W]` to unit keys `[B*ranks,D]`; the encoder runs under `autocast`, the head in fp32.

        They are those of all processes, in the order of the images: `own` picks this one's. With a `key_stream` they
        are there only after `wait_for_keys`.
        """
        if self.key_stream:
            self.key_stream.wait_stream(torch.cuda.current_stream())
        with record_function("key forward"), torch.cuda.stream(self.key_stream):
            if self.shuffle:
                images = self.processes.shuffle(images)
            key = self._key_of(self.key_features(images, autocast))
        if self.key_stream:
            key.record_stream(torch.cuda.current_stream())
        return key

    def key_features(self, images: Tensor, autocast: torch.autocast) -> Tensor:
        """Images `[B,3,H,W]` to the key encoder's features `[B,C,h,w]`."""
        with autocast:
            return images if self.cached else self.key_backbone(images)

    @torch.no_grad()
    def _key_of(self, features: Tensor) -> Tensor:
        """Features `[B,C,h,w]` to the unit keys `[B*ranks,D]` of all processes."""
        key = F.normalize(self.key_head(self.pool(features)), dim=1)
        return self.processes.gather_keys(key, shuffled=self.shuffle) if self.processes.ranks > 1 else key

    def keys(self, key: Tensor, images: Tensor | None = None) -> Keys:
        """What a batch of queries, of `images` `[B]`, is compared with; `key` `[B*ranks,D]` are of all processes."""
        rank, own = self.processes.rank, key.chunk(self.processes.ranks)
        queue_images = None if images is None else self.queue_images
        return Keys(own[rank], key, self.queue, rank * len(own[rank]), images, queue_images)

    def wait_for_keys(self) -> None:
        """Let what the device does next wait for the keys."""
        if self.key_stream:
            torch.cuda.current_stream().wait_stream(self.key_stream)

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """`key = momentum * key + (1 - momentum) * query`, for every parameter that is trained.

        BatchNorm keeps its own statistics.
        """
        heads = zip(self.key_head.parameters(), self.head.parameters(), strict=True)
        moving: list[tuple[Tensor, Tensor]] = [*([] if self.alone else self.trained), *heads]
        keys, queries = zip(*moving, strict=True)
        with record_function("EMA"):
            torch._foreach_lerp_(keys, queries, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, images: Sequence[Tensor | None] = ()) -> None:
        """Replace the oldest keys; any batch size, written on the device without waiting for it.

        `keys` `[B*ranks,D]` are those of all processes; `images` are the indices of this one's, in the parts in which
        the keys were made.
        """
        if not (size := len(self.queue)):
            return
        skipped = max(len(keys) - size, 0)  # a batch beyond the queue leaves only its last keys
        with record_function("queue"):
            slots = (torch.arange(skipped, len(keys), device=keys.device) + self.queue_position) % size
            self.queue.index_copy_(0, slots, keys[skipped:].to(self.queue.dtype))
            self.queue_images.index_copy_(0, slots, self._everyones(images, len(keys))[skipped:])
            self.queue_position.add_(len(keys)).remainder_(size)

    def _everyones(self, images: Sequence[Tensor | None], count: int) -> Tensor:
        """The indices `[count]` of the images of all processes' keys; -1 where they are not known."""
        known = [part for part in images if part is not None]
        if not known:
            return self.queue_images.new_full((count,), -1)
        if self.processes.ranks > 1:
            known = [self.processes.gather_keys(part[:, None], shuffled=False)[:, 0] for part in known]
        return torch.cat(known)
