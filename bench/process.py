"""One command in a process of its own: how long it takes, the memory that it and its children hold, what it prints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastcr.errors import UsageError

EVERY = 0.2  # seconds between two looks at the memory
ROOT = Path(__file__).resolve().parents[1]


class Measured(NamedTuple):
    """What was seen of one command."""

    seconds: float  # from its start to its end
    first: float | None  # from its start to the line that matches `mark`
    peak_bytes: int  # most of the memory of its processes together, a page that several share counted once
    facts: dict[str, Any]  # the last line of JSON it printed


def memory_of(pid: int) -> int:
    """Bytes of main memory that a process and its children hold now (PSS: each page divided among its users)."""
    total = 0
    with contextlib.suppress(OSError):  # it may end while it is looked at
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(memory_of(int(child)) for child in (task / "children").read_text().split())
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += 1024 * int(re.search(r"^Pss:\s+(\d+)", rollup, re.M)[1])  # type: ignore[index]
    return total


def measure(command: Sequence[str], *, mark: str = "$^", environment: Mapping[str, str] | None = None) -> Measured:
    """Run `command` to its end; `UsageError` with its last line if it fails. `mark`: a regular expression."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
        text=True, errors="replace", env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )  # fmt: skip
    lines: list[str] = []
    marked: list[float] = []

    def read(stream: Iterable[str]) -> None:
        for line in stream:
            if not marked and re.search(mark, line):
                marked.append(time.perf_counter() - began)
            lines.append(line.strip())

    reader = threading.Thread(target=read, args=(process.stdout,))
    reader.start()
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EVERY)
        seconds = time.perf_counter() - began
    finally:
        if process.poll() is None:  # Ctrl-C
            process.terminate()
    reader.join()
    if process.returncode:
        last = next((line for line in reversed(lines) if line), "")
        raise UsageError(f"exit status {process.returncode}: {last[:200]}")
    found = [line for line in lines if line.startswith("{") and line.endswith("}") and len(line) > 2]
    return Measured(seconds, marked[0] if marked else None, peak, json.loads(found[-1]) if found else {})


def python_path() -> dict[str, str]:
    """The environment in which a child finds this checkout first."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
