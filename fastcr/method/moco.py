"""A query encoder, a key encoder that follows it, and a queue of keys: what MoCo v2 and its kin train.

Momentum contrast is arXiv 1911.05722 and 2003.04297; `objectives.py` says what the query is trained to be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastcr.config import MocoConfig
from fastcr.encoders.backbone import mean_pool
from fastcr.encoders.folding import FoldedConv2d
from fastcr.method.objectives import Keys
from fastcr.runs.distributed import ALONE, Processes

Pool = Callable[[Tensor], Tensor]  # features [B,C,h,w] to what the head gets, [B,C] fp32
EMBEDDING_DIM = 256  # of queries and keys of a head of two layers, as in MoCo v2


def projection_head(channels: int, config: MocoConfig) -> nn.Sequential:
    """`[B,channels]` to `[B,embedding_dim]`: MoCo v2's two layers, or one that begins as an orthogonal matrix."""
    if config.head == "mlp":
        hidden = nn.Linear(channels, channels)
        return nn.Sequential(hidden, nn.ReLU(), nn.Linear(channels, config.embedding_dim or EMBEDDING_DIM))
    linear = nn.Linear(channels, config.embedding_dim or channels, bias=False)
    nn.init.orthogonal_(linear.weight)
    return nn.Sequential(linear)


class MoCo(nn.Module):
    """Query encoder (`backbone`, `head`), key encoder (their moving average), and queue of keys `[N,D]`, N 0 for none.

    Args:
        backbone: images `[B,3,H,W]` to features `[B,C,h,w]`; parameters without gradients are never trained.
        channels: C.
        config: queue and head.
        dtype: of the queue, and of the queries and keys where they meet it; sums are fp32 in any case.
        processes: those that share a batch and the queue.
    """

    queue: Tensor
    queue_images: Tensor  # [N]: the index of the image that each key is of; -1: unknown
    queue_position: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        config: MocoConfig,
        *,
        dtype: torch.dtype = torch.float32,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.processes = backbone, projection_head(channels, config), processes
        # a backbone that is never trained encodes both views: its copy would always be the same
        self.key_backbone = backbone if is_frozen(backbone) else copy.deepcopy(backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        pairs = zip(self.key_backbone.parameters(), self.backbone.parameters(), strict=True)
        self.trained = [(key, query) for key, query in pairs if query.requires_grad]  # of the backbones
        dim = list(self.head.parameters())[-1].shape[0]
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, dim), dim=1).to(dtype))
        self.register_buffer("queue_images", torch.full((len(self.queue),), -1))
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))

    def query(self, pooled: Tensor) -> Tensor:
        """Pooled features `[B,C]` to unit queries `[B,D]`."""
        return F.normalize(self.head(pooled), dim=1)

    @torch.no_grad()
    def key(self, images: Tensor, autocast: torch.autocast, pool: Pool = mean_pool) -> Tensor:
        """Images `[B,3,H,W]` to the unit keys `[B*ranks,D]` of all processes; the encoder runs under `autocast`."""
        with record_function("key forward"):
            with autocast:
                features = self.key_backbone(images)
            return self.processes.gather_keys(self.embed_keys(pool(features)))

    def embed_keys(self, pooled: Tensor) -> Tensor:
        """Pooled features `[B,C]` to unit keys `[B,D]`."""
        return F.normalize(self.key_head(pooled), dim=1)

    def keys(self, key: Tensor, images: Tensor | None = None) -> Keys:
        """What a batch of queries, of `images` `[B]`, is compared with; `key` `[B*ranks,D]` are of all processes."""
        key = key.to(self.queue.dtype)
        rank, own = self.processes.rank, key.chunk(self.processes.ranks)
        queue_images = None if images is None else self.queue_images
        return Keys(own[rank], key, self.queue, rank * len(own[rank]), images, queue_images)

    def keep_frozen(self, dtype: torch.dtype) -> None:
        """Fold BatchNorm once where neither it nor its convolution is trained, in the `dtype` of the encoders.

        To be called when no other weights will be loaded any more.
        """
        for query, key in zip(self.backbone.modules(), self.key_backbone.modules(), strict=True):
            if isinstance(query, FoldedConv2d) and isinstance(key, FoldedConv2d):
                own = *query.parameters(), *query.norm.parameters()
                if not any(parameter.requires_grad for parameter in own):
                    query.keep(dtype)
                    key.keep(dtype)

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """`key = momentum * key + (1 - momentum) * query`, for every parameter that is trained.

        BatchNorm keeps its own statistics.
        """
        heads = zip(self.key_head.parameters(), self.head.parameters(), strict=True)
        keys, queries = zip(*self.trained, *heads, strict=True)
        with record_function("EMA"):
            torch._foreach_lerp_(keys, queries, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, images: Tensor | None = None) -> None:
        """Replace the oldest keys; any batch size, written on the device without waiting for it.

        `keys` `[B*ranks,D]` are those of all processes; `images` `[B]` are the indices of this one's.
        """
        if not (size := len(self.queue)):
            return
        skipped = max(len(keys) - size, 0)  # a batch beyond the queue leaves only its last keys
        with record_function("queue"):
            slots = (torch.arange(skipped, len(keys), device=keys.device) + self.queue_position) % size
            self.queue.index_copy_(0, slots, keys[skipped:].to(self.queue.dtype))
            if images is None:  # not known
                self.queue_images.index_fill_(0, slots, -1)
            else:
                everyones = self.processes.gather_keys(images[:, None])[:, 0]
                self.queue_images.index_copy_(0, slots, everyones[skipped:])
            self.queue_position.add_(len(keys)).remainder_(size)


def is_frozen(backbone: nn.Module) -> bool:
    """Whether training leaves a backbone as it is: no parameter has a gradient, no BatchNorm follows its batches."""
    norms = [each for each in backbone.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    return not any(each.requires_grad for each in backbone.parameters()) and not any(norm.training for norm in norms)
