"""Decoders as forks of one process that has imported everything: most of their time went into starting Python.

`streamt2v.media.isolated` starts a process for every look at a video. Here a server imports what that needs, once, and
each such process is a fork of it, with a memory limit of its own. Those of `tests/media/test_isolated.py`, and those of
every command line that is a process itself, are as users have them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

from streamt2v.media import isolated

REQUEST = b"."


class Popen:
    """What `isolated` uses of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], **_: Any) -> None:
        assert command[1:4] == ["-P", "-m", isolated.__name__]
        if b"\0" in b"".join(map(os.fsencode, command)):
            raise ValueError("embedded null byte")
        (theirs, asking), (answers, out), (told, telling) = os.pipe(), os.pipe(), os.pipe()
        ends = [os.open(".", os.O_RDONLY), theirs, out, telling]
        socket.send_fds(_server()[1], [REQUEST], ends)
        for end in ends:
            os.close(end)
        with os.fdopen(asking, "w") as file:
            json.dump([command[4:], dict(env)], file)
        self.stdout, self._told = os.fdopen(answers, "rb"), os.fdopen(told)
        self.pid, self.returncode = int(self._told.readline()), None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._told.readline())
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> "Popen":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.wait()
        self._told.close()


@contextmanager
def decoders() -> Iterator[SimpleNamespace]:
    """What stands in for the module `subprocess` in `isolated`; the server starts when it is first needed."""
    try:
        yield SimpleNamespace(Popen=Popen, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    finally:
        if _server.cache_info().currsize:
            process, here = _server()
            here.close()
            process.wait()


@cache
def _server() -> tuple[subprocess.Popen[bytes], socket.socket]:
    here, there = socket.socketpair()
    command = [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({there.fileno()})"]
    places = os.pathsep.join(map(os.path.abspath, sys.path))
    surroundings = {**os.environ, "PYTHONPATH": places, "OPENBLAS_NUM_THREADS": "1"}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=surroundings, pass_fds=[there.fileno()], **quiet)  # type: ignore[call-overload]
    there.close()
    return process, here


def serve(number: int) -> None:
    """Fork for every request, until nobody can make one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(fileno=number) as asked:
        while True:
            request, ends, *_ = socket.recv_fds(asked, 1, 4)
            if not request:
                return
            if os.fork() == 0:
                asked.close()
                _attend(*ends)
            for end in ends:
                os.close(end)


def _attend(folder: int, arguments: int, out: int, telling: int) -> None:
    """Fork once more, and tell the process id and the exit code of that."""
    os.fchdir(folder)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        _decode(arguments, out)
    os.close(out)
    os.write(telling, f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(BrokenPipeError):
        os.write(telling, f"{code}\n".encode())
    os._exit(0)


def _decode(arguments: int, out: int) -> None:
    code = 1
    try:
        with os.fdopen(arguments) as file:
            given, surroundings = json.load(file)
        os.dup2(out, 1)
        os.environ.clear()
        os.environ.update(surroundings)
        what, path, *more = given
        isolated._main(what, isolated.Path(path), *more)
        sys.stdout.flush()
        code = 0
    finally:
        os._exit(code)
