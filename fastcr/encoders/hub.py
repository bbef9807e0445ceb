"""Where an encoder's weights file is: here, or by huggingface_hub on the Hub, `hf://OWNER/NAME[@REVISION]`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastcr.errors import UsageError, one_line
from fastcr.runs.checkpoint import file_of

SCHEME, FILE = "hf://", "model.safetensors"


def address_of(source: str | os.PathLike[str]) -> str | None:
    """The address on the Hub that `source` is, if it is one: of the two slashes, pathlib keeps one."""
    named = os.fspath(source)
    return SCHEME + named.removeprefix("hf:").lstrip("/") if named.startswith("hf:/") else None


def find_weights(path_or_run: str | os.PathLike[str]) -> Path:
    """The weights file of a run folder, of an exported folder, from the Hub, or the path itself.

    `UsageError` if there is none.
    """
    if address := address_of(path_or_run):
        return fetch(address)
    source = Path(path_or_run)
    if not source.exists():
        raise UsageError(f"no run folder or weights file {source}")
    if (file := file_of(source)).is_dir():
        raise UsageError(f"{file} is not a run folder, or its run has saved nothing yet: no weights.safetensors in it")
    return file


def folder_of(path_or_run: str | os.PathLike[str]) -> Path:
    """Default folder of what a command makes of an encoder: that of its weights, or the working folder for the Hub."""
    return Path() if address_of(path_or_run) else find_weights(path_or_run).parent


def fetch(address: str) -> Path:
    """The weights file at an address `hf://OWNER/NAME[@REVISION]`, downloaded or from the library's cache.

    `UsageError` for whatever keeps it from here.
    """
    found = re.fullmatch(r"([^/@\s]+/[^/@\s]+)(?:@(\S+))?", address.removeprefix(SCHEME))
    if not found:
        raise UsageError(f"{address}: an address on the Hub is {SCHEME}OWNER/NAME or {SCHEME}OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(f'{address} needs huggingface_hub: pip install "fastcr[hub]"') from None
    repo, revision = found.groups()
    try:  # of this one file, for a snapshot falls back on the cache at once where there is no network
        file = Path(snapshot_download(repo, revision=revision, allow_patterns=[FILE]), FILE)
    except Exception as error:  # the client's, its HTTP library's and the system's have nothing in common
        raise UsageError(f"{address} cannot be fetched: {reason(error)}") from None
    if not file.is_file():
        raise UsageError(f"{address} cannot be fetched: there is no {FILE} in it")
    return file


def reason(error: Exception) -> str:
    """Why a request to the Hub failed, on one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) or type(error).__name__ in ("ConnectError", "ConnectTimeout"):
        return "no connection to the Hub"
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return "no such repository, or it is private: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    return one_line(error)
