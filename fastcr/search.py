"""`fastcr search EMBEDDINGS IMAGE...`: the images of an embedded folder that are most similar to others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from fastcr.arguments import SearchConfig, read_arguments
from fastcr.data.crop_loader import BATCH_SIZE
from fastcr.data.images import ImageList
from fastcr.encoders.encoder import Encoder, find_weights, load
from fastcr.encoders.hub import address_of
from fastcr.errors import UsageError
from fastcr.measures.poolings import SHOWN
from fastcr.output.gallery import SIDE, encode, list_images, read_pictures, tile
from fastcr.output.nearest import Neighbour, Stored, read_stored
from fastcr.output.sheets import Section, Tile, check_out, write_sheet
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context

DRAWN, DRAWN_NEAR = 100, 20  # queries, and neighbours of each, that are drawn; the table has all


def encoder_of(stored: Stored, named: Path | None, device: torch.device) -> Encoder:
    """The encoder that made the embeddings. `UsageError` if it is gone or another one."""
    source = named or Path(stored.facts["weights"])
    if not source.exists() and not address_of(source):
        raise UsageError(f"the encoder of these embeddings, {source}, is gone: --encoder says where it is now")
    weights = find_weights(source)
    if hashlib.sha256(weights.read_bytes()).hexdigest() != stored.facts["weights_sha256"]:
        raise UsageError(f"{weights} is not the encoder that made these embeddings: --encoder says where that one is")
    return load(weights, device)


def table_of(query: str, near: Sequence[Neighbour]) -> Table:
    """The nearest images of one."""
    table = Table(title=query, title_justify="left")
    for number in ("", "similarity"):
        table.add_column(number, justify="right")
    for text in ("label", "path"):
        table.add_column(text, overflow="fold")
    for rank, each in enumerate(near, start=1):
        table.add_row(str(rank), f"{each.similarity:.4f}", each.label, each.path)
    return table


def tiles_of(
    stored: Stored, near: Sequence[Sequence[Neighbour]], encoder: Encoder, context: Context
) -> dict[Neighbour, Tile]:
    """Each neighbour beside its attention, but for those whose files are not there any more."""
    every = list(dict.fromkeys(each for found in near for each in found))
    paths = tuple(dict.fromkeys(each.path for each in every))
    listed = ImageList(Path(stored.facts["root"]), paths, None, ())
    pictures, _ = read_pictures([(listed, index) for index in range(len(paths))], encoder.image_size)
    if not pictures:
        return {}
    maps = dict(zip(pictures, encode(list(pictures.values()), encoder, context)[1], strict=True))
    names = {each: name for each in every if (name := os.path.join(listed.root, each.path)) in pictures}
    captions = {each: f"{each.similarity:.3f} {each.label} {os.path.basename(each.path)}" for each in names}
    return {each: tile(captions[each], pictures[name].crop, maps[name], SIDE) for each, name in names.items()}


@torch.inference_mode()
def search(config: SearchConfig, context: Context) -> None:
    """Print the nearest images of each, and draw them; `UsageError` for embeddings or images that cannot be used."""
    if not config.images:
        raise UsageError("name an IMAGE to search for, or a folder of them")
    check_out(config.out)
    images, stored = list_images(config.images), read_stored(config.embeddings)
    encoder = encoder_of(stored, config.encoder, context.device)
    sections, missing, asked = list[Section](), set[str](), 0
    with encoder.evaluating():
        # in parts, so that a folder's pictures are never in memory all at once
        for first in range(0, len(images), BATCH_SIZE):
            queries, reasons = read_pictures(images[first : first + BATCH_SIZE], encoder.image_size)
            for reason in reasons:
                context.say(f"left out: {reason}")
            if not queries:
                continue
            vectors, maps = encode(list(queries.values()), encoder, context, stored.pooling, stored.mean)
            found = stored.nearest(vectors, config.k)
            for path, near in zip(queries, found, strict=True):
                context.console.print(table_of(path, near), highlight=False)
            wanted = [near[:DRAWN_NEAR] for near in found[: max(DRAWN - asked, 0)]]
            tiles = tiles_of(stored, wanted, encoder, context)
            for (path, query), attention, near in zip(queries.items(), maps, wanted, strict=False):
                missing |= {each.path for each in near if each not in tiles}
                shown = [tiles[each] for each in near if each in tiles]
                sections.append(Section(path, rows=[[tile("query", query.crop, attention, SIDE), *shown]]))
            asked += len(queries)
    if not sections:
        raise UsageError(f"none of the {len(images)} images can be read")
    write_sheet(config.out, f"Nearest of {len(stored.rows):,} images", [Section(text=said(stored, encoder)), *sections])
    if missing:
        where = f"under {stored.facts['root']}, so they are not drawn"
        context.say(f"{len(missing):,} of the nearest images are no longer {where}")
    if asked > DRAWN:
        context.say(f"drawn are the first {DRAWN} of {asked:,} images")
    context.say(config.out)


def said(stored: Stored, encoder: Encoder) -> str:
    """What a page says of its pictures."""
    name = os.path.join(*Path(stored.facts["weights"]).parts[-2:])
    pooling = SHOWN.get(stored.pooling, stored.pooling) + ", mean subtracted" * (stored.mean is not None)
    text = f"By the embeddings of {name} (pooling: {pooling}). Below each image are its cosine, its label and its file."
    if encoder.branch is None:
        return text
    return f"{text} The map beside it is warm where the attention is high, and is scaled to its own maximum."


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr search`."""
    with one_line_errors("search"):
        config: SearchConfig = read_arguments("search", args)
        search(config, Context.of(config.run.device, config.run.precision))


if __name__ == "__main__":
    main()
