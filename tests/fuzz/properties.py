"""What holds for broken input of every kind: it works or ends with one line that says why, in time; no file changes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcr.runs.command_line import one_line_errors

SECONDS = 10  # that an input may take: far more than any needs, for the machine may be busy
REFUSED = object()


class TooLongError(BaseException):
    """No `except Exception` of the code under test may catch it."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*signal_and_frame: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    except TooLongError:
        raise AssertionError(f"not done within {SECONDS} s") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` gives, run as the commands do; REFUSED if it ends with status 2 and one line that says why."""
    out, error = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), time_limit():
        warnings.simplefilter("ignore")  # PIL's, of odd metadata
        try:
            with one_line_errors("fuzz"):
                return work()
        except SystemExit as stop:
            status = stop.code
    error.flush()
    said = error.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
    assert status == 2, f"exit status {status}"
    asides = [line for line in said if line.startswith("fastcr: ")]  # such as shards without an index
    assert len(said) == len(asides) + 1, f"{len(said)} lines: {said}"
    assert re.match(r"fastcr[. ]\w+: error: ", said[-1])
    assert 20 < len(said[-1]) < 20_000
    return REFUSED


def contents(folder: Path) -> dict[Path, tuple[int, object]]:
    """Mode of every entry below `folder`, and the bytes of a file or the target of a link."""
    found: dict[Path, tuple[int, object]] = {}
    for base, folders, files in os.walk(folder):
        for path in map(Path(base).joinpath, folders + files):
            mode = path.lstat().st_mode
            found[path] = mode, path.read_bytes() if stat.S_ISREG(mode) else stat.S_ISLNK(mode) and os.readlink(path)
    return found


def reading(work: Callable[[], Any], folder: Path) -> Any:
    """`attempt`, and nothing in `folder` may change."""
    before = contents(folder)
    result = attempt(work)
    assert contents(folder) == before, "files have changed"
    return result


def fuzzed(*, sample: int, count: int, **drawn: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A slow test of an empty folder and what hypothesis draws.

    Its `sample` is the same inputs each time; all are `count` others each time. A failure prints what brings it back.
    """

    def test_of(check: Callable[..., None]) -> Callable[..., None]:
        def once(values: dict[str, Any]) -> None:
            with tempfile.TemporaryDirectory() as folder:
                os.chmod(folder, 0o755)  # for a user without privileges, too
                check(Path(folder), **values)

        inputs_of = given(values=st.fixed_dictionaries(drawn))
        how = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True)

        @pytest.mark.slow
        @pytest.mark.usefixtures("one_thread")
        @pytest.mark.parametrize("inputs", [pytest.param(sample, id="sample"), pytest.param(count, id="all")])
        def test(inputs: int) -> None:
            settings(how, max_examples=inputs, derandomize=inputs == sample)(inputs_of(once))()

        return test

    return test_of
