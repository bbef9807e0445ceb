"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def progress(items: Iterable[T], title: str, total: int | None = None, console: Console | None = None) -> Iterable[T]:
    """The items, with a bar that disappears at the end; none where there is no terminal. Default: on stderr."""
    console = console or Console(stderr=True)
    return track(items, title, total, console=console, transient=True, disable=not console.is_terminal)
