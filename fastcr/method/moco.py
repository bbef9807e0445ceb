"""MoCo v2: a query encoder, a key encoder that follows it, and a queue of keys (arXiv 1911.05722, 2003.04297)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastcr.kernels.info_nce import info_nce
from fastcr.kernels.launch import Impl
from fastcr.runs.distributed import ALONE, Processes


def projection_head(channels: int, embedding_dim: int) -> nn.Sequential:
    """Two-layer head of MoCo v2: `[B,channels]` to `[B,embedding_dim]`."""
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, embedding_dim))


def mean_pool(features: Tensor) -> Tensor:
    """Features `[B,C,H,W]` to `[B,C]` in fp32, so that GradCAM's gradient is fp32 under autocast too."""
    return features.mean((2, 3), dtype=torch.float32)


class MoCo(nn.Module):
    """Query encoder (`backbone`, `head`), EMA key encoder and the queue of keys `[N,D]`, N 0 for none."""

    queue: Tensor
    queue_position: Tensor

    def __init__(self, backbone: nn.Module, channels: int, *, embedding_dim: int, queue_size: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, projection_head(channels, embedding_dim)
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.key_stream: torch.cuda.Stream | None = None  # on which keys are encoded in parallel with the queries
        self.processes: Processes = ALONE  # that share the queue
        self.shuffle = False  # the images of keys among them
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, embedding_dim), dim=1))
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))

    def query(self, pooled: Tensor) -> Tensor:
        """Pooled features `[B,C]` to unit queries `[B,D]`."""
        return F.normalize(self.head(pooled), dim=1)

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
            with autocast:
                features = self.key_backbone(images)
            key = F.normalize(self.key_head(mean_pool(features)), dim=1)
            if self.processes.ranks > 1:
                key = self.processes.gather_keys(key, shuffled=self.shuffle)
        if self.key_stream:
            key.record_stream(torch.cuda.current_stream())
        return key

    def own(self, keys: Tensor) -> Tensor:
        """The keys `[B,D]` of this process's own images, out of those of all processes."""
        return keys.chunk(self.processes.ranks)[self.processes.rank]

    def contrast(self, query: Tensor, keys: Tensor, temperature: float, impl: Impl = "auto") -> Tensor:
        """InfoNCE `[B]`, nats, of unit queries `[B,D]`; the positive of each is the key of the same image.

        The negatives are the queue's keys; without a queue the other ones of `keys`.
        """
        if len(self.queue):
            return info_nce(query, self.own(keys), self.queue, temperature=temperature, impl=impl)
        own = torch.arange(len(query), device=query.device) + len(query) * self.processes.rank
        return F.cross_entropy(query @ keys.T / temperature, own, reduction="none")

    def wait_for_keys(self) -> None:
        """Let what the device does next wait for the keys."""
        if self.key_stream:
            torch.cuda.current_stream().wait_stream(self.key_stream)

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """`key = momentum * key + (1 - momentum) * query`, for every parameter (BatchNorm keeps its own statistics)."""
        keys: list[Tensor] = [*self.key_backbone.parameters(), *self.key_head.parameters()]
        queries: list[Tensor] = [*self.backbone.parameters(), *self.head.parameters()]
        with record_function("EMA"):
            torch._foreach_lerp_(keys, queries, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys; any batch size, written on the device without waiting for it."""
        if not (size := len(self.queue)):
            return
        skipped = max(len(keys) - size, 0)  # a batch beyond the queue leaves only its last keys
        with record_function("queue"):
            slots = torch.arange(skipped, len(keys), device=keys.device) + self.queue_position
            self.queue.index_copy_(0, slots % size, keys[skipped:].to(self.queue.dtype))
            self.queue_position.add_(len(keys)).remainder_(size)
