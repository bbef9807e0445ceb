"""`fastcr embed RUN|WEIGHTS FOLDER`: embeddings of every image of a folder, in files; or of what has changed since.

Images that are embedded already, in the index that is there or by a killed command, are not embedded again
(`output/embeddings.py`). In several processes: `torchrun --nproc-per-node N -m fastcr.embed ...`; the batches are the
same however many there are, so on the CPU the files are the same bytes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcr.arguments import EmbedConfig, read_arguments
from fastcr.data.crop_loader import BATCH_SIZE, in_batches, load_crops
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.encoders.named import open_encoder
from fastcr.errors import UsageError
from fastcr.measures.poolings import key_of, pooled
from fastcr.output.embeddings import PARTIAL, Image, check_foreign, read_known, save_part, write_index
from fastcr.runs.command_line import called, one_line_errors
from fastcr.runs.context import Context
from fastcr.runs.distributed import processes_of_torchrun
from fastcr.runs.folder import only_writer

PART_SECONDS = 5.0  # work that a kill may cost


def list_images(root: Path) -> tuple[list[ImageList], list[Image]]:
    """The splits of `root`, training images first; and what the table says of each image."""
    base, splits = root if root.is_dir() else root.parent, read_splits(root)
    named = {"train": splits.train, "test": splits.test} if splits.test else {"": splits.train}
    found = list[Image]()
    for split, images in named.items():
        prefix = os.path.relpath(images.root, base)
        for index, file in enumerate(images.files):
            label = images.classes[images.labels[index]] if images.labels else ""
            try:
                stamp = images.stamp(index)
            except OSError:
                stamp = "missing"
            found.append(Image(file if prefix == "." else os.path.join(prefix, file), split, label, stamp))
    return list(named.values()), found


def batches_of(parts: Sequence[ImageList], places: Sequence[int]) -> list[list[int]]:
    """The images at these places among those of all `parts`, in batches; none is of two parts.

    The attention of the authors' released branch depends on its batch.
    """
    splits = [range(*ends) for ends in pairwise([0, *accumulate(map(len, parts))])]
    inside = [[place for place in places if place in split] for split in splits]
    return [batch for split in inside for batch in in_batches(split)]


@torch.inference_mode()
def embed_folder(config: EmbedConfig, context: Context) -> None:
    """Write the embeddings of every image under `config.folder`, or bring the index in `config.out` up to date.

    Images that cannot be read are named, counted and left out. `UsageError` for files that cannot be used, or where
    `config.out` holds embeddings that were made otherwise.
    """
    processes, tuned, size = context.processes, config.run.tuned, config.data.image_size
    encoder, weights, sha256 = open_encoder(config.source, context.device, tuned, size)
    pooling = key_of(config.pooling, encoder)
    options = [name for name in ("centre", "whiten", "expand") if getattr(config, name)]
    wanted = [pooling] if config.pooling or options else sorted({"mean", pooling})
    made = ["pooling " + " and ".join(wanted), *options, f"tuned {encoder.facts.get('tuned', 1.0)}"]
    made += [str(context.dtype).removeprefix("torch."), f"{encoder.image_size} px", f"{BATCH_SIZE} images a batch"]
    key = {"weights": sha256, "settings": ", ".join(made)}
    base = config.folder if config.folder.is_dir() else config.folder.parent
    out = config.out or Path(f"{config.folder.resolve().name}-embeddings")
    with ExitStack() as held, encoder.evaluating():

        def begin() -> tuple[list[ImageList], list[Image], list[list[int]]]:
            check_foreign(out)
            (out / PARTIAL).mkdir(parents=True, exist_ok=True)
            held.enter_context(only_writer(out / PARTIAL))
            known, (parts, images) = read_known(out, key), list_images(config.folder)
            if encoder.facts["attention"] == "batch-minmax":  # an embedding depends on its batch
                known = {}
            todo = [at for at, image in enumerate(images) if (image.path, image.stamp) not in known]
            if len(todo) < len(images):
                context.say(f"{len(images) - len(todo):,} of {len(images):,} images are embedded already")
            return parts, images, batches_of(parts, todo)

        parts, images, batches = processes.once(begin)
        began, batches = time.monotonic(), batches[processes.rank :: processes.ranks]
        saved, embedded, looked_at, rows = began, 0, list[Any](), defaultdict[str, list[Tensor]](list)
        crops = load_crops(parts, batches, encoder.image_size, context)
        shown = context.progress(crops, "embedding", len(batches))
        for number, (pixels, sizes, readable) in enumerate(shown, start=1):
            batch = batches[number - 1]
            if readable:
                named = [images[batch[place]].path for place in readable]
                features, token = encoder.of_crops(pixels.to(context.device, non_blocking=True), context.dtype, named)
                for name in wanted:
                    rows[name].append(pooled(features, encoder, name, token=token).cpu())
            shape = dict(zip(readable, sizes.flip(1).tolist(), strict=True))  # sizes are height and width
            looked_at += [(images[at].path, images[at].stamp, *shape.get(i, (0, 0))) for i, at in enumerate(batch)]
            embedded += len(readable)
            if number == len(batches) or time.monotonic() - saved >= PART_SECONDS:
                file = out / PARTIAL / f"{time.time_ns()}-{processes.rank}.safetensors"
                save_part(file, key, looked_at, {name: torch.cat(each) for name, each in rows.items()})
                saved, looked_at = time.monotonic(), []
                rows.clear()
        embedded = sum(processes.gather(embedded))
        facts = encoder.facts | {
            "weights": weights,  # for `fastcr search`
            "weights_sha256": key["weights"],
            "root": os.path.abspath(base),  # of the images' paths
            "settings": key["settings"],
            "pooling": pooling,
        }

        def finish() -> None:
            known = read_known(out, key)
            whole = [image for image in images if known[image.path, image.stamp].width]
            for image in sorted({*images} - {*whole}):
                context.say(f"unreadable image {os.path.join(base, image.path)!r}: left out")
            if whole:
                write_index(out, known, whole, wanted, facts, options)
            shutil.rmtree(out / PARTIAL)
            if not whole:
                raise UsageError(f"none of the {len(images)} images under {config.folder} can be read")
            gone = {path for (path, _), place in known.items() if place.source == out} - {image.path for image in whole}
            said = [f"{len(whole):,} images embedded"]
            said += [f"{embedded:,} of them now"] * (embedded < len(whole)) + [f"{len(gone):,} gone"] * bool(gone)
            said += [f"{len(images) - len(whole):,} unreadable left out"] * (len(whole) < len(images))
            speed = f" ({embedded / (time.monotonic() - began):,.0f} images/s)" if embedded else ""
            context.say(", ".join(said) + speed)
            context.say(f"embeddings: {out}")

        processes.once(finish)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr embed`."""
    with one_line_errors("embed"), processes_of_torchrun(called("embed")) as processes:
        config: EmbedConfig = processes.once(partial(read_arguments, "embed", args))
        context = Context.of(config.run.device, config.run.precision, config.data.workers, processes=processes)
        embed_folder(config, context)


if __name__ == "__main__":
    main()
