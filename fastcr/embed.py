"""Weights files to encoders, images to embeddings: both kinds, from one pass.

`python -m fastcr.embed RUN|WEIGHTS FOLDER` writes those of a folder to files (`embed_folder.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

from fastcr.config import ModelConfig, RationaleConfig, ReleasedConfig, UsageError
from fastcr.distributed import ALONE, Processes
from fastcr.folders import ImageList
from fastcr.machine import leave_signals
from fastcr.moco import mean_pool
from fastcr.rationale import RationaleHead
from fastcr.released import ReleasedBranch
from fastcr.views import MEAN, STD, normalise

Branch = RationaleHead | ReleasedBranch
BATCH_SIZE = 128


class Embeddings(NamedTuple):
    """Unit embeddings of the images that could be read, on the CPU."""

    mean: Tensor  # [N,C] fp32
    rationale: Tensor | None  # [N,C] fp32; None without a branch
    attention: Tensor | None  # [N,S] fp32
    sizes: Tensor  # [N,2] height and width of the pictures, pixels
    kept: Tensor  # [N] indices into the image list
    unreadable: list[str]  # files left out


def weights_facts(
    model: ModelConfig, rationale: RationaleConfig, released: ReleasedConfig, image_size: int
) -> dict[str, Any]:
    """What a weights file says of itself (its metadata key `fastcr`)."""
    return {
        "backbone": model.backbone,
        "last_stage": model.last_stage,
        "stem_maxpool": released.stem_maxpool,
        "detectors": rationale.detectors if rationale.enabled else 0,
        "temperature": rationale.temperature,
        "attention": "batch-minmax" if released.enabled else "softmax",
        "image_size": image_size,
        "mean": MEAN,
        "std": STD,
    }


def weights_of(backbone: nn.Module, branch: Branch | None) -> dict[str, Tensor]:
    """State dict of a weights file: `backbone.*` and `branch.*`, its batch normalisation multiplied in."""
    own = branch.folded_state() if isinstance(branch, RationaleHead) else branch.state_dict() if branch else {}
    return backbone.state_dict(prefix="backbone.") | {f"branch.{name}": value for name, value in own.items()}


def build_branch(
    channels: int, rationale: RationaleConfig, released: ReleasedConfig, impl: Any = "auto"
) -> Branch | None:
    """The branch a configuration asks for; None for plain MoCo."""
    if not rationale.enabled:
        return None
    if released.enabled:
        return ReleasedBranch(channels, rationale, released)
    return RationaleHead(channels, rationale, impl)


def load_encoder(path: Path, device: torch.device) -> tuple[nn.Module, Branch | None, dict[str, Any]]:
    """Encoder, branch and facts of one of fastcr's weights files or of the authors' released checkpoints.

    `UsageError` if it is neither.
    """
    from fastcr.encoder import load  # which builds on the functions here

    encoder = load(path, device)
    return encoder.backbone, encoder.branch, encoder.facts


def find_weights(source: Path) -> Path:
    """The weights file that `RUN|WEIGHTS` means: that of a run folder, or itself. `UsageError` if there is neither."""
    if not source.exists():
        raise UsageError(f"no run folder or weights file {source}")
    weights = source / "weights.safetensors" if source.is_dir() else source
    if not weights.exists():
        raise UsageError(f"{source} is not a run folder, or its run has saved nothing yet: no {weights.name} in it")
    return weights


def crop_pixels(picture: Image.Image, size: int) -> Tensor:
    """What evaluation sees of an RGB picture, uint8 `[size,size,3]`.

    The shorter side becomes `round(size*8/7)`, then the central square is cut.
    """
    crop = TF.resize(TF.pil_to_tensor(picture), [round(size * 8 / 7)], antialias=True)
    return TF.center_crop(crop, [size, size]).permute(1, 2, 0)


Crop = tuple[Tensor, tuple[int, int]]


class _TestImages(Dataset[Crop | None]):
    """Index to the centre crop, uint8 `[S,S,3]`, and the picture's (height, width); None for an unreadable image."""

    def __init__(self, images: ImageList, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> Crop | None:
        try:
            picture = self.images.rgb(index)
        except OSError:
            return None
        return crop_pixels(picture, self.size), (picture.height, picture.width)

    def __len__(self) -> int:
        return len(self.images)


def collate(crops: list[Crop | None]) -> tuple[Tensor, Tensor, list[int]]:
    """The readable crops in one tensor (one shared file a batch, not one an image), their sizes, their places."""
    readable = [i for i, crop in enumerate(crops) if crop is not None]
    found = [crop for crop in crops if crop is not None]
    pixels = torch.stack([crop for crop, _ in found]) if found else torch.empty(0)
    return pixels, torch.tensor([size for _, size in found], dtype=torch.int64).view(-1, 2), readable


def load_crops(
    parts: Sequence[ImageList], batches: Sequence[list[int]], *, image_size: int, workers: int, pin: bool
) -> DataLoader[Any]:
    """What `collate` gives of each batch, decoded by `workers` processes; the indices count through `parts`."""
    dataset: ConcatDataset[Crop | None] = ConcatDataset([_TestImages(images, image_size) for images in parts])
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=leave_signals,
    )


def encode(
    backbone: nn.Module, branch: Branch | None, images: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Images `[B,3,H,W]` to unit embeddings `[B,C]`, mean and rationale, and attention `[B,S]`, all fp32.

    The encoder runs in `dtype` (autocast). Without a branch the last two are None.
    """
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        features = backbone(images)
    mean = F.normalize(mean_pool(features), dim=1)
    if branch is None:
        return mean, None, None
    pooled, attention = branch.pool(features)
    return mean, F.normalize(pooled, dim=1), attention


@contextmanager
def evaluating(backbone: nn.Module, branch: Branch | None) -> Iterator[None]:
    """Encoder and branch in eval mode, put back as they were after."""
    modules = nn.ModuleList([backbone] + ([branch] if branch else []))
    training = {module: module.training for module in modules.modules()}  # frozen parts are in eval mode always
    modules.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.inference_mode()
def embed(
    backbone: nn.Module,
    branch: Branch | None,
    images: ImageList,
    *,
    image_size: int,
    device: torch.device,
    workers: int,
    console: Console,
    title: str,
    processes: Processes = ALONE,
) -> Embeddings:
    """Both embeddings and the attention of each image from one pass, encoder and branch in eval mode.

    Several processes share the batches, which are the same however many there are; the first one gets everything, the
    others their own share.
    """
    numbers = range(processes.rank, -(-len(images) // BATCH_SIZE), processes.ranks)
    batches = [list(range(number * BATCH_SIZE, min((number + 1) * BATCH_SIZE, len(images)))) for number in numbers]
    loader = load_crops([images], batches, image_size=image_size, workers=workers, pin=device.type == "cuda")
    # filled in place: the embeddings of 100,000 images are too large to be held twice
    filled: list[Tensor] = []
    sizes, kept = [torch.empty(0, 2, dtype=torch.int64)], list[int]()
    with evaluating(backbone, branch):
        for number, (pixels, sizes_here, readable) in enumerate(
            track(loader, f"embedding, {title}", console=console, transient=True, disable=not console.is_terminal)
        ):
            sizes.append(sizes_here)
            kept += [batches[number][i] for i in readable]
            if not readable:
                continue
            found = [
                each
                for each in encode(backbone, branch, normalise(pixels.to(device), torch.float32))
                if each is not None
            ]
            filled = filled or [torch.empty(sum(map(len, batches)), each.shape[1]) for each in found]
            for all_of_it, part in zip(filled, found, strict=True):
                all_of_it[len(kept) - len(readable) : len(kept)] = part
    if not processes.most(len(kept))[0]:
        raise UsageError(f"none of the {len(images)} images under {images.root} can be read")
    shares = processes.gather(kept) or [kept]
    # where the rows of each share go, once they are in the order of the images
    places = torch.tensor([i for share in shares for i in share]).argsort().argsort().split([*map(len, shares)])

    def together(rows: Tensor) -> Tensor:
        parts = processes.gather_rows(rows) or [rows]
        if len(parts) == 1:
            return rows
        whole = rows.new_empty(sum(map(len, parts)), max(part.shape[1] for part in parts))
        for part, where in zip(parts, places, strict=True):
            if len(part):
                whole[where] = part
        return whole

    columns = [together(each[: len(kept)]) for each in filled or [torch.empty(0, 0)] * (3 if branch else 1)]
    rationale, attention = columns[1:] if branch else (None, None)
    found_all = sorted(i for share in shares for i in share)
    unreadable = [images.path(i) for i in sorted(set(range(len(images))) - set(found_all))]
    return Embeddings(columns[0], rationale, attention, together(torch.cat(sizes)), torch.tensor(found_all), unreadable)


if __name__ == "__main__":
    from fastcr.embed_folder import main

    main()
