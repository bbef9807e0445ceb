"""Whether training goes well, without labels: what a sample of images says of the encoder, and warnings."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from fastcr.data.crop_loader import in_batches, load_crops
from fastcr.data.images import ImageList
from fastcr.data.views import normalise
from fastcr.encoders.encoder import Encoder, load
from fastcr.method.ddt import evenly
from fastcr.method.start import SAMPLE
from fastcr.runs.context import Context

NEIGHBOURS = 10


def effective_rank(embeddings: Tensor) -> float:
    """How many dimensions embeddings `[N,C]` use: RankMe (arXiv 2210.02885), 1 to min(N, C).

    exp(entropy) of the singular values' shares of their sum; NaN if an embedding is not finite.
    """
    if not embeddings.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(embeddings.double())
    shares = values / values.sum().clamp(min=1e-30)
    return torch.special.entr(shares).sum().exp().item()


def nearest(embeddings: Tensor, count: int) -> Tensor:
    """Indices `[N,count]` of each row's nearest other rows, by the dot product of unit rows `[N,C]`."""
    return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).topk(count, dim=1).indices


def kept_neighbours(before: Tensor, after: Tensor) -> float:
    """Share of the neighbours `before [N,k]` that are among those `after [N,k]`, 0 to 1; about k/N by chance."""
    if not before.numel():  # a single image has none to lose
        return 1.0
    return (before[:, :, None] == after[:, None, :]).any(2).double().mean().item()


class EncoderHealth:
    """Effective rank of an encoder's mean embeddings, and how many nearest neighbours of its start it has kept."""

    def __init__(self, images: ImageList, before: Path | Tensor, image_size: int, context: Context) -> None:
        """Take the sample evenly from `images`, cropped to `image_size` pixels.

        `before` holds the sample's embeddings before training, as `method.start.begin` gives them, or is the file of
        the weights to make them with. `UsageError` if none of the sample can be read.
        """
        self.context = context
        crops = load_crops([images], in_batches(evenly(len(images), SAMPLE)), image_size, Context())
        self.crops = [pixels for pixels, _, readable in crops if readable]
        if not self.crops:
            raise images.none_readable()
        embeddings = before if isinstance(before, Tensor) else self._embed(load(before).to(context.device))
        self.count = min(NEIGHBOURS, len(embeddings) - 1)
        self.first_rank, self.before = effective_rank(embeddings), nearest(embeddings, self.count)

    @torch.inference_mode()
    def _embed(self, encoder: Encoder) -> Tensor:
        with encoder.evaluating():
            pixels = (normalise(each.to(self.context.device), torch.float32) for each in self.crops)
            return torch.cat([encoder.both(each, self.context.dtype).mean for each in pixels]).cpu()

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """`effective_rank`, and `kept_neighbours` of the start, 0 to 1."""
        with torch.compiler.set_stance("force_eager"):  # not worth compiling for eval mode and another batch size
            embeddings = self._embed(encoder)
        kept = kept_neighbours(self.before, nearest(embeddings, self.count))
        return {"effective_rank": effective_rank(embeddings), "kept_neighbours": kept}


class HealthWarnings:
    """Warns, once each, of what makes further training pointless."""

    def __init__(self, context: Context, first_rank: float = 0.0) -> None:
        """`first_rank` is the effective rank of the initial embeddings; 0 where it is not known."""
        self.context, self.first_rank, self.said = context, first_rank, set[str]()

    def look(self, record: dict[str, float], positions: int) -> None:
        """Print what is wrong with the metrics of a step; attention maps have `positions` cells."""
        entropy = record.get("attention_entropy", 0.5 * math.log(positions)) / max(math.log(positions), 1e-9)
        warnings = {
            "the embeddings have collapsed: all images get nearly the same": record["embedding_spread"] < 0.1,
            "the attention has collapsed to a single position": positions > 1 and entropy < 0.1,
            "the attention is the same everywhere: it pools as the mean does": positions > 1 and entropy > 0.9999,
            "the embeddings use less than half of the dimensions they used at the start: this training forgets": (
                record.get("effective_rank", self.first_rank) < self.first_rank / 2
            ),
        }
        for warning in [text for text, holds in warnings.items() if holds and text not in self.said]:
            self.said.add(warning)
            self.context.say(f"warning: {warning}")
