"""`fastcr embed RUN|WEIGHTS FOLDER`: embeddings of every image of a folder, in files.

A killed command resumes where it was when it is given again (`embedding_files.py`). The batches are the same whatever
happens, so on the CPU the files are the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from fastcr.arguments import EmbedConfig, read_arguments
from fastcr.data.crop_loader import BATCH_SIZE, load_crops
from fastcr.data.crops import centres_of
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.encoders.encoder import Encoder, find_weights, load
from fastcr.errors import UsageError
from fastcr.measures.poolings import key_of, pooled
from fastcr.output.embedding_files import UNREADABLE, Partial, check_unused
from fastcr.output.embedding_formats import extra_of
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context

Crops = tuple[Tensor, Tensor, list[int]]  # pixels and sizes (height, width) of the readable images, and their places
Encoded = tuple[dict[str, Tensor], Tensor, list[int], torch.cuda.Event | None]  # arrays in place of pixels


def list_images(root: Path) -> tuple[list[ImageList], list[tuple[str, str, str]], str]:
    """The splits of `root`, training images first; path, split and label of each image; and a digest of all that.

    The digest changes when an image comes, goes, changes, or gets another label.
    """
    base, splits = root if root.is_dir() else root.parent, read_splits(root)
    named = [("train", splits.train), ("test", splits.test)] if splits.test else [("", splits.train)]
    parts, rows, digest = list[ImageList](), list[tuple[str, str, str]](), hashlib.blake2b(digest_size=16)
    for split, images in named:
        assert images is not None
        parts.append(images)
        prefix = os.path.relpath(images.root, base)
        for index, file in enumerate(images.files):
            label = "" if images.labels is None else images.classes[images.labels[index]]
            rows.append((file if prefix == "." else os.path.join(prefix, file), split, label))
            try:
                stamp = images.stamp(index)
            except OSError:
                stamp = "missing"
            digest.update("\0".join((stamp, *rows[-1], "")).encode(errors="surrogateescape"))
    return parts, rows, digest.hexdigest()


def encode(
    batches: Iterable[Crops], encoder: Encoder, dtype: torch.dtype, *, pooling: str | None, attention: bool
) -> Iterator[Encoded]:
    """The arrays of each batch on the CPU, by the names of their files; on CUDA they are there after the event.

    Without a `pooling` these are the mean and, of an encoder with a branch, the attention's embedding. "peak" `[B,2]`
    is the centre of the position that is attended most, fractions of the square; NaN without a branch.
    """
    device = next(encoder.parameters()).device
    for pixels, sizes, readable in batches:
        arrays: dict[str, Tensor] = {}
        if readable:
            features, _ = encoder.of_crops(pixels.to(device, non_blocking=True), dtype)
            mean, rationale, maps = encoder.pooled(features)
            named = {"mean": mean, "rationale": rationale}
            if pooling:
                named = {pooling: pooled(features, encoder, pooling)}
            centres = centres_of(*features.shape[2:]).float().to(device)
            named["peak"] = (
                torch.full_like(mean[:, :2], torch.nan) if maps is None else centres[maps.flatten(1).argmax(1)]
            )
            if attention and maps is not None:
                named["attention"] = maps.half()
            arrays = {name: array.to("cpu", non_blocking=True) for name, array in named.items() if array is not None}
        fetched = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        yield arrays, sizes, readable, fetched


@torch.inference_mode()
def embed_folder(config: EmbedConfig, context: Context) -> None:
    """Write the embeddings of every image under `config.folder`; resumes what a killed job left.

    Images that cannot be read are named, counted and left out. `UsageError` for files that cannot be used, a finished
    `config.out`, or one begun with other weights or images.
    """
    weights = find_weights(config.source)
    if config.format == "faiss" and config.attention:
        raise UsageError("--format faiss holds one vector an image: --attention needs another --format")
    extra_of(config.format)
    out = config.out or Path(f"{config.folder.resolve().name}-embeddings")
    check_unused(out)
    encoder = load(weights, context.device)
    if config.attention and encoder.branch is None:
        raise UsageError(f"{weights} has no branch for the attention, so there is no --attention to write")
    pooling = key_of(config.pooling, encoder)
    parts, rows, digest = list_images(config.folder)
    base = config.folder if config.folder.is_dir() else config.folder.parent
    wanted: dict[str, Any] = {"attention": config.attention, "pooling": None}
    if config.pooling or config.centre:
        wanted["pooling"] = pooling
    key = {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "images": digest,
        "settings": f"{wanted}, centre {bool(config.centre)}, {context.dtype}, {BATCH_SIZE} images a batch",
    }
    # the batches of the evaluation, none of two splits: the released branch's attention depends on the whole batch
    ends, size = [0, *accumulate(map(len, parts))], encoder.image_size
    starts = [start for part in pairwise(ends) for start in range(*part, BATCH_SIZE)] + [len(rows)]
    blank = torch.zeros(1, size, size, 3, dtype=torch.uint8), torch.zeros(1, 2), [0]
    like = next(encode([blank], encoder, context.dtype, **wanted))[0]  # for the kinds and shapes of the arrays
    job = Partial(out / "partial", key, like, starts)
    began, first = time.monotonic(), job.rows
    if job.images:
        context.say(f"resuming after {job.images:,} of {len(rows):,} images")
    batches = [list(range(*batch)) for batch in pairwise(starts) if batch[0] >= job.images]
    crops = load_crops(parts, batches, size, context)
    with encoder.evaluating():
        fill(job, parts, batches, encode(crops, encoder, context.dtype, **wanted), context)
    if not job.rows:
        job.remove()
        raise UsageError(f"none of the {len(rows)} images under {config.folder} can be read")
    facts = encoder.facts | {
        "weights": os.path.abspath(weights),  # for `fastcr search`
        "weights_sha256": key["weights"],
        "root": os.path.abspath(base),  # of the images' paths
        "settings": key["settings"],
        "pooling": pooling,
    }
    job.finish(out, config.format, facts, rows, centre=bool(config.centre))
    speed = (job.rows - first) / (time.monotonic() - began)
    left_out = f", {len(rows) - job.rows:,} unreadable left out" if job.rows < len(rows) else ""
    context.say(f"{job.rows:,} images embedded{left_out} ({speed:,.0f} images/s)")
    context.say(f"embeddings: {out}")


def fill(
    job: Partial, parts: list[ImageList], batches: list[list[int]], found: Iterable[Encoded], context: Context
) -> None:
    """Add what was `found` of each batch to the job, and name the images that cannot be read."""
    ends = [0, *accumulate(map(len, parts))]
    with Progress(console=context.console, transient=True, disable=not context.console.is_terminal) as bar:
        task = bar.add_task("embedding", total=ends[-1], completed=job.images)
        # in pairs, so that the next batch is at work while this one is fetched and written
        for batch, (ready, _) in zip(batches, pairwise(chain(found, [None])), strict=True):
            assert ready is not None
            arrays, sizes, readable, fetched = ready
            if fetched:
                fetched.synchronize()
            for image in sorted(set(batch) - {batch[place] for place in readable}):
                part = bisect_right(ends, image) - 1
                path = parts[part].path(image - ends[part])
                context.say(f"unreadable image {path!r}: left out")
            all_sizes = torch.full((len(batch), 2), UNREADABLE)
            all_sizes[readable] = sizes
            job.add(arrays, all_sizes)
            bar.advance(task, len(batch))
    job.commit()


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr embed`."""
    with one_line_errors("embed"):
        config: EmbedConfig = read_arguments("embed", args)
        embed_folder(config, Context.of(config.run.device, config.run.precision, config.data.workers))


if __name__ == "__main__":
    main()
