"""Features of a kept backbone, made once and read from memory: head and branch then train without it."""

from __future__ import annotations

from collections.abc import Generator
from itertools import count

import torch
from rich.console import Console
from torch import Tensor

from fastcr.config import Config
from fastcr.data.views import Batch, Views, step_indices
from fastcr.errors import UsageError
from fastcr.method.moco import MoCo
from fastcr.runs.log import progress
from fastcr.runs.machine import free_memory

GIB = 2**30


class CachedFeatures:
    """Batches of features in place of views: epoch e has those of pair e mod N of each image.

    `views` must give every image in each epoch (`EachImage`); `moco` takes batches of features from now on.
    """

    def __init__(self, views: Views, moco: MoCo, config: Config, autocast: torch.autocast, console: Console) -> None:
        """Encode `--optim.cached_views` pairs of all images; `UsageError` where memory has no room for them."""
        self.images, self.bad, self.config, images = views.images, views.bad, config, len(views.images)
        pairs, batch_size = config.optim.cached_views, config.optim.batch_size
        steps, batches = -(-images // batch_size), views.batches(0)
        with torch.no_grad():
            first = next(batches)
            features = moco.features(first.first, autocast)
            self.device, self.dtype = features.device, features.dtype
            shape = pairs, 2, images, *features.permute(0, 2, 3, 1).shape[1:]  # channels last
            half = torch.float16 if self.dtype == torch.float32 else self.dtype
            size, free = torch.Size(shape).numel() * half.itemsize, free_memory()
            takes = f"--optim.cached_views {pairs}: the features take {size / GIB:.2f} GiB of memory"
            if size > free:
                raise UsageError(f"{takes}, and {free / GIB:.2f} are free")
            console.print(takes, highlight=False)
            self.features = torch.empty(shape, dtype=half)
            ahead = (first if step == 0 else next(batches) for step in range(pairs * steps))
            for step, batch in enumerate(progress(ahead, "features of the views", pairs * steps, console)):
                assert batch.images is not None
                made = moco.features(batch.first, autocast), moco.key_features(batch.second, autocast)
                for view, maps in enumerate(made):
                    self.features[step // steps, view, batch.images.cpu()] = maps.permute(0, 2, 3, 1).to("cpu", half)
        moco.cached = True

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        for step in count(start_step):
            epoch, indices = step_indices(len(self.images), self.config.optim.batch_size, self.config.run.seed, step)
            pair, chosen = self.features[epoch % len(self.features)], torch.from_numpy(indices)
            first, second = map(self._ready, pair[:, chosen])
            yield Batch(first, second, chosen.to(self.device))

    def _ready(self, features: Tensor) -> Tensor:
        return features.to(self.device, self.dtype).permute(0, 3, 1, 2)
