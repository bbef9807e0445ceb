"""Whether settings can work: each number in its range, and what must be true of several of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

from fastcr.config import Config
from fastcr.errors import UsageError

C = TypeVar("C")


def validate(config: C) -> C:
    """Return the settings of any command, or raise `UsageError` naming the first flag whose value cannot work."""
    _check_numbers(config, "")
    checks = _conflicts(config) if isinstance(config, Config) else {}
    for message, holds in checks.items():
        if not holds:
            raise UsageError(message)
    return config


def _check_numbers(section: Any, name: str) -> None:
    for each in dataclasses.fields(section):
        value, flag, limits = getattr(section, each.name), f"{name}{each.name}", each.metadata
        if dataclasses.is_dataclass(value):
            _check_numbers(value, f"{flag}.")
        elif limits and value is not None and not isinstance(value, str):
            low, high, above = limits["low"], limits["high"], limits["above"]
            values = value if isinstance(value, tuple) else (value,)
            if not all(low <= one <= high and not (above and one == low) and abs(one) < math.inf for one in values):
                at_least = f"be above {low}" if above else f"be at least {low}"
                raise UsageError(f"--{flag} must {f'lie in [{low}, {high}]' if high < math.inf else at_least}")


def _conflicts(config: Config) -> dict[str, bool]:
    """What settings must be true of each other, by the message that says so."""
    data, optim, moco = config.data, config.optim, config.moco
    return {
        f"--data.loader {data.loader} decodes anew in each epoch: it goes with --data.cache off": (
            data.loader == "auto" or data.cache in ("auto", "off")
        ),
        "--optim.momentum must be below 1": optim.momentum < 1,
        "--moco.objective relational needs a larger --moco.queue_size": (
            moco.objective == "infonce" or moco.queue_size > 1
        ),
        "--moco.pooling rationale needs the rationale branch: --rationale.enabled True": (
            moco.pooling == "mean" or config.rationale.enabled
        ),
        "--moco.pooling rationale with --rationale.cam_of loss needs --rationale.cam_weights common": (
            moco.pooling == "mean"
            or config.rationale.cam_of == "similarity"
            or config.rationale.cam_weights == "common"
        ),
    }
