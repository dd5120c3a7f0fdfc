"""Runs inside a container, with the host's Python: tries each line of README's table and prints what it may, as JSON.

Nothing here changes anything outside the container, whatever it is allowed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CALLS = {  # x86_64 and aarch64
    "clone": (56, 220),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "setns": (308, 268),
}
NEWNS, NEWUSER = 0x00020000, 0x10000000


def call(name: str, *args: object) -> bool:
    """Whether a system call does anything but be refused."""
    number = CALLS[name][os.uname().machine == "aarch64"]
    return int(LIBC.syscall(number, *args)) >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS)


def works(act: Callable[[], object]) -> bool:
    try:
        act()
    except OSError as error:
        return error.errno not in (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS)
    return True


def forked(act: Callable[[], bool]) -> bool:
    """What act says in a process of its own: it may leave it in another namespace."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if act() else 1)
    return os.waitpid(pid, 0)[1] == 0


def unshare(flags: int) -> bool:
    return forked(lambda: LIBC.unshare(flags) == 0)


def clone(flags: int) -> bool:
    number = CALLS["clone"][os.uname().machine == "aarch64"]
    pid = LIBC.syscall(number, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return pid > 0 and os.waitpid(pid, 0)[1] == 0


def listens() -> bool:
    """As nobody, on port 81."""
    os.setuid(65534) if os.geteuid() == 0 and works(lambda: os.setgroups([])) else None
    with socket.socket() as door:
        return works(lambda: door.bind(("127.0.0.1", 81)))


def opened(family: int, kind: int, protocol: int = 0) -> bool:
    return works(lambda: socket.socket(family, kind, protocol).close())


def node(number: int, kind: int) -> str:
    path = f"/tmp/node-{os.getpid()}-{number}"
    os.mknod(path, kind | 0o600, number)
    return path


def opens(device: str, kind: int, number: int) -> bool:
    """The device's own node, where the container has one, else one that is made."""

    def attempt() -> None:
        os.close(os.open(device if Path(device).exists() else node(number, kind), os.O_RDONLY))

    return works(attempt)


def executes(program: str) -> bool:
    pid = os.fork()
    if pid == 0:
        os.close(1)
        try:
            os.execv(program, ["busybox", "true"])
        except OSError:
            os._exit(126)
    return os.waitpid(pid, 0)[1] == 0


def processes() -> bool:
    places = ("/sys/fs/cgroup/pids/pids.max", "/sys/fs/cgroup/pids.max")
    text = next(Path(place).read_text().strip() for place in places if Path(place).exists())
    return text == "max" or int(text) > 2048


def traces() -> bool:
    """PTRACE_ATTACH to a child that waits."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    may: bool = LIBC.ptrace(16, pid, 0, 0) == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0x40000000)  # __WALL
    return may


def root_of_its_files() -> bool:
    path = f"/tmp/file-{os.getpid()}"
    Path(path).touch()
    return works(lambda: os.chown(path, 12, 34)) and forked(
        lambda: works(lambda: os.chroot("/tmp")) and works(lambda: os.setuid(12))
    )


def masked() -> bool:
    """Whether anything that ought to be hidden shows content."""
    files = ("/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug")
    shown = [path for path in files if Path(path).exists() and not stat.S_ISCHR(Path(path).stat().st_mode)]
    folders = ("/sys/firmware", "/proc/acpi", "/proc/scsi", "/sys/devices/virtual/powercap")
    return bool(shown) or any(any(Path(path).iterdir()) for path in folders if Path(path).is_dir())


def no_new_privileges() -> bool:
    return "NoNewPrivs:\t1" in Path("/proc/self/status").read_text()


def writes(path: str) -> bool:
    """Opened for writing only: nothing is written."""
    return works(lambda: os.close(os.open(path, os.O_WRONLY)))


def interface() -> bool:
    """SIOCSIFFLAGS with the flags that lo has."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(door, 0x8913, request)
        return works(lambda: fcntl.ioctl(door, 0x8914, request))


PROBES: dict[str, Callable[[], bool]] = {
    "be root of its own files: chown, setuid, chroot, kill": root_of_its_files,
    "listen on ports below 1024": lambda: forked(listens),
    "create device nodes": lambda: works(lambda: node(os.makedev(1, 3), stat.S_IFCHR)),
    "open a device of the host, as a disk or its log": lambda: opens("/dev/none", stat.S_IFCHR, os.makedev(1, 11)),
    "open /dev/net/tun": lambda: opens("/dev/net/tun", stat.S_IFCHR, os.makedev(10, 200)),
    "have more than 2,048 processes and threads": processes,
    "send and receive raw packets": lambda: (
        opened(socket.AF_PACKET, socket.SOCK_RAW) and opened(socket.AF_INET, socket.SOCK_RAW, 1)
    ),
    "ping by an ICMP socket": lambda: opened(socket.AF_INET, socket.SOCK_DGRAM, 1),
    "execute a program with the file capability cap_net_raw": lambda: executes(sys.argv[1]),
    "change addresses, routes or firewall rules of its network": interface,
    "talk to the machine below a virtual one (vsock)": lambda: opened(socket.AF_VSOCK, socket.SOCK_STREAM),
    "create a user namespace": lambda: unshare(NEWUSER),
    "create any other namespace, by unshare or clone": lambda: unshare(NEWNS) or clone(NEWNS),
    "enter another namespace": lambda: call("setns", -1, 0),
    "mount a file system": lambda: LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 and LIBC.umount(b"/tmp") == 0,
    "change its host name": lambda: works(lambda: socket.sethostname(socket.gethostname())),
    "use io_uring": lambda: call("io_uring_setup", 0, 0),
    "use the kernel's keyrings": lambda: call("keyctl", 0, -3, 0),
    "load programs into the kernel (bpf)": lambda: call("bpf", 9999, 0, 0),
    "read the kernel's log": lambda: LIBC.klogctl(10, None, 0) >= 0,
    "gain rights by setuid programs": lambda: not no_new_privileges(),
    "trace its own processes": traces,
    "read /proc/interrupts and what else tells of the host (masked as Docker masks it)": masked,
    "write to /proc/sys": lambda: writes("/proc/sys/kernel/domainname"),
    "write to /sys, cgroups included": lambda: writes(
        next(str(path) for path in Path("/sys/fs/cgroup").rglob("cgroup.procs"))
    ),
}

if __name__ == "__main__":
    print(json.dumps({what: probe() for what, probe in PROBES.items()}))
