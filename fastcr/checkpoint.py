"""Files of a run, each replaced whole or not at all: `weights.safetensors` for others, `resume.pt` for the run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastcr.config import UsageError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside `path`, bring it to the disk, then put it in `path`'s place.

    Whatever stops this half-way (a kill, a full disk), the old file stays whole. `OSError` is passed on as
    `UsageError`.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"cannot save {path}: {error}; what was there before is untouched") from None
    finally:
        beside.unlink(missing_ok=True)


def save_weights(path: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `state` as safetensors with `facts` as JSON under the metadata key `fastcr`."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    metadata = {"fastcr": json.dumps(facts)}
    # safetensors' own save_file would make it readable to its owner only
    write_whole(path, lambda file: file.write_bytes(safetensors.torch.save(tensors, metadata)))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote; no facts for a file of another kind. `UsageError` if it is missing or broken."""
    state, facts = read_state_dict(path), {}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            try:
                facts = json.loads((file.metadata() or {}).get("fastcr", "{}"))
            except ValueError:
                facts = {}
    return state, facts if isinstance(facts, dict) else {}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pt or .pth file, as fp32 where they are floating-point.

    A checkpoint that keeps them under `state_dict`, `model` or with the prefix `module.` is unwrapped. Never runs code
    from the file. Raises `UsageError` if it is missing, broken, or no dict of tensors.
    """
    if not path.is_file():
        raise UsageError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        try:
            content: Any = safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is not a whole safetensors file: {error}") from None
    else:
        content = load_torch(path)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise UsageError(f"{path} holds no dict of tensors (found: {keys})")
    return {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in content.items()
    }


def load_torch(path: Path) -> Any:
    """`torch.load` of plain data only, onto the CPU. `UsageError` for a broken file or one with pickled code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path} is refused: it holds pickled code or is no checkpoint (only tensors are read)"
        ) from None
    except Exception as error:  # broken bytes lead the unpickler anywhere
        raise UsageError(f"{path} is broken, or is no checkpoint ({type(error).__name__})") from None


def save_resume(path: Path, content: dict[str, Any]) -> None:
    """Write what a run needs to go on bit for bit."""
    write_whole(path, lambda file: torch.save(content, file))


def load_resume(path: Path) -> dict[str, Any]:
    """Read what `save_resume` wrote. `UsageError` if the file is missing, broken or something else."""
    if not path.is_file():
        raise UsageError(f"{path.parent} has no {path.name}: the run stopped before its first save")
    content = load_torch(path)
    if not isinstance(content, dict) or "step" not in content or "model" not in content:
        raise UsageError(f"{path} was not written by fastcr.train")
    return content


def random_states() -> dict[str, Any]:
    """State of torch's generators, CPU and CUDA (the only ones the training draws from; views are stateless)."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
