"""What is measured: a program that says "I run" as soon as it does, and the gate where it says so.

"Up" is when the program's own line arrives, not when some command returns. It ends on SIGTERM at once, so that
stopping it does not measure a grace period.
"""

from __future__ import annotations

import io
import os
import queue
import shutil
import subprocess
import tarfile
import threading
import time
from pathlib import Path

PROGRAM = r"""
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
    sigset_t end;
    char line[128] = {0};
    int fd, got;
    sigemptyset(&end);
    sigaddset(&end, SIGTERM);
    sigprocmask(SIG_BLOCK, &end, 0);
    strncpy(line, argc > 1 ? argv[1] : "?", sizeof line - 2);
    strcat(line, "\n");
    fd = open("/gate/ready", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, line, strlen(line)) < 0) return 1;
    close(fd);
    sigwait(&end, &got);
    return 0;
}
"""
SCRIPT = '#!/bin/sh\ntrap "exit 0" TERM\necho "$1" > /gate/ready\nwhile :; do sleep 3600 & wait $!; done\n'


def write_image(target: Path) -> str:
    """Write the root file system as a tar: one static program, or a busybox script where there is no C compiler.

    Returns which of the two it is. The command to run is `/ready NAME`.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    with tarfile.open(target, "w") as tar:
        for folder in ("bin", "dev", "etc", "gate", "proc", "sys", "tmp", "data"):
            _add(tar, folder, b"", tarfile.DIRTYPE)
        if compiler:
            program = target.with_name("ready")
            command = [compiler, "-static", "-O2", "-x", "c", "-o", str(program), "-"]
            subprocess.run(command, input=PROGRAM.encode(), check=True)
            _add(tar, "ready", program.read_bytes())
            return "a static C program"
        _add(tar, "bin/busybox", Path(shutil.which("busybox") or "/bin/busybox").read_bytes())
        for applet in ("sh", "sleep"):
            _add(tar, f"bin/{applet}", b"", tarfile.SYMTYPE)
        _add(tar, "ready", SCRIPT.encode())
        return "a busybox script"


def _add(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.size = kind, 0o755, len(content)
    entry.linkname = "busybox" if kind == tarfile.SYMTYPE else ""
    tar.addfile(entry, io.BytesIO(content))


class Gate:
    """A FIFO in a folder that every container mounts at /gate; a thread notes when each line arrives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o755)
        os.mkfifo(folder / "ready", 0o666)
        (folder / "ready").chmod(0o666)
        self.fd = os.open(folder / "ready", os.O_RDWR)  # also for writing: then no reader or writer ever sees an end
        self.arrivals: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        rest = ""
        while True:
            *lines, rest = (rest + os.read(self.fd, 65536).decode()).split("\n")
            for line in lines:
                self.arrivals.put((line, time.monotonic()))

    def wait(self, names: set[str], timeout: float = 180) -> float:
        """The moment (time.monotonic) at which the last of these names had reported. Raises TimeoutError."""
        missing, last, deadline = set(names), 0.0, time.monotonic() + timeout
        while missing:
            try:
                name, last = self.arrivals.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(
                    f"{len(missing)} of {len(names)} programs did not start: {sorted(missing)[:3]}"
                ) from None
            missing.discard(name)
        return last

    def clear(self) -> None:
        """Forget what has arrived so far."""
        while not self.arrivals.empty():
            self.arrivals.get()
