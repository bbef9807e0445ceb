"""`fastcr search EMBEDDINGS IMAGE...`: the images of an embedded folder that are most similar to others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from fastcr.arguments import SearchConfig, read_arguments
from fastcr.data.crop_loader import BATCH_SIZE
from fastcr.data.crops import enough
from fastcr.data.images import ImageList
from fastcr.encoders.encoder import Encoder, find_weights, load
from fastcr.encoders.hub import address_of
from fastcr.errors import UsageError
from fastcr.measures.poolings import SHOWN, pooled
from fastcr.output.gallery import QUALITY, SIDE, data_uri
from fastcr.output.nearest import Neighbour, Stored, read_stored
from fastcr.output.overlays import Tile, as_evaluated, contact_sheet, overlay
from fastcr.output.pages import check_out, render
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context
from fastcr.visualize import list_images

GENERATOR = "fastcr.search"  # in whatever file it writes, so that nothing else is overwritten
DRAWN, DRAWN_NEAR = 100, 20  # queries, and neighbours of each, that are drawn; the table has all
Shown = tuple[Image.Image, Tensor | None]  # a picture as the encoder sees it, and its attention [h,w]


def encoder_of(stored: Stored, named: Path | None, device: torch.device) -> Encoder:
    """The encoder that made the embeddings. `UsageError` if it is gone or another one."""
    source = named or Path(stored.facts["weights"])
    if not source.exists() and not address_of(source):
        raise UsageError(f"the encoder of these embeddings, {source}, is gone: --encoder says where it is now")
    weights = find_weights(source)
    if hashlib.sha256(weights.read_bytes()).hexdigest() != stored.facts["weights_sha256"]:
        raise UsageError(
            f"{weights} is not the encoder that made these embeddings: name that one with --encoder, or embed anew"
        )
    return load(weights, device)


def encode(
    pictures: Sequence[Image.Image], encoder: Encoder, stored: Stored, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """Unit embeddings `[N,C]` of crops, pooled as the stored ones, and the attention `[h,w]` of each, on the CPU."""
    device = next(encoder.parameters()).device
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])
    vectors, maps = list[Tensor](), list[Tensor | None]()
    for part in pixels.split(BATCH_SIZE):
        features, _ = encoder.of_crops(part.to(device), dtype)
        vectors.append(pooled(features, encoder, stored.pooling, stored.mean).cpu())
        attention = encoder.pooled(features).attention
        maps += [None] * len(part) if attention is None else attention.cpu().unbind()
    return torch.cat(vectors), maps


def read_crops(images: Sequence[tuple[ImageList, int]], size: int) -> tuple[dict[str, Image.Image], list[str]]:
    """Images as the encoder sees them by their paths; and why the others cannot be read."""
    found, reasons = dict[str, Image.Image](), list[str]()

    def read(source: ImageList, index: int) -> None:
        try:
            found[source.path(index)] = as_evaluated(source.rgb(index, enough(size)), size)
        except OSError as error:
            reasons.append(str(error))

    for source, index in images:
        read(source, index)
    return found, reasons


def table_of(query: str, near: Sequence[Neighbour]) -> Table:
    """The nearest images of one."""
    table = Table(title=query, title_justify="left")
    table.add_column("", justify="right")
    table.add_column("similarity", justify="right")
    table.add_column("label", overflow="fold")
    table.add_column("path", overflow="fold")
    for rank, each in enumerate(near, start=1):
        table.add_row(str(rank), f"{each.similarity:.4f}", each.label, each.path)
    return table


def drawn(
    stored: Stored, near: Sequence[Sequence[Neighbour]], encoder: Encoder, dtype: torch.dtype
) -> dict[str, Shown]:
    """The pictures of neighbours by their paths below the root, but for those that are not there any more."""
    paths = tuple(dict.fromkeys(each.path for found in near for each in found))
    listed = ImageList(Path(stored.facts["root"]), paths, None, ())
    crops, _ = read_crops([(listed, index) for index in range(len(paths))], encoder.image_size)
    maps = encode(list(crops.values()), encoder, stored, dtype)[1] if crops else []
    shown = dict(zip(crops, zip(crops.values(), maps, strict=True), strict=True))
    return {path: shown[name] for i, path in enumerate(paths) if (name := listed.path(i)) in shown}


def tile(caption: str, shown: Shown) -> Tile:
    """A picture, and its attention over it."""
    picture = shown[0].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return Tile(caption, [picture] if shown[1] is None else [picture, overlay(picture, shown[1])])


def save(out: Path, rows: Sequence[tuple[str, Sequence[Tile]]], stored: Stored, encoder: Encoder) -> None:
    """Write the sheet or the page."""
    if out.suffix.lower() != ".html":
        sheet = contact_sheet(rows)
        write_whole(out, lambda file: sheet.save(file, "JPEG", quality=QUALITY, comment=GENERATOR))
        return
    uris = [(name, [(each.caption, list(map(data_uri, each.images))) for each in tiles]) for name, tiles in rows]
    facts = {
        "total": f"{len(stored.rows):,}",
        "encoder": os.path.join(*Path(stored.facts["weights"]).parts[-2:]),
        "embedding": SHOWN.get(stored.pooling, stored.pooling) + ", mean subtracted" * (stored.mean is not None),
        "attention": encoder.branch is not None,
    }
    page = render("search.html.jinja", {}, rows=uris, **facts)
    write_whole(out, lambda file: file.write_text(page, encoding="utf-8"))


@torch.inference_mode()
def search(config: SearchConfig, context: Context) -> None:
    """Print the nearest images of each, and draw them; `UsageError` for embeddings or images that cannot be used."""
    if not config.images:
        raise UsageError("name an IMAGE to search for, or a folder of them")
    if config.out.suffix.lower() not in (".html", ".jpg", ".jpeg"):
        raise UsageError(f"--out {config.out} must end in .html or .jpg")
    check_out(config.out, GENERATOR)
    images, stored, dtype = list_images(config.images), read_stored(config.embeddings), context.dtype
    encoder = encoder_of(stored, config.encoder, context.device)
    rows, missing, asked = list[tuple[str, list[Tile]]](), set[str](), 0
    with encoder.evaluating():
        # in parts, so that a folder's pictures are never in memory all at once
        for first in range(0, len(images), BATCH_SIZE):
            queries, reasons = read_crops(images[first : first + BATCH_SIZE], encoder.image_size)
            for reason in reasons:
                context.say(f"left out: {reason}")
            if not queries:
                continue
            vectors, maps = encode(list(queries.values()), encoder, stored, dtype)
            found = stored.nearest(vectors, config.k)
            for path, near in zip(queries, found, strict=True):
                context.console.print(table_of(path, near), highlight=False)
            wanted = [near[:DRAWN_NEAR] for near in found[: max(DRAWN - asked, 0)]]
            pictures = drawn(stored, wanted, encoder, dtype)
            for (path, crop), map_, near in zip(queries.items(), maps, wanted, strict=False):
                missing |= {each.path for each in near} - pictures.keys()
                tiles = [
                    tile(f"{each.similarity:.3f} {each.label} {os.path.basename(each.path)}", pictures[each.path])
                    for each in near
                    if each.path in pictures
                ]
                rows.append((path, [tile("query", (crop, map_)), *tiles]))
            asked += len(queries)
    if not rows:
        raise UsageError(f"none of the {len(images)} images can be read")
    save(config.out, rows, stored, encoder)
    if missing:
        where = f"under {stored.facts['root']}, so they are not drawn"
        context.say(f"{len(missing):,} of the nearest images are no longer {where}")
    if asked > DRAWN:
        context.say(f"drawn are the first {DRAWN} of {asked:,} images")
    context.say(config.out)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr search`."""
    with one_line_errors("search"):
        config: SearchConfig = read_arguments("search", args)
        search(config, Context.of(config.run.device, config.run.precision))


if __name__ == "__main__":
    main()
