"""The index that `fastcr embed` makes in a folder, or brings up to date; and what `fastcr search` reads of it.

Row i of every array is row i of `images.csv`; `encoder.json` says which encoder they are of and how its features were
pooled. What is computed is saved in parts in the folder `partial`; what a killed command left there is taken over by
the next one, as are the rows of the index that is there. The new index is written whole in `partial` too. It replaces
the old one by one rename, to the folder `next`: what is in there counts, until its files have taken their places.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from torch import Tensor

from fastcr.errors import UsageError, one_line
from fastcr.measures.reranking import expand, principal
from fastcr.runs.checkpoint import facts_of, load_weights, save_weights, write_whole

POOLINGS = ("mean", "rationale", "gem", "norm", "gaussian", "cls")  # arrays of embeddings, as in results.json
# the pooling's embeddings before they were centred or whitened; the axes of that; each one summed with its nearest
PLAIN, AXES, EXPANDED = "plain", "axes", "expanded"
TABLE, ENCODER, PARTIAL, NEXT = "images.csv", "encoder.json", "partial", "next"
FINAL = (TABLE, *(f"{name}.npy" for name in (*POOLINGS, PLAIN, AXES, EXPANDED)), ENCODER)
# of the table: path below the root; size in pixels; stamp: what changes when the image's file does
COLUMNS = ("row", "path", "split", "label", "width", "height", "stamp")
ANEW = "name another --out, or remove what fastcr embed wrote there to begin anew"


class Image(NamedTuple):
    """An image of the folder, as the table names it."""

    path: str
    split: str
    label: str
    stamp: str


class Place(NamedTuple):
    """Where the embeddings of an image are, and its size in pixels."""

    source: Path  # a part, or the folder of the index
    row: int
    width: int  # 0: it cannot be read
    height: int


Known = dict[tuple[str, str], Place]  # by path and stamp


def check_foreign(folder: Path) -> None:
    """`UsageError` if files of the names of an index are in the folder, but neither an index nor parts of one."""
    found = [name for name in FINAL if (folder / name).exists()]
    if found and ENCODER not in found and not any((folder / name).exists() for name in (NEXT, PARTIAL)):
        raise UsageError(f"{folder / found[0]} is there already, but no index: remove it, or name another --out")


def save_part(file: Path, key: dict[str, str], images: Sequence[Sequence[Any]], arrays: dict[str, Tensor]) -> None:
    """Save what was computed of some images: path, stamp, width and height of each, 0 by 0 if it cannot be read.

    The arrays `[R,...]` are of those that can. `key` says what they are of.
    """
    save_weights(file, arrays, {"key": key, "images": images})


def read_known(out: Path, key: dict[str, str]) -> Known:
    """What is embedded already, in the index in `out` and in parts. `UsageError` if it is not of what `key` says."""
    found: Known = {}
    settle(out)
    if (out / ENCODER).exists():
        facts = read_stored(out).facts
        _check(out, key, {"weights": facts["weights_sha256"], "settings": facts.get("settings")})
        with (out / TABLE).open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            for row in csv.DictReader(text):
                place = Place(out, int(row["row"]), int(row["width"]), int(row["height"]))
                found[row["path"], row.get("stamp", "")] = place
    for file in sorted((out / PARTIAL).glob("*.safetensors")):
        if not (facts := facts_of(file)):  # broken: embedded again
            continue
        _check(file.parent, key, facts["key"])
        rows = 0
        for path, stamp, width, height in facts["images"]:
            found[path, stamp] = Place(file, rows, width, height)
            rows += width > 0
    return found


def _check(where: Path, key: dict[str, str], made: dict[str, Any]) -> None:
    if other := [f"{name} ({made.get(name)}, not {ours})" for name, ours in key.items() if made.get(name) != ours]:
        raise UsageError(f"{where} was made with other {' and other '.join(other)}: {ANEW}")


def write_index(
    out: Path, known: Known, images: Sequence[Image], names: list[str], facts: dict[str, Any], options: list[str]
) -> None:
    """Put the index of the known ones among the `images`, all of which can be read, in place of what is in `out`.

    `facts` are the encoder's; its "pooling" is the one of the arrays' `names` that the options are for: "centre",
    "whiten", "expand". One array is in memory at a time. Where nothing has changed, nothing is written.
    """
    places = [known[image.path, image.stamp] for image in images]
    table = _table(images, places)
    if (out / ENCODER).exists() and (out / TABLE).read_bytes() == table:
        before = json.loads((out / ENCODER).read_text())
        if json.loads(json.dumps(facts)).items() <= before.items():  # or else the folder or the weights have moved
            return
    fresh, pooling = out / PARTIAL / NEXT, facts["pooling"]
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for name in names:
        vectors = _gather(places, name, plain=name == pooling)
        if options and name == pooling:
            _save(fresh, PLAIN, vectors)
            if "centre" in options or "whiten" in options:
                mean = vectors.mean(0, dtype=torch.float64).float()
                vectors, facts = vectors - mean, facts | {"subtracted": mean.tolist()}
            if "whiten" in options:
                axes = principal(vectors)
                _save(fresh, AXES, axes)
                vectors = vectors @ axes
            vectors = F.normalize(vectors, dim=1)
            if "expand" in options:
                _save(fresh, EXPANDED, expand(vectors))
        _save(fresh, name, vectors)
    write_whole(fresh / TABLE, lambda file: file.write_bytes(table))
    write_whole(fresh / ENCODER, lambda file: file.write_text(json.dumps(facts, indent=2) + "\n"))
    os.rename(fresh, out / NEXT)
    settle(out)


def settle(out: Path) -> None:
    """Move the files of an index that has replaced another one to their usual places."""
    if (out / NEXT).is_dir():
        for name in FINAL:
            if (file := out / NEXT / name).exists():
                os.replace(file, out / name)
        (out / NEXT).rmdir()


def _table(images: Sequence[Image], places: Sequence[Place]) -> bytes:
    lines = csv.writer(text := io.StringIO(newline=""), quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    lines.writerow(COLUMNS)
    for row, (image, place) in enumerate(zip(images, places, strict=True)):
        lines.writerow([row, *image[:3], place.width, place.height, image.stamp])
    return text.getvalue().encode(errors="surrogateescape")


def _gather(places: Sequence[Place], name: str, *, plain: bool) -> Tensor:
    """The rows of an array at these places; `plain`: before anything was made of them."""
    by_source, whole = dict[Path, list[int]](), torch.empty(0)
    for row, place in enumerate(places):
        by_source.setdefault(place.source, []).append(row)
    for source, rows in by_source.items():
        if source.is_dir():
            file = source / f"{PLAIN}.npy"
            array = torch.from_numpy(np.load(file if plain and file.exists() else source / f"{name}.npy"))
        else:
            array = load_weights(source)[0][name]
        if not len(whole):
            whole = array.new_empty(len(places), *array.shape[1:])
        whole[rows] = array[[places[row].row for row in rows]]
    return whole


def _save(folder: Path, name: str, array: Tensor) -> None:
    rows = array.contiguous().numpy()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # numpy.save would not say that a disk is full
            write_array_header_1_0(file, header_data_from_array_1_0(rows))
            file.write(rows.data)

    write_whole(folder / f"{name}.npy", write)


class Neighbour(NamedTuple):
    """An image of the table."""

    row: int
    path: str  # below the root
    label: str  # "" without
    similarity: float  # cosine


class Stored(NamedTuple):
    """The embeddings in a folder."""

    vectors: Tensor  # [N,C] fp32, unit length
    expanded: Tensor | None  # [N,C], each summed with its nearest: what queries, summed with theirs, are compared with
    mean: Tensor | None  # [C'], that was subtracted from them
    axes: Tensor | None  # [C',C], on which they lie since
    rows: list[tuple[str, str]]  # path and label of each image
    facts: dict[str, Any]  # of the encoder, and how its features were pooled

    def queries(self, pooled: Tensor) -> Tensor:
        """What the encoder makes of images, pooled `[Q,C']`, as `[Q,C]` to compare with these."""
        moved = pooled if self.mean is None else pooled - self.mean
        vectors = F.normalize(moved if self.axes is None else moved @ self.axes, dim=1)
        return vectors if self.expanded is None else expand(self.vectors, vectors)

    def nearest(self, queries: Tensor, k: int) -> list[list[Neighbour]]:
        """The `k` images most similar to each of the queries `[Q,C]`, unit length, the most similar first."""
        among = self.vectors if self.expanded is None else self.expanded
        best = (queries @ among.T).topk(min(k, len(self.rows)))
        return [
            [Neighbour._make((row, *self.rows[row], each)) for row, each in zip(places, similarity, strict=True)]
            for places, similarity in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def place_of(folder: Path, name: str) -> Path:
    """Where a file of the index in `folder` lies."""
    return found if (found := folder / NEXT / name).exists() else folder / name


def read_stored(source: Path) -> Stored:
    """The embeddings in the folder `source`, or in that of the file. `UsageError` where there are none, or broken."""
    folder = source if source.is_dir() else source.parent
    while True:
        if not source.exists() or not place_of(folder, ENCODER).is_file():
            raise UsageError(f"no embeddings at {source}: name a folder that fastcr embed wrote")
        version = _version(folder)
        stored = _read(folder)
        if _version(folder) == version:  # or else the index was replaced meanwhile
            return stored


def _version(folder: Path) -> tuple[int, int]:
    facts = place_of(folder, ENCODER).stat()
    return facts.st_ino, facts.st_mtime_ns


def _read(folder: Path) -> Stored:
    reading = place_of(folder, ENCODER)

    def array(name: str) -> Tensor | None:
        nonlocal reading
        reading = place_of(folder, f"{name}.npy")
        return torch.from_numpy(np.load(reading)) if reading.exists() else None

    try:
        facts = json.loads(reading.read_text())
        named = ("weights", "weights_sha256", "root")
        if not all(isinstance(facts[name], str) for name in named) or facts["pooling"] not in POOLINGS:
            raise ValueError(f"it lacks {', '.join(named)} or names no pooling")
        reading = place_of(folder, TABLE)
        with reading.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            rows = [(row["path"], row["label"]) for row in csv.DictReader(text)]
        mean = torch.tensor(facts["subtracted"]) if "subtracted" in facts else None
        axes, expanded, vectors = array(AXES), array(EXPANDED), array(facts["pooling"])
        if vectors is None or vectors.ndim != 2 or vectors.dtype != torch.float32:
            raise ValueError("it holds no vectors in fp32")
        if len(vectors) != len(rows) or not rows:
            raise ValueError(f"{len(vectors)} embeddings of {len(rows)} images")
        if expanded is not None and (expanded.shape, expanded.dtype) != (vectors.shape, vectors.dtype):
            raise ValueError(f"{EXPANDED}.npy does not belong to it")
        channels = vectors.shape[1] if axes is None else len(axes)
        if (mean is not None and mean.shape != (channels,)) or (
            axes is not None and axes.shape[1:] != vectors.shape[1:]
        ):
            raise ValueError("the mean or the axes do not belong to it")
    except (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, csv.Error) as error:
        raise UsageError(f"{reading} is missing or broken ({one_line(error)}): run fastcr embed again") from None
    return Stored(vectors, expanded, mean, axes, rows, facts)
