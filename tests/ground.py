"""Makes the ground that a test stands on: a site (name, places, addresses) and ports that no other test has."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeVar

from holdfast.drivers import BASE36, Host
from holdfast.identity import make_id
from holdfast.runtime.delegation import place_of

PORTS = range(20_000, 30_000)  # below the kernel's ephemeral range, which any client may take from
PATIENCE = float(os.environ.get("HOLDFAST_TEST_PATIENCE", "1"))  # how many times slower than usual this host is
T = TypeVar("T")

POOLS = tuple(IPv4Network("10.192.0.0/10").subnets(new_prefix=20))


@dataclass(frozen=True, slots=True)
class Rootfs:
    """A busybox root file system, as a directory and as a tar."""

    path: Path
    tar: Path


class Claims:
    """Numbers that no other test process on this host has: byte locks in one file, which die with their owner."""

    def __init__(self) -> None:
        self.fd = os.open(Path(tempfile.gettempdir()) / "holdfast-tests.lock", os.O_RDWR | os.O_CREAT, 0o600)

    def take(self, number: int) -> bool:
        claim = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, claim)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        os.close(self.fd)


def patient(seconds: float) -> float:
    """How long to wait here for what takes no more than so long on a usual host."""
    return seconds * PATIENCE


def wait_for(
    condition: Callable[[], T],
    what: str,
    seconds: float = 20.0,
    state: Callable[[], object] = str,
    *,
    pause: float = 0.01,
) -> T:
    """Call condition until it returns something true, and return that. The one place where tests wait for time.

    Raises AssertionError when the time is up, with what state() returns then. pause: seconds between two calls, more
    for what costs more to ask.
    """
    deadline = time.monotonic() + patient(seconds)
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}\n{state()}"
        time.sleep(patient(pause))
    return found


def make_site(stack: ExitStack) -> Host:
    """A site that lives until stack ends; its pool and name are its own on the whole host."""
    name = "t" + "".join(secrets.choice(BASE36) for _ in range(5))
    start = int(name, 36) % len(POOLS)
    claims = _claims(stack)
    index = next(i % len(POOLS) for i in range(start, start + len(POOLS)) if claims.take(i % len(POOLS)))
    root = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_real_disk()))
    stack.callback(_remove_tree, root)
    stack.callback(_remove_empty, Path("/run") / name)
    return Host(name, root, Path("/run") / name, str(POOLS[index]), make_id(root), cgroup_root=place_of(name))


def _remove_empty(folder: Path) -> None:
    """Remove the directories that drivers leave of a run root; what is more than that stays, and is a failure."""
    for place, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            Path(place).rmdir()


def find_port(stack: ExitStack, count: int = 1) -> int:
    """The first of count ports that nobody listens on, and that are promised to nobody else until stack ends."""
    claims = _claims(stack)
    while True:
        first = secrets.choice(PORTS[: -count or None])
        if all(claims.take(port) and _bindable(port) for port in range(first, first + count)):
            return first


def _claims(stack: ExitStack) -> Claims:
    claims = Claims()
    stack.callback(claims.release)
    return claims


def _bindable(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True


def _real_disk() -> str:
    """A folder that overlayfs takes as its upper layer: not itself on an overlay."""
    for folder in (tempfile.gettempdir(), "/var/tmp", "/dev/shm"):
        if _file_system(folder) != "overlay":
            return folder
    raise AssertionError("every place for temporary files is on overlayfs, which can't carry another overlay")


def _file_system(folder: str) -> str:
    device = Path(folder).stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            return fields[fields.index("-") + 1]
    return "unknown"


def _remove_tree(root: Path) -> None:
    """Delete, unless something is still mounted below: then deleting could reach what is not ours."""
    if str(root) not in Path("/proc/self/mountinfo").read_text():
        shutil.rmtree(root, ignore_errors=True)
