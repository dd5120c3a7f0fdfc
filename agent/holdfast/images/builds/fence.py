"""Run one program in its own root, user namespace and cgroup, so that what breaks out of a build reaches nothing.

This is a process of its own, which `buildah` starts with PARENT_PID PLAN_FD CONTROL_FD; it imports nothing but system
calls, and that before it begins. PLAN_FD holds a JSON object, so that no argument of the program is in the command
line of any process but the program's own:

    program, environment, directory    what is run, where
    root                               a folder to mount the new root on: none of writable, and in none of them
    writable, readable                 paths of the host that are there, at the same place; nothing else of it is
    files                              path → text of small files
    cgroups                            folders of the cgroup to join, one for each hierarchy
    network                            "own" (a network namespace of its own, with only lo until somebody adds to it)
                                       or "host"

Inside, root is a user of the host who owns nothing (FIRST_ID), the program is the first process of its PID
namespace, and no cgroup is mounted. When the process that started the fence dies, even by SIGKILL, the fence dies
too, and the kernel ends everything inside: pid_namespaces(7), user_namespaces(7), mount_namespaces(7), prctl(2).

On CONTROL_FD, a socket, it sends the id of a process in the new namespaces, and waits for a byte before it goes on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from holdfast import syscalls
from holdfast.syscalls import call, mount

FIRST_ID, IDS = 0x7800_0000, 0x0400_0000  # of the host: above what directories give out, below systemd's own ranges

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
MS_RDONLY, MS_NOEXEC = 0x1, 0x8
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 0x1, 0x2, 0x4
AT_FDCWD, AT_RECURSIVE, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = -100, 0x8000, 0x1, 0x4
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442  # alike on every architecture
PR_SET_PDEATHSIG = 1
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# What programs need of /etc: how libraries are found, and whose certificates are trusted.
SETTINGS = ("/etc/ld.so.cache", "/etc/ssl/certs", "/etc/pki/tls/certs", "/etc/pki/ca-trust/extracted")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
FOLDERS = ("/proc", "/sys", "/etc", "/dev/pts", "/dev/shm")
OWN_FOLDERS = ("/tmp", "/var/tmp", "/run", "/root")
LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


def main() -> None:
    """Run the program to its end, and exit with its status: 128 and the signal if it was killed, 126 for an error."""
    try:
        with os.fdopen(int(sys.argv[3]), "rb") as file:
            plan = json.load(file)
        with socket.socket(fileno=int(sys.argv[4])) as control:
            control.set_inheritable(False)
            status = _fence(int(sys.argv[2]), plan, control)
    except OSError as error:  # of this process, or of a child of it
        hint = " (user namespaces: sysctl user.max_user_namespaces)" if error.errno == errno.ENOSPC else ""
        where = f" '{error.filename}'" if error.filename else ""
        print(f"Error: set up the sandbox{where}: {str(error.strerror).lower()}{hint}", file=sys.stderr, flush=True)
        status = 126
    os._exit(status)


def _fence(parent: int, plan: dict[str, Any], control: socket.socket) -> int:
    _die_with_parent()
    if os.getppid() != parent:
        return 1  # it died before we asked to die with it
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        control.close()
        _separate(theirs, plan)
    theirs.close()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGKILL))
    if ours.recv(1):
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{child}/{name}", "w") as file:  # noqa: PTH123
                file.write(f"0 {FIRST_ID} {IDS}\n")
        control.send(str(child).encode())
        if control.recv(1):
            ours.send(b"x")
    ours.close()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def _separate(control: socket.socket, plan: dict[str, Any]) -> None:
    """Enter cgroup and namespaces, and wait for the end of the program, which is the first process of its own."""
    _die_with_parent()
    for folder in plan["cgroups"]:
        with open(f"{folder}/cgroup.procs", "w") as file:  # noqa: PTH123
            file.write("0")
    _build_root(plan)
    own = syscalls.CLONE_NEWNET if plan["network"] == "own" else 0
    namespaces = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS | own
    call("unshare", namespaces, about="namespaces")
    control.send(b"x")
    if not control.recv(1):
        os._exit(1)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    _die_with_parent()  # a change of user forgets it
    inner, outer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(outer)
        control.close()
        _run(inner, plan)
    os.close(inner)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _run(parent_is_alive: int, plan: dict[str, Any]) -> None:
    """Become the program, behind the fence."""
    _die_with_parent()
    os.set_blocking(parent_is_alive, False)
    try:
        os.read(parent_is_alive, 1)  # its end: nobody is there any more
        os._exit(1)
    except BlockingIOError:
        os.close(parent_is_alive)
    if plan["network"] == "own":
        _raise_loopback()
    _enter_root(plan)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:  # noqa: PTH123
        file.write("0")  # a step is root of no further user namespace
    os.chdir(plan["directory"])
    os.execve(plan["program"][0], plan["program"], plan["environment"])


def _build_root(plan: dict[str, Any]) -> None:
    """Make a root that has what the program needs, and nothing else of the host; it becomes the current folder.

    As the host's root: the user behind the fence could not even look up most of it. What is mounted here, it can
    neither take off nor make writable (mount_namespaces(7), "Restrictions on mount namespaces").
    """
    call("unshare", CLONE_NEWNS, about="mounts")
    mount("none", Path("/"), flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    root = plan["root"]
    present = [*SYSTEM, *SETTINGS, *plan["readable"], *plan["writable"]]
    links = {path: os.readlink(path) for path in present if os.path.islink(path)}  # noqa: PTH114, PTH115
    held = {path: os.open(path, os.O_PATH) for path in present if path not in links and os.path.exists(path)}  # noqa: PTH110
    held |= {f"/dev/{name}": os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    mount("tmpfs", Path(root), "tmpfs", syscalls.MS_NOSUID, "mode=755")
    for path in (*FOLDERS, *OWN_FOLDERS):
        os.makedirs(root + path, exist_ok=True)  # noqa: PTH103
    for path in OWN_FOLDERS:
        os.chown(root + path, FIRST_ID, FIRST_ID)
    for path, target in (*links.items(), *((f"/dev/{name}", target) for name, target in LINKS.items())):
        os.makedirs(os.path.dirname(root + path), exist_ok=True)  # noqa: PTH103, PTH120
        os.symlink(target, root + path)  # noqa: PTH211
    for path, descriptor in held.items():
        ours = path in plan["writable"] or path.startswith("/dev/")
        _bind(descriptor, root + path, 0 if ours else MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    for path, text in plan["files"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(root + path, "w") as file:  # noqa: PTH123
            file.write(text)
    os.chdir(root)


def _enter_root(plan: dict[str, Any]) -> None:
    """Mount what belongs to the new namespaces in the current folder, and make that the root.

    The folder's own mount came with the namespace and is locked to it: a copy of it, on top, becomes the root.
    """
    flags = syscalls.MS_NOSUID | MS_NOEXEC
    copied = call("syscall", SYS_OPEN_TREE, AT_FDCWD, b".", OPEN_TREE_CLONE | AT_RECURSIVE, about="new root")
    call("syscall", SYS_MOVE_MOUNT, copied, b"", AT_FDCWD, b".", MOVE_MOUNT_F_EMPTY_PATH, about="new root")
    os.fchdir(copied)
    os.close(copied)
    mount("devpts", Path("dev/pts"), "devpts", flags, "newinstance,ptmxmode=0666,mode=620,gid=5")
    mount("shm", Path("dev/shm"), "tmpfs", flags | syscalls.MS_NODEV, "mode=1777,size=64m")
    mount("proc", Path("proc"), "proc", flags | syscalls.MS_NODEV)
    if plan["network"] == "own":  # only who owns the network may see it there
        mount("sysfs", Path("sys"), "sysfs", flags | syscalls.MS_NODEV | MS_RDONLY)
    call("pivot_root", b".", b".", about="new root")
    call("umount2", b".", syscalls.MNT_DETACH, about="host's root")
    os.chdir("/")


def _bind(descriptor: int, target: str, attributes: int) -> None:
    """Mount what a descriptor stands for at a new path, with all that is mounted below it."""
    source = f"/proc/self/fd/{descriptor}"
    if os.path.isdir(source):  # noqa: PTH112
        os.makedirs(target, exist_ok=True)  # noqa: PTH103
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, Path(target), flags=syscalls.MS_BIND | syscalls.MS_REC)
    wanted, place = struct.pack("4Q", attributes, 0, 0, 0), os.fsencode(target)  # struct mount_attr
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, place, AT_RECURSIVE, wanted, len(wanted), about=target)
    os.close(descriptor)


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def _die_with_parent() -> None:
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
