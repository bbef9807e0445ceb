"""What this machine has: devices, cores, memory."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastcr.errors import UsageError


def pick_device(name: str, local_rank: int = 0, local_ranks: int = 1) -> torch.device:
    """The device `--run.device` names; auto: CUDA when there is one. `UsageError` if it is not there.

    Of several processes on a machine, each takes the CUDA device of its own number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, numbered, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (numbered and not number.isdecimal()):
        raise UsageError(f"--run.device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cpu":
        return torch.device("cpu")
    device, there = torch.device("cuda", int(number or local_rank)), torch.cuda.device_count()
    if max(device.index, local_ranks - 1) >= there or (numbered and local_ranks > 1):
        each = f", and each of {local_ranks} processes takes its own" if local_ranks > 1 else ""
        raise UsageError(f"--run.device {name}: this machine has {there} CUDA devices{each}")
    torch.cuda.set_device(device)  # where kernels are launched
    return device


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware, with AVX-512 or AMX instructions."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What `--run.precision` means on `device`."""
    bf16 = device.type == "cuda" or multiplies_bf16() if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def pick_workers(workers: int | None, local_ranks: int = 1) -> int:
    """`--data.workers`, or this process's share of the cores that it may run on."""
    return max(len(os.sched_getaffinity(0)) // local_ranks, 1) if workers is None else workers


def _leave_signals(worker: int) -> None:
    """In a loader process: leave signals that go to a whole job (Ctrl-C, a scheduler's SIGTERM) to the main process.

    The main process still needs batches until it has saved. Then it ends its loader processes with its own SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_the_parents_word, daemon=True).start()


def _end_at_the_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def load_batches(
    dataset: Dataset[Any], batches: Iterable[Any], collate: Any, workers: int, size: int, device: torch.device
) -> Iterator[Any]:
    """What `collate` makes of the items of each batch, about `size` bytes; `workers` processes load them.

    The processes end with this generator; a `UsageError` in one of them is raised here.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers_that_fit(workers, size),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals,
    )
    iterator, failed = iter(loader), ""
    try:
        yield from iterator
    except UsageError as error:
        failed = str(error)
    finally:  # before torch ends them: it prints an error for a process that was forked by another thread
        processes = getattr(iterator, "_workers", [])
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)
    if failed:  # raised here, outside the handler: torch's error keeps a reference to the iterator
        raise UsageError(failed.rstrip().rpartition(f"{UsageError.__name__}: ")[2])


def workers_that_fit(workers: int, batch: int) -> int:
    """`workers`, or as many as /dev/shm has room for: each keeps three batches of `batch` bytes there.

    A container has 64 MB of it by default, and a loader process that finds it full hangs without a word.
    """
    shm = "/dev/shm"  # noqa: S108 (nothing is written there by this name)
    room = os.statvfs(shm)
    free = room.f_bavail * room.f_frsize
    fit = min(workers, free // (3 * batch))
    if fit < workers:
        room_left = f"{shm} has {free / 1e6:.0f} MB free"
        print(f"fastcr: {room_left}: {fit} loader processes, not {workers} (docker run --shm-size)", file=sys.stderr)
    return fit


def free_memory() -> int:
    """Bytes of main memory this process may still take: the machine's, or what its container leaves."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["file"])  # what is read of files gives way
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free


def process_age() -> float:
    """Seconds since this process was started."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def cache_folder() -> Path:
    """fastcr's folder in the user's cache: `$XDG_CACHE_HOME/fastcr`, or else `~/.cache/fastcr`; it may not exist.

    Where that cannot be written, as in a read-only home, it is the user's own folder among the temporary ones; so it
    is for a user without a home, such as one that a container knows by number alone.
    """
    folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "fastcr"
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return folder
    return Path(tempfile.gettempdir()) / f"fastcr-{os.getuid()}"


def keep_compiled() -> None:
    """Let compiled encoders outlive a reboot: unless the user says where, torch.compile keeps them in /tmp."""
    name, default = "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor_")
    if os.environ.get(name, default).startswith(default):  # torch may have set it on import
        os.environ[name] = str(cache_folder() / "compiled")
