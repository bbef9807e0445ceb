"""What a query is trained to be: one file an objective."""

from __future__ import annotations

from functools import partial

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
    temperature = config.temperature
    objectives: dict[str, Objective] = {
        "infonce": partial(infonce, temperature=temperature, impl=impl),
        "neighbour": partial(neighbour, temperature=temperature, neighbours=config.neighbours),
        "relational": partial(relational, temperature=temperature, key_temperature=config.key_temperature),
        "byol": byol,
    }
    return objectives[config.objective]
