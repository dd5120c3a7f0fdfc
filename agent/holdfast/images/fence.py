"""Runs one program in namespaces of its own, so that its processes and mounts end with it, whatever happens.

    python -I -S fence.py PARENT_PID KEPT:KEPT:… PROGRAM [ARGUMENT …]

A process of its own, without imports of ours: `build` starts it. When the one who started it dies, even by SIGKILL,
the fence does too, and with it, by the kernel, everything inside: pid_namespaces(7), mount_namespaces(7), prctl(2).
Of the host's mounts only those stay that lead to a KEPT path, or to what every program needs: a build that takes an
hour must not hold a volume or a container's root that the host has let go of long since.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import sys
from collections.abc import Iterable

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID = 0x20000, 0x4000000, 0x8000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x4000, 0x40000
MNT_DETACH, UMOUNT_NOFOLLOW = 0x2, 0x8
PR_SET_PDEATHSIG = 1

# With all that is mounted below them: programs and their settings, single files of which may be mounts.
SYSTEM = ("/proc", "/sys", "/dev", "/usr", "/etc", "/bin", "/sbin", "/lib", "/lib64", "/opt", "/nix/store")
NEEDED = ("/var", "/root", "/run", "/tmp")

_libc = ctypes.CDLL(None, use_errno=True)


def main(parent: int, kept: list[str], command: list[str]) -> int:
    """Run the command to its end; its exit status, 128 and the signal if it was killed."""
    _die_with_parent()
    if os.getppid() != parent:
        return 1  # it died before we asked to die with it
    _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS), "unshare")
    _check(_libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "make the mounts private")
    for point in detached(mount_points(), [*kept, *NEEDED]):
        _libc.umount2(os.fsencode(point), MNT_DETACH | UMOUNT_NOFOLLOW)
    inner, outer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(outer)
        _run(inner, command)
    os.close(inner)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGKILL))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def detached(points: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Which mount points to let go of, the last mounted first."""
    steps = [path.rstrip("/") + "/" for path in (os.path.realpath(each) for each in kept)]

    def needed(point: str) -> bool:
        below_system = any(point == each or point.startswith(f"{each}/") for each in SYSTEM)
        return below_system or any(path.startswith(point.rstrip("/") + "/") for path in steps)

    return [point for point in reversed(list(points)) if not needed(point)]


def mount_points() -> list[str]:
    """Every mount point of this namespace, in the order of proc_pid_mountinfo(5)."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:  # noqa: PTH123 - as few imports as can be
        words = (line.split(" ")[4] for line in file)
        return [re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word) for word in words]


def _run(outer_is_alive: int, command: list[str]) -> None:
    """Become the command, as the first process of the namespace: with it, all others end."""
    _die_with_parent()
    if select.select([outer_is_alive], [], [], 0)[0]:
        os._exit(1)
    os.close(outer_is_alive)
    _check(_libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None), "mount /proc")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"Error: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(127)


def _die_with_parent() -> None:
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _check(result: int, what: str) -> None:
    if result != 0:
        print(f"Error: {what}: {os.strerror(ctypes.get_errno())}", file=sys.stderr, flush=True)
        os._exit(126)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), [path for path in sys.argv[2].split(":") if path], sys.argv[3:]))
