"""Some pairs of images, same or different, in place of labels: how well an encoder's similarities tell them apart."""

from __future__ import annotations

import csv
import io
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastcr.data.archives import read_text
from fastcr.data.images import ImageList
from fastcr.encoders.encoder import Encoder
from fastcr.errors import UsageError
from fastcr.measures.embeddings import embed
from fastcr.runs.context import Context

DRAWS = 2000  # of as many pairs, with replacement: the range of 95 % of them is the confidence range
LEAST = 5  # pairs of each kind
Array = np.ndarray[Any, Any]
Scored = dict[str, Array]  # by pooling: the cosine of each pair [P], fp64; NaN where an image cannot be read


class Pairs(NamedTuple):
    """Pairs of images."""

    images: ImageList  # each once
    places: Array  # [P,2] in that list
    same: Array  # [P] bool


def read_pairs(source: Path) -> Pairs:
    """The pairs of a CSV file: two paths, absolute or from its own folder, and `same` or `different` in each row.

    A first row of titles is skipped. `UsageError` for anything else, or fewer than `LEAST` of a kind.
    """
    try:
        lines = list(csv.reader(io.StringIO(read_text(source), newline=""), skipinitialspace=True))
    except (OSError, csv.Error) as error:
        raise UsageError(f"--pairs {source} cannot be read: {error}") from None
    rows, answers = list[tuple[str, str]](), list[bool]()
    for number, line in enumerate(lines, start=1):
        words = [word.strip() for word in line]
        if len(words) == 3 and words[2].lower() in ("same", "different"):
            rows.append((words[0], words[1]))
            answers.append(words[2].lower() == "same")
        elif any(words) and number > 1:
            raise UsageError(
                f"--pairs {source}, line {number}: not two paths and same or different: {','.join(line)!r}"
            )
    if min(sum(answers), len(answers) - sum(answers)) < LEAST:
        counts = f"{sum(answers)} pairs are the same and {len(answers) - sum(answers)} different"
        raise UsageError(f"--pairs {source}: {counts}: {LEAST} of each are the least, and some 25 of each make sense")
    files = sorted({path for row in rows for path in row})
    number_of = {path: number for number, path in enumerate(files)}
    places = np.array([[number_of[path] for path in row] for row in rows])
    return Pairs(ImageList(source.parent, tuple(files), None, ()), places, np.array(answers))


def score_pairs(encoder: Encoder, pairs: Pairs, context: Context) -> Scored:
    """The cosine of each pair, by the mean and by the attention of an encoder that has one.

    Of several processes only the first has all of them.
    """
    found = embed(encoder, pairs.images, context, title="pairs")
    rows = torch.full((len(pairs.images),), -1)
    rows[found.kept] = torch.arange(len(found.kept))
    first, second = rows[torch.from_numpy(pairs.places)].unbind(1)
    unread = ((first < 0) | (second < 0)).numpy()
    named = {"mean": found.mean, "rationale": found.rationale}
    cosines = {name: (each[first] * each[second]).sum(1) for name, each in named.items() if each is not None}
    return {name: np.where(unread, np.nan, each.double().numpy()) for name, each in cosines.items()}


def results_of(pairs: Pairs, scored: dict[str, Scored]) -> dict[str, Any]:
    """Content of the results' file: AUC and accuracy of each encoder, percent, each with its range [low, high].

    The accuracy is that of the cosine's best limit, which is chosen on these very pairs, in each draw anew.
    `gained` is the AUC of the last encoder's last pooling, which is the attention where there is one, less that of the
    better pooling of the encoder before it; its range is over the same draws.
    """
    read = ~np.isnan(next(iter(scored.values()))["mean"])
    same, rng = pairs.same[read], np.random.default_rng(0)
    if min(same.sum(), (~same).sum()) < LEAST:
        raise UsageError(f"{(~read).sum()} of {len(read)} pairs hold an image that cannot be read: too few are left")
    # how often each pair is drawn: once each in the first row, which gives the figure itself
    counts = [rng.multinomial(n, [1 / n] * n, DRAWS) for n in (int(same.sum()), int((~same).sum()))]
    some, others = (np.concatenate([np.ones_like(each[:1]), each]) for each in counts)
    both = np.empty((len(some), len(same)))
    both[:, same], both[:, ~same] = some, others
    rows, areas = list[dict[str, Any]](), list[list[Array]]()
    for name, vectors in scored.items():
        areas.append([])
        for pooling, whole in vectors.items():
            cosine = whole[read]
            above = (np.sign(cosine[same][:, None] - cosine[~same]) + 1) / 2  # 1/2 for a tie
            area = 100 * ((some @ above) * others).sum(1) / above.size
            ordered = np.sort(cosine)
            limits = np.concatenate([[-np.inf], (ordered[1:] + ordered[:-1]) / 2])
            right = 100 * (both @ ((cosine[:, None] > limits) == same[:, None])).max(1) / len(same)
            rows.append({"encoder": name, "pooling": pooling, "auc": _ranged(area), "accuracy": _ranged(right)})
            areas[-1].append(area)
    found = {"pairs": {"same": len(counts[0][0]), "different": len(counts[1][0]), "left_out": int((~read).sum())}}
    gained = {"gained": _ranged(areas[-1][-1] - max(areas[-2], key=itemgetter(0)))} if len(areas) > 1 else {}
    return {**found, "encoders": rows, **gained}


def _ranged(values: Array) -> list[float]:
    """The figure itself, and the low and the high end of its range."""
    return [float(values[0]), *map(float, np.quantile(values[1:], [0.025, 0.975]))]
