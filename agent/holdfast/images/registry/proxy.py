"""Ask a running skopeo for blobs: requests over a socket, content through pipes.

`pull` opens an image by its digest and hands the pipes to the store, so that the agent itself never touches the
content. The protocol is that of `skopeo experimental-image-proxy`, 0.2 and newer (cmd/skopeo/proxy.go): JSON in
datagrams of a SOCK_SEQPACKET socket; a blob's descriptor comes with SCM_RIGHTS, and its pipe is closed only after
FinishPipe.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from holdfast.images.registry.faults import BUSY, SILENT, SkopeoError, message_of

WAITING = "Too many requests to "  # skopeo then waits by itself, for minutes
LARGEST_REPLY = 64 << 10
TICK = 0.25  # seconds between looks at what can end a wait from outside


class Proxy:
    """One process; one blob at a time.

    start: starts skopeo with a socket as its standard input and a file as its standard error. patience: seconds
    that a reply may take.
    """

    def __init__(self, start: Callable[[int, BinaryIO], subprocess.Popen[bytes]], patience: float) -> None:
        self._patience = patience
        self._image: Any = None
        self._name = ""
        self._log: BinaryIO = os.fdopen(os.memfd_create("skopeo", os.MFD_CLOEXEC), "w+b")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        try:
            with theirs:
                self.process = start(theirs.fileno(), self._log)
        except BaseException:
            self._socket.close()
            self._log.close()
            raise
        self._send("Initialize")  # its reply is read when it is needed: skopeo starts meanwhile
        self._fresh = True

    def open(self, image: str) -> None:
        """Have `docker://NAME` open: all blobs are read from there."""
        if self._name == image:
            return
        if self._fresh:
            self._receive()
            self._fresh = False
        self._send("OpenImage", f"docker://{image}")
        self._image, self._name = self._receive()[0]["value"], image

    @contextmanager
    def blob(self, digest: str, size: int) -> Iterator[int]:
        """Lend a descriptor of the content, which ends where the blob ends; verified when the block ends.

        An error of the block is kept, unless skopeo says why there was less to read than there should have been.
        Raises SkopeoError. After any error the process is of no more use.
        """
        self._send("GetBlob", self._image, digest, size)
        reply, pipe = self._receive()
        self._send("FinishPipe", reply["pipeid"])
        try:
            try:
                yield pipe
            finally:
                os.close(pipe)
        except Exception as error:
            if (words := self._last_words()) is not None:
                raise SkopeoError(words) from error
            raise
        self._receive()

    def read(self, digest: str, size: int) -> bytes:
        """Read a whole blob of known size, which is small."""
        data = bytearray()
        with self.blob(digest, size) as pipe:
            deadline = time.monotonic() + self._patience
            while True:
                self._wait(pipe, deadline)
                chunk = os.read(pipe, 1 << 16)
                if not chunk:
                    break
                data += chunk
        return bytes(data)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._socket.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    def _last_words(self) -> str | None:
        """Ask skopeo why the content ended early; None if it did not, and we stopped reading."""
        try:
            self._receive(patience=1.0)
        except SkopeoError as error:
            return None if error.fault is SILENT or "broken pipe" in str(error) else str(error)
        return None

    def _send(self, method: str, *args: Any) -> None:
        request = json.dumps({"method": method, "args": args}).encode()
        try:
            self._socket.send(request)
        except OSError as error:
            raise SkopeoError(self._dying_words()) from error

    def _receive(self, patience: float | None = None) -> tuple[dict[str, Any], int]:
        """Receive the next reply, and the descriptor that came with it (-1: none)."""
        self._wait(self._socket.fileno(), time.monotonic() + (self._patience if patience is None else patience))
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, LARGEST_REPLY, 1)
        except OSError as error:
            raise SkopeoError(self._dying_words()) from error
        if not data:
            raise SkopeoError(self._dying_words())
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        reply: dict[str, Any] = json.loads(data)
        if not reply.get("success"):
            for descriptor in descriptors:
                os.close(descriptor)
            raise SkopeoError(str(reply.get("error") or "unknown error"))
        return reply, descriptors[0] if descriptors else -1

    def _wait(self, descriptor: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(TICK * 1000):
            if WAITING in logged(self._log):
                raise SkopeoError(BUSY.words, BUSY)
            if time.monotonic() >= deadline:
                raise SkopeoError(SILENT.words, SILENT)

    def _dying_words(self) -> str:
        try:
            self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "connection reset by skopeo"
        return message_of(logged(self._log)) or f"skopeo ended with {self.process.returncode}"


def logged(log: BinaryIO) -> str:
    """Read the end of a file that another process writes to, without moving the position that they share."""
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), min(size, 1 << 20), max(0, size - (1 << 20))).decode(errors="replace")
