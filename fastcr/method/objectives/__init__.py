"""What a query is trained to be: one file an objective."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastcr.config import MocoConfig
from fastcr.kernels.launch import Impl
from fastcr.method.objectives.byol import byol
from fastcr.method.objectives.contract import Objective
from fastcr.method.objectives.infonce import infonce
from fastcr.method.objectives.neighbour import neighbour
from fastcr.method.objectives.relational import relational

QUEUED = ("neighbour", "relational")  # these learn from the queue's keys: it is filled before the first step


def build_objective(config: MocoConfig, impl: Impl = "auto") -> Objective:
    """The objective that the settings ask for, its temperatures bound."""
    shared: dict[str, Any] = {"temperature": config.temperature, "impl": impl}
    objectives: dict[str, Objective] = {
        "infonce": partial(infonce, **shared),
        "neighbour": partial(neighbour, neighbours=config.neighbours, **shared),
        "relational": partial(relational, key_temperature=config.key_temperature, **shared),
        "byol": byol,
    }
    return objectives[config.objective]
