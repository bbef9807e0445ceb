"""The folder of a run: made new, or taken up again, by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from fastcr.config import Config
from fastcr.errors import UsageError
from fastcr.runs.command_line import save_config


def claim_folder(config: Config, resume: Path | None, folders: ExitStack) -> Path:
    """The folder in `resume`, or a new one. `UsageError` if it cannot be made, or if another process writes into it."""
    named = config.run.dir or Path("runs") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = resume or Path(named)
    try:
        for number in count(2) if config.run.dir is None and resume is None else ():
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                break
            folder = named.with_name(f"{named.name}-{number}")  # another run began in the same second
        folder.mkdir(parents=True, exist_ok=True)
        folders.enter_context(only_writer(folder))
        if resume is None:
            save_config(config, folder / "config.yaml")  # here, to find out early that it can be written
    except OSError as error:
        raise UsageError(f"cannot write into --run.dir {folder}: {error.strerror}") from None
    return folder


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Refuse, as `UsageError`, to write into a run folder that another process is writing into."""
    file = folder / ".lock"
    with file.open("w") as opened:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when this process ends, however it does
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UsageError(f"another process is writing into {folder}") from None
            reason = f"no locks there ({error.strerror}), so a second process that writes would not be noticed"
            print(f"fastcr: {folder}: {reason}", file=sys.stderr)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
