"""`python -m fastcr.embed RUN|WEIGHTS FOLDER`: embeddings of every image of a root, in files.

A command that was killed goes on where it was when it is given again (`embedding_files.py`). The batches are the same
whatever happens, so on the CPU the files are the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from fastcr.config import DeviceConfig, WorkersConfig, tyro
from fastcr.data.images import ImageList, Splits
from fastcr.data.layouts import read_splits
from fastcr.data.views import normalise
from fastcr.errors import UsageError
from fastcr.measures.embedding_files import Format, Partial, check_unused, put_in_place
from fastcr.measures.embeddings import BATCH_SIZE, load_crops
from fastcr.method.encoder import Encoder, find_weights, load
from fastcr.runs.command_line import called, one_line_errors, parse
from fastcr.runs.machine import pick_device, pick_workers


class Part(NamedTuple):
    """The images of a split."""

    split: str  # train or test; empty where nothing is set aside
    images: ImageList
    prefix: str  # leads from the root to the images' own folder
    before: int  # images of the splits before it

    def row(self, index: int) -> tuple[str, str, str]:
        """Path, split and label of image `index` for the table."""
        label = "" if self.images.labels is None else self.images.classes[self.images.labels[index]]
        return os.path.join(self.prefix, self.images.files[index]), self.split, label


def list_parts(root: Path, splits: Splits) -> list[Part]:
    """The splits of `root`, training images first."""
    base = root if root.is_dir() else root.parent
    named = [("train", splits.train), ("test", splits.test)] if splits.test else [("", splits.train)]
    parts, before = [], 0
    for split, images in named:
        assert images is not None
        prefix = os.path.relpath(images.root, base)
        parts.append(Part(split, images, "" if prefix == "." else prefix, before))
        before += len(images)
    return parts


def list_batches(parts: Sequence[Part]) -> list[tuple[Part, range]]:
    """Images of each batch: those of evaluation, since the released branch's attention depends on the whole batch."""
    size = BATCH_SIZE
    return [
        (part, range(start, min(start + size, len(part.images))))
        for part in parts
        for start in range(0, len(part.images), size)
    ]


def fingerprint(parts: Sequence[Part]) -> str:
    """Changes when an image comes, goes, changes, or gets another label."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        for index in range(len(part.images)):
            try:
                stamp = part.images.stamp(index)
            except OSError:
                stamp = "missing"
            digest.update("\0".join((stamp, *part.row(index), "")).encode(errors="surrogateescape"))
    return digest.hexdigest()


Encoded = tuple[dict[str, Tensor], Tensor, list[int]]  # arrays, sizes (height, width), places in the batch


def encoded(
    batches: Iterable[tuple[Tensor, Tensor, list[int]]],
    encoder: Encoder,
    *,
    attention: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Encoded]:
    """The arrays of each batch on the CPU. On CUDA each is fetched while the next is at work."""
    waiting: tuple[Encoded, torch.cuda.Event | None] | None = None
    for pixels, sizes, readable in batches:
        arrays = {}
        if readable:
            images = normalise(pixels.to(device, non_blocking=True), torch.float32)
            mean, rationale, maps = encoder.both(images, dtype)
            arrays = {"mean": mean} | ({} if rationale is None else {"rationale": rationale})
            if attention and maps is not None:
                arrays["attention"] = maps.half()
            arrays = {name: array.to("cpu", non_blocking=True) for name, array in arrays.items()}
        fetched = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        if waiting:
            yield _arrived(*waiting)
        waiting = (arrays, sizes, readable), fetched
    if waiting:
        yield _arrived(*waiting)


def _arrived(batch: Encoded, fetched: torch.cuda.Event | None) -> Encoded:
    if fetched:
        fetched.synchronize()
    return batch


@torch.inference_mode()
def embed_folder(
    weights: Path,
    root: Path,
    folder: Path,
    *,
    format: Format,
    attention: bool,
    device: torch.device,
    workers: int,
    console: Console,
) -> None:
    """Write the embeddings of every image under `root` into `folder`; takes up what a killed run left there.

    Images that cannot be read are named, counted and left out.
    Raises `UsageError` for files that cannot be used, a finished `folder`, or one begun with other weights or images.
    """
    check_unused(folder)
    encoder = load(weights, device)
    if attention and encoder.branch is None:
        raise UsageError(f"{weights} has no rationale branch, so there is no --attention to write")
    parts = list_parts(root, read_splits(root))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    key = {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "images": fingerprint(parts),
        "settings": f"--attention {attention}, {dtype}, {BATCH_SIZE} images a batch",
    }
    partial, total = Partial(folder / "partial", key), sum(len(part.images) for part in parts)
    state, began, first = partial.state, time.monotonic(), partial.state.rows
    if state.batches:
        console.print(f"going on after {state.rows + state.unreadable:,} of {total:,} images", highlight=False)
    batches = list_batches(parts)[state.batches :]
    loader = load_crops(
        [part.images for part in parts],
        [[part.before + index for index in indices] for part, indices in batches],
        image_size=encoder.image_size,
        workers=workers,
        pin=device.type == "cuda",
    )
    found = encoded(loader, encoder, attention=attention, device=device, dtype=dtype)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with encoder.evaluating(), bar:
        task = bar.add_task("embedding", total=total, completed=state.rows + state.unreadable)
        for (part, indices), (arrays, sizes, readable) in zip(batches, found, strict=True):
            for place in sorted(set(range(len(indices))) - set(readable)):
                path = part.images.path(indices[place])
                console.print(f"unreadable image {path!r}: left out", soft_wrap=True, highlight=False)
            known = zip(readable, sizes.tolist(), strict=True)
            rows = [(*part.row(indices[place]), width, height) for place, (height, width) in known]
            partial.add(arrays, rows, len(indices) - len(rows))
            bar.advance(task, len(indices))
    partial.commit()
    if not state.rows:
        partial.remove()
        raise UsageError(f"none of the {total} images under {root} can be read")
    put_in_place(
        partial, folder, format, encoder.facts | {"weights_sha256": key["weights"], "settings": key["settings"]}
    )
    partial.remove()
    speed = (state.rows - first) / (time.monotonic() - began)
    left_out = f", {state.unreadable:,} unreadable left out" if state.unreadable else ""
    console.print(f"{state.rows:,} images embedded{left_out} ({speed:,.0f} images/s)", highlight=False)
    console.print(f"embeddings: {folder}", soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class EmbedConfig:
    """What to embed, and into which files."""

    source: tyro.conf.Positional[Path]
    """A run folder, or one of fastcr's weights files."""
    folder: tyro.conf.Positional[Path]
    """The images: whatever --data.root of the training takes. Training and test images alike are embedded."""
    out: Path | None = None
    """Folder to write. Default: <name of the images' folder>-embeddings."""
    format: Format = "safetensors"
    """embeddings.safetensors, or a .npy file an array (for numpy.load with mmap_mode)."""
    attention: bool = False
    """Also write the attention maps, fp16."""
    data: WorkersConfig = field(default_factory=WorkersConfig)
    run: DeviceConfig = field(default_factory=DeviceConfig)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `python -m fastcr.embed`."""
    with one_line_errors("embed"):
        config = parse(
            EmbedConfig,
            sys.argv[1:] if args is None else args,
            prog=called("embed"),
            description="Embeddings of every image of a folder, in files.",
        )
        embed_folder(
            find_weights(config.source),
            config.folder,
            config.out or Path(f"{config.folder.resolve().name}-embeddings"),
            format=config.format,
            attention=config.attention,
            device=pick_device(config.run.device),
            workers=pick_workers(config.data.workers),
            console=Console(markup=False),
        )
