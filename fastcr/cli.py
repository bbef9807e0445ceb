"""Settings from a command line or a YAML file, and mistakes in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastcr.config import Config, UsageError, tyro

C = TypeVar("C")


def parse(cls: type[C], args: Sequence[str], *, default: C | None = None, prog: str, description: str | None) -> C:
    """`tyro.cli` with each mistake on one line.

    Raises `UsageError` for a flag or value it cannot use, or without tyro; prints and exits 0 for `--help`.
    """
    if tyro is None:
        raise UsageError("the command line needs tyro: pip install tyro")
    options: dict[str, Any] = {"use_underscores": True} | ({} if default is None else {"default": default})
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(
                cls, args=args, prog=prog, description=description, config=(tyro.conf.FlagConversionOff,), **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(caught.getvalue())) from None


def _one_line(box: str) -> str:
    """The first paragraph of one of tyro's error boxes, and the flag it suggests."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    if len(lines) > 1 and set(lines[1]) == {"-"}:  # where the terminal is not UTF-8 the title is a line of its own
        del lines[1]
    del lines[:1]
    rules = [i for i, line in enumerate(lines) if line.startswith(("──", "---"))] or [len(lines)]
    message = " ".join(lines[: rules[0]]).strip().rstrip(".")
    after = " ".join(lines[rules[0] :])
    if "erhaps you meant" in after and (guess := re.search(r"--[\w.]+", after)):
        message += f" (did you mean {guess.group()}?)"
    return message or box.strip()


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn `UsageError` into `<command>: error: <message>` on stderr and exit status 2."""
    try:
        yield
    except (UsageError, OSError) as error:  # OSError: a full disk, a folder taken away
        # the names of files may hold anything: what is not printable is shown as Python writes it
        message = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(error))
        print(f"{command}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def save_config(config: Config, path: Path) -> None:
    """Write `config` as YAML."""
    text = yaml.safe_dump(dataclasses.asdict(config, dict_factory=_plain), sort_keys=False)
    path.write_text(text)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in items}


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote; `UsageError` if it is missing or holds a setting or value nobody knows."""
    try:
        sections = yaml.safe_load(path.read_text())
        preset = sections.pop("preset", Config.preset)
        settings = [(f"{section}.{key}", value) for section, keys in sections.items() for key, value in keys.items()]
        # before a nest of lists is written out
        if not isinstance(preset, str) or any(isinstance(value, list | dict | set) for _, value in settings):
            raise TypeError
        flags = [f"--{name}={value}" for name, value in settings]
    except FileNotFoundError:
        raise UsageError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except (yaml.YAMLError, AttributeError, TypeError, OSError, ValueError, RecursionError):
        raise UsageError(f"{path} is broken: it does not hold sections of settings") from None
    try:
        # through the command line's own checks: a file edited by hand gets the same messages
        return dataclasses.replace(parse(Config, flags, prog="config.yaml", description=None), preset=preset)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
