"""`fastcr embed RUN|WEIGHTS FOLDER`: embeddings of every image of a folder, in files.

A killed command resumes where it was when it is given again (`output/embeddings.py`). The batches are the same whatever
happens, so on the CPU the files are the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from fastcr.arguments import EmbedConfig, read_arguments
from fastcr.data.crop_loader import BATCH_SIZE, load_crops
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.encoders.named import open_encoder
from fastcr.errors import UsageError
from fastcr.measures.poolings import key_of, pooled
from fastcr.output.embeddings import IMAGES, PARTIAL, Job, check_unused
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context
from fastcr.runs.folder import only_writer


def list_images(root: Path) -> tuple[list[ImageList], list[tuple[str, str, str]], str]:
    """The splits of `root`, training images first; path, split and label of each image; and a digest of all that.

    The digest changes when an image comes, goes, changes, or gets another label.
    """
    base, splits = root if root.is_dir() else root.parent, read_splits(root)
    named = {"train": splits.train, "test": splits.test} if splits.test else {"": splits.train}
    rows, digest = list[tuple[str, str, str]](), hashlib.blake2b(digest_size=16)
    for split, images in named.items():
        prefix = os.path.relpath(images.root, base)
        for index, file in enumerate(images.files):
            label = images.classes[images.labels[index]] if images.labels else ""
            rows.append((file if prefix == "." else os.path.join(prefix, file), split, label))
            try:
                stamp = images.stamp(index)
            except OSError:
                stamp = "missing"
            digest.update("\0".join((stamp, *rows[-1], "")).encode(errors="surrogateescape"))
    return list(named.values()), rows, digest.hexdigest()


def batches_of(parts: Sequence[ImageList], done: int) -> list[list[int]]:
    """The batches of the images after the first `done` ones, by their places among all.

    They are those of the evaluation, and none is of two splits: the released branch's attention depends on its batch.
    """
    splits = [range(*ends) for ends in pairwise([0, *accumulate(map(len, parts))])]
    every = [list(split[at : at + BATCH_SIZE]) for split in splits for at in range(0, len(split), BATCH_SIZE)]
    return [batch for batch in every if batch[0] >= done]


@torch.inference_mode()
def embed_folder(config: EmbedConfig, context: Context) -> None:
    """Write the embeddings of every image under `config.folder`; resumes what a killed job left.

    Images that cannot be read are named, counted and left out. `UsageError` for files that cannot be used, a finished
    `config.out`, or one begun with other weights or images.
    """
    out = config.out or Path(f"{config.folder.resolve().name}-embeddings")
    check_unused(out)
    tuned, size = config.run.tuned, config.data.image_size
    encoder, weights, sha256 = open_encoder(config.source, context.device, tuned, size)
    pooling = key_of(config.pooling, encoder)
    wanted = [pooling] if config.pooling or config.centre else sorted({"mean", pooling})
    parts, rows, digest = list_images(config.folder)
    base = config.folder if config.folder.is_dir() else config.folder.parent
    settings = f"pooling {wanted}, centre {bool(config.centre)}, {context.dtype}"
    settings += f", tuned {encoder.facts.get('tuned', 1.0)}, {encoder.image_size} px"
    key = {
        "weights": sha256,
        "images": digest,
        "settings": f"{settings}, {BATCH_SIZE} images a batch",
    }
    partial = out / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    with only_writer(partial), encoder.evaluating():
        job = Job(partial, key)
        began, first = time.monotonic(), job.rows
        if job.images:
            context.say(f"resuming after {job.images:,} of {len(rows):,} images")
        batches = batches_of(parts, job.images)
        crops = load_crops(parts, batches, encoder.image_size, context)
        shown = context.progress(crops, "embedding", len(batches))
        for batch, (pixels, sizes, readable) in zip(batches, shown, strict=True):
            for image in sorted(set(batch) - {batch[place] for place in readable}):
                context.say(f"unreadable image {os.path.join(base, rows[image][0])!r}: left out")
            arrays = dict[str, Tensor]()
            if readable:
                named = [rows[batch[place]][0] for place in readable]
                features, token = encoder.of_crops(pixels.to(context.device, non_blocking=True), context.dtype, named)
                arrays = {each: pooled(features, encoder, each, token=token).cpu() for each in wanted}
                numbers = torch.tensor(batch)[readable]
                arrays[IMAGES] = torch.cat([numbers[:, None], sizes.flip(1)], 1)  # sizes are height and width
            job.add(len(batch), arrays)
        if not job.rows:
            shutil.rmtree(partial)
            raise UsageError(f"none of the {len(rows)} images under {config.folder} can be read")
        facts = encoder.facts | {
            "weights": weights,  # for `fastcr search`
            "weights_sha256": key["weights"],
            "root": os.path.abspath(base),  # of the images' paths
            "settings": key["settings"],
            "pooling": pooling,
        }
        job.finish(out, rows, facts, centre=bool(config.centre))
    speed = (job.rows - first) / (time.monotonic() - began)
    left_out = f", {len(rows) - job.rows:,} unreadable left out" if job.rows < len(rows) else ""
    context.say(f"{job.rows:,} images embedded{left_out} ({speed:,.0f} images/s)")
    context.say(f"embeddings: {out}")


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr embed`."""
    with one_line_errors("embed"):
        config: EmbedConfig = read_arguments("embed", args)
        embed_folder(config, Context.of(config.run.device, config.run.precision, config.data.workers))


if __name__ == "__main__":
    main()
