"""Files of a run, each replaced whole or not at all: `weights.safetensors` to use, `resume.pt` to resume the run."""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastcr.errors import UsageError
from fastcr.runs.beside import facts_beside

INITIAL = "init.safetensors"  # the weights a run began with
RESUME = ("resume.pt", "resume.1.pt")  # of a run folder: the newest save, and the one before
# of a run, and of the Hugging Face Hub's
IN_FOLDERS = ("weights.safetensors", "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])")  # a moving average of the weights, beside them
# what others save beside their weights: settings, and NumPy's scalars and arrays (by the names of NumPy 1 and 2)
HARMLESS: list[Any] = [
    Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"},
]
HARMLESS += [
    (make.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
    for make, name in ((np.float64(0), "scalar"), (np.empty(0), "_reconstruct"))
    for core in ("core", "_core")
]
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # of DistributedDataParallel and torch.compile


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file, sync it to the disk, then rename it to `path`.

    Whatever interrupts this (a kill, a full disk), the old file stays whole. `UsageError` if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a symbolic link somebody put there is not followed
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"cannot save {path}: {error}; what was there before is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` at the end: whatever interrupts this leaves no half of it.

    Where another process has put one there meanwhile, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch, folder.name)
        draft.mkdir()
        yield draft
        if not folder.exists() or not any(folder.iterdir()):
            draft.rename(folder)


def save_weights(path: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `state` as safetensors, with `facts` as JSON under the metadata key `fastcr`."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    # safetensors' own save_file would make it readable to its owner only
    content = safetensors.torch.save(tensors, {"fastcr": json.dumps(facts)})
    write_whole(path, lambda file: file.write_bytes(content))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a .safetensors, .pt or .pth file, or of a folder's, as fp32 where they are floating-point; and facts.

    The facts are what `save_weights` was given beside them; a file of another kind has none. A checkpoint that keeps
    its tensors under `state_dict` or `model`, or with the prefixes `module.` or `_orig_mod.`, is unwrapped; names of
    other dicts, such as `student` and `teacher`, become prefixes. Never runs code from the file.
    Raises `UsageError` if it is missing, broken, or holds no tensors.
    """
    path = file_of(path)
    if not path.is_file():
        raise UsageError(f"no weights file {path}")
    content, facts = _read_safetensors(path) if path.suffix == ".safetensors" else (load_torch(path), {})
    for key in ("state_dict", "model", "model_state_dict"):
        inner = content.get(key) if isinstance(content, dict) else None
        if isinstance(inner, dict) and not any(AVERAGED.search(str(name)) for name in content):
            content = inner
    tensors = dict(tensors_in(content))
    if not tensors and content != {}:
        raise UsageError(f"{path} holds no dict of tensors")
    state = {WRAPPERS.sub("", key): each.float() if each.is_floating_point() else each for key, each in tensors.items()}
    return state, facts


def check_finite(state: dict[str, Tensor], source: str | Path) -> None:
    """`UsageError` for weights that hold NaN or infinity."""
    for key, value in state.items():
        if not value.isfinite().all():
            raise UsageError(f"{source} holds weights that are not finite (NaN or infinity) in {key}: no encoder")


def facts_of(path: Path) -> dict[str, Any]:
    """What `save_weights` wrote into a file beside the weights; of another file what `facts_beside` finds, if anything.

    `UsageError` for what lies beside weights and is broken.
    """
    file = file_of(path)
    with suppress(UsageError):
        if facts := _read_safetensors(file, with_tensors=False)[1]:
            return facts
    return facts_beside(file.parent) if file.name in IN_FOLDERS else {}


def file_of(path: Path) -> Path:
    """The weights file in a folder; any other path as it is."""
    return next((file for name in IN_FOLDERS if (file := path / name).is_file()), path)


def _read_safetensors(path: Path, with_tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a safetensors file."""
    try:
        # opened by its number, for safetensors takes no names that are not UTF-8
        with open(path, "rb") as file, safe_open(f"/proc/self/fd/{file.fileno()}", "pt") as opened:
            facts = dict(json.loads((opened.metadata() or {}).get("fastcr", "{}")))
            tensors = {key: opened.get_tensor(key) for key in opened.keys() if with_tensors}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}") from None
    except (ValueError, TypeError, RecursionError):
        raise UsageError(f"{path} is broken: what it says of the encoder cannot be read") from None
    facts.pop("crc32", None)  # earlier versions wrote a checksum among them
    return tensors, facts


def tensors_in(content: Any, prefix: str = "", depth: int = 8) -> Iterator[tuple[str, Tensor]]:
    """The tensors in dicts within dicts, by their names joined with dots; what has other keys is left out."""
    for key, value in content.items() if isinstance(content, dict) and depth else ():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(key, str):
            yield from tensors_in(value, f"{prefix}{key}.", depth - 1)


def load_torch(path: Path) -> Any:
    """`torch.load` of plain data only, onto the CPU. `UsageError` for a broken file or one with pickled code."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path} is refused: it holds pickled code or is no checkpoint (only tensors are read)"
        ) from None
    except Exception as error:  # broken bytes lead the unpickler anywhere
        if "TorchScript" in str(error):
            raise UsageError(
                f"{path} is refused: it is a TorchScript program, not tensors; torch.save of its state_dict() is read"
            ) from None
        raise UsageError(f"{path} is broken, or is no checkpoint ({type(error).__name__})") from None


def saves_of(folder: Path) -> list[Path]:
    """The files, whole or not, that `save_resume` left in a run folder, the newest first."""
    return [file for name in RESUME if (file := folder / name).is_file()]


def save_resume(folder: Path, content: dict[str, Any]) -> None:
    """Write what a run needs to resume bit for bit; what was written there before is kept under the second name."""
    newest, before = (folder / name for name in RESUME)
    if newest.exists():
        before.unlink(missing_ok=True)
        try:
            before.hardlink_to(newest)  # so that there is a whole newest save all the time
        except OSError:  # a file system without links
            newest.replace(before)
    write_whole(newest, lambda file: torch.save(content, file))


def check_unused(folder: Path) -> None:
    """`UsageError` if the folder already holds a run; asked before anything is loaded or decoded."""
    if saves_of(folder):
        raise UsageError(f"{folder} already holds a run: resume it with --resume {folder}, or choose another --run.dir")


def load_resume(folder: Path) -> tuple[dict[str, Any], Path]:
    """The newest whole content that `save_resume` wrote there, and the file it is from.

    `UsageError` if there is none: what is wrong with the newest.
    """
    found = saves_of(folder)
    if not found:
        raise UsageError(f"{folder} has no {RESUME[0]}: the run stopped before its first save")
    for file in found:
        with suppress(UsageError):
            return _read_resume(file), file
    return _read_resume(found[0]), found[0]  # says what is wrong with it


def _read_resume(path: Path) -> dict[str, Any]:
    content = load_torch(path)  # which first refuses what is no checkpoint at all, with a reason
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch itself does not check the checksums it writes
    except Exception as error:  # broken bytes lead zipfile anywhere
        raise UsageError(f"{path} is broken: {error}") from None
    if broken:
        raise UsageError(f"{path} is broken: it is not what was written (the checksum of {broken} does not match)")
    if not isinstance(content, dict) or "step" not in content or "model" not in content:
        raise UsageError(f"{path} was not written by fastcr.train")
    return content


class Saver:
    """Writes the checkpoints of a run, and says when the next one is due."""

    def __init__(self, folder: Path, facts: dict[str, Any], minutes: float) -> None:
        self.folder, self.facts, self.minutes = folder, facts, minutes
        self.saved_at = time.monotonic()

    def save(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write both files as things are now."""
        # resume.pt last: what it has passed is there
        save_weights(self.folder / "weights.safetensors", weights, self.facts)
        save_resume(self.folder, state)
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self.saved_at >= 60 * self.minutes


def random_states() -> dict[str, Any]:
    """State of torch's generators, CPU and CUDA (the only ones the training draws from; views are stateless)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states that `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
