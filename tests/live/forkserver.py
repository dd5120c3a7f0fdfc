"""`holdfast …` in a process forked from one that has everything imported: what it costs is what the command does.

One server for each worker of pytest, begun when it is first asked. A command gets its own session, environment,
folder and descriptors, and finds the plugins that its PYTHONPATH adds. What must be the installed script (how it is
found, what it imports) is tested with the script.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

LARGEST = 1 << 20  # bytes of a request
ENVIRONMENT = dict(os.environ)  # the server's: nothing of the test that happens to ask it first
PR_SET_CHILD_SUBREAPER = 36
LONGEST = 4000  # bytes of a command line, as ps(1) shows it


class Process:
    """A command that runs: what the tests need of subprocess.Popen."""

    def __init__(self, pid: int, ended: int) -> None:
        """ended: a pipe from which the exit status comes."""
        self.pid, self.returncode = pid, None
        self._ended = ended

    returncode: int | None

    def poll(self) -> int | None:
        """The exit status (negative: the signal that killed it), None while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(["holdfast"], timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = int(os.read(self._ended, 100))
            os.close(self._ended)
        return self.returncode


def start(
    words: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], *, program: str = ""
) -> Process:
    """Run `holdfast words…` with these descriptors as standard input, output and error.

    program: a module beside this one whose main(words) is run instead.
    """
    ended, tell = os.pipe()
    asked = {"words": list(words), "environment": dict(environment), "cwd": str(Path.cwd()), "program": program}
    request = json.dumps(asked).encode()
    fds = array.array("i", [*descriptors, tell])
    connection = _server()
    connection.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    os.close(tell)
    return Process(int(connection.recv(100)), ended)


def run(words: Sequence[str], environment: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run `holdfast words…` to its end, with nothing to read. Raises subprocess.TimeoutExpired, and ends it then."""
    deadline = time.monotonic() + timeout
    pipes = os.pipe(), os.pipe()
    nothing = os.open(os.devnull, os.O_RDONLY)
    process = start(words, environment, [nothing, pipes[0][1], pipes[1][1]])
    for handle in (nothing, pipes[0][1], pipes[1][1]):
        os.close(handle)
    heard: dict[int, list[bytes]] = {pipe[0]: [] for pipe in pipes}
    with selectors.DefaultSelector() as selector:
        for handle in heard:
            selector.register(handle, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                if data := os.read(key.fd, 1 << 16):
                    heard[key.fd].append(data)
                else:
                    selector.unregister(key.fd)
    for handle in heard:
        os.close(handle)
    try:
        code = process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    out, err = ("".join(b"".join(data).decode().splitlines(keepends=True)) for data in heard.values())
    return subprocess.CompletedProcess(["holdfast", *words], code, out, err)


@cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, __file__, str(theirs.fileno()), " " * LONGEST]
    process = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=ENVIRONMENT)
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# -- the process ---------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Fork for each request; answer with the pid, and tell its pipe how it ended.

    Reaps orphans, too, as a good init does: a zombie that nobody takes keeps its container from ending.
    """
    _import_all()
    gc.freeze()
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl PR_SET_CHILD_SUBREAPER failed")
    rung, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}  # pid → pipe
    poller = select.poll()
    for handle in (connection.fileno(), rung):
        poller.register(handle, select.POLLIN)
    while True:
        for handle, _ in poller.poll():
            if handle == rung:
                os.read(rung, 1 << 16)
                _reap(running)
                continue
            message, passed, _, _ = connection.recvmsg(LARGEST, socket.CMSG_SPACE(4 * 4))
            if not message:
                return
            fds = array.array("i", passed[0][2])
            request = json.loads(message)
            main = importlib.import_module(request["program"]).main if request["program"] else None
            pid = os.fork()
            if pid == 0:
                _become(request, fds, main)
            for fd in fds[:3]:
                os.close(fd)
            running[pid] = fds[3]
            connection.send(str(pid).encode())


def _reap(running: dict[int, int]) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pipe = running.pop(ended[0], None)
            if pipe is not None:
                os.write(pipe, str(os.waitstatus_to_exitcode(ended[1])).encode())
                os.close(pipe)


def _import_all() -> None:
    """All that the agent and its commands import by and by; that begins no thread and looks at nothing."""
    for package in ("holdfast", "holdfast_plugins"):
        place = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(place, f"{package}."):
            importlib.import_module(module.name)


def _be_called(words: Sequence[str]) -> None:
    """Write the command over what the server was begun with: processes are known by their command lines."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start, arg_end of proc(5)
    line = b"\0".join(os.fsencode(word) for word in (sys.executable, *words))
    ctypes.memmove(begin, line[: end - begin - 1].ljust(end - begin, b"\0"), end - begin)


def _become(request: Mapping[str, Any], fds: Sequence[int], program: Callable[[Sequence[str]], int] | None) -> None:
    """Be the command, or the program; does not return."""
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
        os.closerange(3, max(fds) + 64)
        os.chdir(request["cwd"])
        added = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [place for place in added if place and place not in sys.path]
        sys.dont_write_bytecode = bool(request["environment"].get("PYTHONDONTWRITEBYTECODE"))
        os.environ.clear()
        os.environ.update(request["environment"])
        _be_called(["holdfast", *request["words"]])
        time.tzset()
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(number, mode), line_buffering=number == 2, errors=errors)
            for number, mode, errors in ((0, "rb", "strict"), (1, "wb", "strict"), (2, "wb", "backslashreplace"))
        )
        from holdfast.cli import main

        sys.argv = ["holdfast", *request["words"]]
        code = main() if program is None else program(request["words"])
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as end:
        serve(end)
