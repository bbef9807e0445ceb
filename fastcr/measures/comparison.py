"""Whether one encoder retrieves better than another by more than chance, paired over the same queries."""

from __future__ import annotations

import math
from typing import Any

from fastcr.measures.retrieval import Queries


def compare(before: Queries, after: Queries) -> dict[str, Any]:
    """What the queries gained and lost, as `results.json` holds it; both must be of the same images.

    `gained` and `lost` count the queries that are a hit at rank 1 only after, or only before; `p_value` is of the exact
    McNemar test of these. `mAP_difference` (after less before) and its standard error over the queries are in points.
    """
    hit_before, hit_after = before.rank == 1, after.rank == 1
    gained, lost = int((hit_after & ~hit_before).sum()), int((hit_before & ~hit_after).sum())
    difference = 100 * (after.precision - before.precision)
    return {
        "queries": len(difference),
        "gained": gained,
        "lost": lost,
        "p_value": mcnemar(gained, lost),
        "mAP_difference": difference.mean().item(),
        "mAP_standard_error": difference.std().item() / math.sqrt(len(difference)),
    }


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p value: how often tosses of a fair coin divide these queries at least as unevenly."""
    tosses = gained + lost
    one_tail = sum(math.comb(tosses, heads) for heads in range(min(gained, lost) + 1)) / 2**tosses
    return min(2 * one_tail, 1.0)
