"""Python processes that begin with torch and fastcr imported: forks of one server, for an import takes seconds.

`Forked` has of `subprocess.Popen` what tests use. What is started has its own stdout, stderr, environment, working
folder and exit status, as a fresh `python -m ...` has.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

PRELOADED = ("torch", "torchvision", "fastcr.train", "fastcr.evaluate")


class Forked:
    """A process of the server, as `subprocess.Popen(..., stdout=PIPE, stderr=PIPE, text=True)` gives one."""

    def __init__(self, command: list[str], environment: dict[str, str], session: bool = False) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.returncode: int | None = None
        self.command, self.stdout, self.stderr = command, os.fdopen(out), os.fdopen(err)
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(server())
        order = {"command": command, "environment": environment, "folder": os.getcwd(), "session": session}
        message = json.dumps(order).encode()
        socket.send_fds(self.connection, [len(message).to_bytes(4, "big")], [out_end, err_end])
        self.connection.sendall(message)
        os.close(out_end)
        os.close(err_end)
        self.pid = int(self._line())

    def _line(self) -> str:
        """The next line that the server's process sends; empty when it is gone."""
        line = b""
        while not line.endswith(b"\n") and (byte := self.connection.recv(1)):
            line += byte
        return line.decode()

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.returncode = int(self._line())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Exit status; `subprocess.TimeoutExpired` if it takes longer."""
        if self.returncode is None and not select.select([self.connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.command, timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All it has written to stdout and stderr, after its end."""
        texts = ["", ""]

        def read(number: int, stream: Any) -> None:
            texts[number] = stream.read()
            stream.close()

        streams = enumerate((self.stdout, self.stderr))
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in streams]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


@cache
def server() -> str:
    """Address of this test process's server; it ends with this process."""
    address = str(Path(tempfile.mkdtemp(prefix="forked-")) / "socket")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, address]
    # its stdin is closed when this process ends, however it does
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    atexit.register(process.stdin.close)
    return address


def serve(address: str) -> dict[str, Any]:
    """Fork a process for each connection until stdin is closed; returns, in each, what it is to do."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that watch over the processes need no one to wait for them
    while True:
        if sys.stdin in select.select([sys.stdin, listener], [], [])[0]:
            os.unlink(address)
            os.rmdir(os.path.dirname(address))
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return watch_over(connection)
        connection.close()


def watch_over(connection: socket.socket) -> dict[str, Any]:
    """Fork the process that the connection asks for and send its exit status; returns, in it, what it is to do."""
    length, streams, _, _ = socket.recv_fds(connection, 4, 2)
    order = json.loads(connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
            os.dup2(stream, number)
            os.close(stream)
        if order["session"]:
            os.setsid()
        return order
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    connection.sendall(f"{pid}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(f"{status}\n".encode())
    os._exit(0)


def carry_out(order: dict[str, Any]) -> None:
    """Be `python -m MODULE ARGUMENTS...` or `python -c CODE ARGUMENTS...` with that environment in that folder."""
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    kind, what, *arguments = order["command"]
    sys.argv, sys.path[0] = [kind, *arguments], order["folder"]
    if kind == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        sys.modules.pop(what, None)  # it becomes `__main__`
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in PRELOADED:
        __import__(name)
    carry_out(serve(sys.argv[1]))
