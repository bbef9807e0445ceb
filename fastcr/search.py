"""`fastcr search EMBEDDINGS IMAGE...`: embedded images that are similar to others, or to each other."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastcr.arguments import SearchConfig, read_arguments
from fastcr.data.crop_loader import BATCH_SIZE
from fastcr.data.images import ImageList
from fastcr.encoders.encoder import Encoder
from fastcr.encoders.hub import address_of
from fastcr.encoders.named import is_name, open_encoder
from fastcr.errors import UsageError
from fastcr.measures.near import copies, nearest_other
from fastcr.measures.poolings import SHOWN
from fastcr.measures.reranking import expand
from fastcr.output.embeddings import Neighbour, Stored, read_stored
from fastcr.output.gallery import encode, list_images, read_pictures, tile
from fastcr.output.sheets import PAGE, Section, Tile, check_out, write_page
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context

DRAWN, DRAWN_NEAR = 100, 20  # queries, and neighbours of each, that are drawn
LISTED = 100  # rows of tables; --csv and --json print all
Row = dict[str, Any]


def encoder_of(stored: Stored, named: Path | None, device: torch.device) -> Encoder:
    """The encoder that made the embeddings. `UsageError` if it is gone or another one."""
    source = named or Path(stored.facts["weights"])
    if not named and not source.exists() and not address_of(source) and not is_name(source):
        raise UsageError(f"the encoder of these embeddings, {source}, is gone: --encoder says where it is now")
    facts = stored.facts
    encoder, weights, sha256 = open_encoder(source, device, facts.get("tuned"), facts.get("image_size"))
    if sha256 != stored.facts["weights_sha256"]:
        raise UsageError(f"{weights} is not the encoder that made these embeddings: --encoder says where that one is")
    return encoder


def print_rows(rows: Sequence[Row], config: SearchConfig, context: Context) -> None:
    """All rows as JSON or CSV; or else the first ones in tables, one for each query."""
    if config.json:
        print(json.dumps(rows, indent=1))
    elif config.csv and rows:
        lines = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)
    else:
        for query, part in groupby(rows[:LISTED], lambda row: row.get("query")):
            if query:
                context.say(query)
            table = Table()
            for name, value in rows[0].items():
                if name != "query":
                    table.add_column(name, justify="left" if isinstance(value, str) else "right")
            for row in part:
                cells = (value for name, value in row.items() if name != "query")
                table.add_row(*(f"{each:.4f}" if isinstance(each, float) else str(each) for each in cells))
            context.show(table)
        if len(rows) > LISTED:
            context.say(f"{len(rows) - LISTED:,} further rows: --csv and --json print all")


def look_inside(stored: Stored, config: SearchConfig, context: Context) -> list[Row]:
    """The near copies among the embedded images, or else the loneliest of them."""

    def named(row: int) -> Row:
        path, label = stored.rows[row]
        return {"label": label, "path": path}

    vectors = stored.vectors.to(context.device)
    if config.duplicates is not None:
        found = copies(vectors, config.duplicates, partial(context.progress, title="looking for near copies"))
        context.say(f"{sum(map(len, found)):,} of {len(vectors):,} images have near copies, in {len(found):,} groups")
        pairs = [(number, rows[0], row) for number, rows in enumerate(found, start=1) for row in rows]
        return [
            {"group": number, "similarity": float(vectors[first] @ vectors[row]), **named(row)}
            for number, first, row in pairs
        ]
    best, at = nearest_other(vectors, partial(context.progress, title="looking for outliers"))
    values, rows = best.topk(min(config.outliers or 0, len(best)), largest=False)
    return [
        {"similarity": similarity, **named(row), "nearest": stored.rows[int(at[row])][0]}
        for similarity, row in zip(values.tolist(), rows.tolist(), strict=True)
    ]


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
    """Print what is similar, and draw the nearest of images; `UsageError` for what cannot be used."""
    stored = read_stored(config.embeddings)
    if config.duplicates is not None or config.outliers is not None:
        if config.images or None not in (config.duplicates, config.outliers):
            raise UsageError(
                "--duplicates and --outliers are about the embedded images: give one of them, and no IMAGE"
            )
        print_rows(look_inside(stored, config, context), config, context)
        return
    if not config.images:
        raise UsageError("name an IMAGE to search for, or a folder of them; or ask for --duplicates or --outliers")
    drawn = 0 if config.csv or config.json else DRAWN
    if drawn:
        check_out(config.out, PAGE)
    images = list_images(config.images)
    encoder = encoder_of(stored, config.encoder, context.device)
    pooling, root = stored.facts["pooling"], stored.facts["root"]
    if config.expand and stored.expanded is None:
        stored = stored._replace(expanded=expand(stored.vectors))
    rows, sections, missing, asked = list[Row](), list[Section](), 0, 0
    with encoder.evaluating():
        # in parts, so that a folder's pictures are never in memory all at once
        for first in context.progress(range(0, len(images), BATCH_SIZE), "searching"):
            queries, reasons = read_pictures(images[first : first + BATCH_SIZE], encoder.image_size)
            for reason in reasons:
                context.say(f"left out: {reason}")
            if not queries:
                continue
            vectors, maps = encode(list(queries.values()), encoder, context, pooling)
            found = stored.nearest(stored.queries(vectors), config.k + bool(config.exclude_self))
            for (path, query), attention, near in zip(queries.items(), maps, found, strict=True):
                if config.exclude_self:
                    own = os.path.realpath(path)
                    near = [each for each in near if os.path.realpath(os.path.join(root, each.path)) != own]
                near = near[: config.k]
                asked += 1
                rows += [
                    {"query": path, "rank": rank, "similarity": each.similarity, "label": each.label, "path": each.path}
                    for rank, each in enumerate(near, start=1)
                ]
                if asked <= drawn:
                    tiles = tiles_of(stored, near[:DRAWN_NEAR], encoder, context)
                    missing += len(near[:DRAWN_NEAR]) - len(tiles)
                    sections.append(Section(path, rows=[[tile("query", query.crop, attention), *tiles]]))
    if not asked:
        raise UsageError(f"none of the {len(images)} images can be read")
    print_rows(rows, config, context)
    if not drawn:
        return
    made_with = os.path.join(*Path(stored.facts["weights"]).parts[-2:])
    shown = SHOWN.get(pooling, pooling) + (", mean subtracted" if stored.mean is not None else "")
    shown += (", whitened" if stored.axes is not None else "") + (", expanded" if stored.expanded is not None else "")
    text = f"By the embeddings of {made_with} ({shown}). Below each image are its cosine, its label and its file."
    if encoder.branch is not None:
        text += " The map beside it is warm where the attention is high, and is scaled to its own maximum."
    write_page(config.out, f"Nearest of {len(stored.rows):,} images", [Section(text=text), *sections])
    if missing:
        context.say(f"{missing:,} of the nearest images are no longer under {root}, so they are not drawn")
    if asked > DRAWN:
        context.say(f"drawn are the first {DRAWN} of {asked:,} images")
    context.say(config.out)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr search`."""
    with one_line_errors("search"):
        config: SearchConfig = read_arguments("search", args)
        console = Console(stderr=True, markup=False) if config.csv or config.json else None
        search(config, Context.of(config.run.device, config.run.precision, console=console))


if __name__ == "__main__":
    main()
