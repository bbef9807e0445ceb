"""`fastcr search EMBEDDINGS IMAGE...`: the images of an embedded folder that are most similar to others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from fastcr.arguments import SearchConfig, read_arguments
from fastcr.data.crop_loader import BATCH_SIZE
from fastcr.data.images import ImageList
from fastcr.encoders.encoder import Encoder
from fastcr.encoders.hub import address_of
from fastcr.encoders.named import is_name, open_encoder
from fastcr.errors import UsageError
from fastcr.measures.poolings import SHOWN
from fastcr.measures.reranking import expand
from fastcr.output.embeddings import Neighbour, Stored, read_stored
from fastcr.output.gallery import encode, list_images, read_pictures, tile
from fastcr.output.sheets import PAGE, Section, Tile, check_out, write_page
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context

DRAWN, DRAWN_NEAR = 100, 20  # queries, and neighbours of each, that are drawn; the table has all


def encoder_of(stored: Stored, named: Path | None, device: torch.device) -> Encoder:
    """The encoder that made the embeddings. `UsageError` if it is gone or another one."""
    source = named or Path(stored.facts["weights"])
    if not source.exists() and not address_of(source) and not is_name(source):
        raise UsageError(f"the encoder of these embeddings, {source}, is gone: --encoder says where it is now")
    facts = stored.facts
    encoder, weights, sha256 = open_encoder(source, device, facts.get("tuned"), facts.get("image_size"))
    if sha256 != stored.facts["weights_sha256"]:
        raise UsageError(f"{weights} is not the encoder that made these embeddings: --encoder says where that one is")
    return encoder


def table_of(near: Sequence[Neighbour]) -> Table:
    """The nearest images of one."""
    table = Table()
    for column in ("", "similarity", "label", "path"):
        table.add_column(column, justify="left" if column in ("label", "path") else "right")
    for rank, each in enumerate(near, start=1):
        table.add_row(str(rank), f"{each.similarity:.4f}", each.label, each.path)
    return table


def tiles_of(stored: Stored, near: Sequence[Neighbour], encoder: Encoder, context: Context) -> list[Tile]:
    """Each neighbour beside its attention, but for those whose files are not there any more."""
    listed = ImageList(Path(stored.facts["root"]), tuple(each.path for each in near), None, ())
    pictures, _ = read_pictures([(listed, index) for index in range(len(near))], encoder.image_size)
    if not pictures:
        return []
    maps = dict(zip(pictures, encode(list(pictures.values()), encoder, context)[1], strict=True))
    return [
        tile(f"{each.similarity:.3f} {each.label} {os.path.basename(path)}", pictures[path].crop, maps[path])
        for index, each in enumerate(near)
        if (path := listed.path(index)) in pictures
    ]


@torch.inference_mode()
def search(config: SearchConfig, context: Context) -> None:
    """Print the nearest images of each, and draw them; `UsageError` for embeddings or images that cannot be used."""
    if not config.images:
        raise UsageError("name an IMAGE to search for, or a folder of them")
    check_out(config.out, PAGE)
    images, stored = list_images(config.images), read_stored(config.embeddings)
    encoder = encoder_of(stored, config.encoder, context.device)
    pooling = stored.facts["pooling"]
    among = stored._replace(vectors=expand(stored.vectors)) if config.expand else stored
    sections, missing, asked = list[Section](), 0, 0
    with encoder.evaluating():
        # in parts, so that a folder's pictures are never in memory all at once
        for first in range(0, len(images), BATCH_SIZE):
            queries, reasons = read_pictures(images[first : first + BATCH_SIZE], encoder.image_size)
            for reason in reasons:
                context.say(f"left out: {reason}")
            if not queries:
                continue
            vectors, maps = encode(list(queries.values()), encoder, context, pooling, stored.mean)
            found = among.nearest(expand(stored.vectors, vectors) if config.expand else vectors, config.k)
            for (path, query), attention, near in zip(queries.items(), maps, found, strict=True):
                context.say(path)
                context.show(table_of(near))
                asked += 1
                if asked <= DRAWN:
                    tiles = tiles_of(stored, near[:DRAWN_NEAR], encoder, context)
                    missing += len(near[:DRAWN_NEAR]) - len(tiles)
                    sections.append(Section(path, rows=[[tile("query", query.crop, attention), *tiles]]))
    if not sections:
        raise UsageError(f"none of the {len(images)} images can be read")
    made_with = os.path.join(*Path(stored.facts["weights"]).parts[-2:])
    shown = SHOWN.get(pooling, pooling) + (", mean subtracted" if stored.mean is not None else "")
    shown += ", expanded" if config.expand else ""
    text = f"By the embeddings of {made_with} ({shown}). Below each image are its cosine, its label and its file."
    if encoder.branch is not None:
        text += " The map beside it is warm where the attention is high, and is scaled to its own maximum."
    write_page(config.out, f"Nearest of {len(stored.rows):,} images", [Section(text=text), *sections])
    if missing:
        where = f"under {stored.facts['root']}, so they are not drawn"
        context.say(f"{missing:,} of the nearest images are no longer {where}")
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
