"""What lies beside weights in a folder of the Hugging Face Hub: the encoder's name, its images' size, mean and std."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastcr.errors import UsageError

FILES = ("config.json", "preprocessor_config.json", "open_clip_config.json")  # timm's, transformers', open_clip's
# where the facts are in them, the first that is there
PLACES = {
    "backbone": ("architecture", "model_cfg.vision_cfg.timm_model_name"),
    "size": ("pretrained_cfg.input_size", "input_size", "crop_size", "size", "model_cfg.vision_cfg.image_size"),
    "own_mean": ("pretrained_cfg.mean", "mean", "image_mean", "preprocess_cfg.mean"),
    "own_std": ("pretrained_cfg.std", "std", "image_std", "preprocess_cfg.std"),
}


def facts_beside(folder: Path) -> dict[str, Any]:
    """timm's `backbone`, `size` (pixels), `own_mean` and `own_std` (a number a colour) as far as the folder says them.

    `said` is a line for people. `UsageError` for a file that is broken, or says what cannot be.
    """
    found, files = dict[str, Any](), list[str]()
    for file in (folder / name for name in FILES if (folder / name).is_file()):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            facts = {key: _read(key, value) for key in PLACES if (value := _first(content, PLACES[key])) is not None}
        except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
            raise UsageError(f"{file}, beside the weights, cannot be used: {error!r}") from None
        files += [file.name] if facts.keys() - found.keys() else []
        found = facts | found
    if found:
        what = ", ".join(f"{key.removeprefix('own_')} {found[key]}" for key in PLACES if key in found)
        found["said"] = f"{folder / ' and '.join(files)}: {what} (settings that are given come first)"
    return found


def _first(content: Any, places: tuple[str, ...]) -> Any:
    for place in places:
        value = content
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _read(key: str, value: Any) -> Any:
    """The value in one form; `ValueError` and its like for what cannot be."""
    if key == "backbone":
        return "timm:" + value
    if key == "size":  # a side, [3, height, width], or a dict of sides
        sides = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        return int(sides[-1])
    return three_numbers(key, value)


def three_numbers(name: str, value: Any) -> tuple[float, ...]:
    """A mean or std, a number a colour; `ValueError` or `TypeError` for what cannot be one."""
    numbers = tuple(map(float, value))
    if len(numbers) != 3 or not all(math.isfinite(each) and (each > 0 or "std" not in name) for each in numbers):
        raise ValueError(f"{name.removeprefix('own_')} cannot be {value}")
    return numbers
