"""Find everything on this host that carries an agent's name, and remove it by force on request.

The demo and every live test check with it that nothing is left. ip_forward does not count: it belongs to the whole
host, and other programs may depend on it by then.

The name must not occur elsewhere on the host, because processes are found by it, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from holdfast.drivers import Host
from holdfast.files import discard_tree
from holdfast.identity import PLACE
from holdfast.runtime import apparmor
from holdfast.runtime.delegation import dissolve, unit_file


def leftovers(host: Host) -> list[str]:
    """List everything that carries the name, one line each. Changes nothing."""
    return list(find_leftovers(host))


def find_leftovers(host: Host) -> Iterator[str]:
    """The same, one by one: first what is quickly found, so that who waits for the last of it seldom looks at all."""
    yield from (f"netns {path.name}" for path in netns(host))
    yield from (f"link {path.name}" for path in links(host))
    yield from (f"cgroup {path}" for path in cgroups(host))
    yield from (f"delegation {path.name}" for path in delegations(host))
    yield from (f"mount {point}" for point in mounts(host))
    yield from (f"loop device {device}" for device in loops(host))
    yield from (f"AppArmor profile {name}" for name in profiles(host))
    yield from (f"process {pid}: {line}" for pid, line in processes(host))
    yield from (f"nft table {family} {name}" for family, name in tables(host))
    files = (*_files(host.run_root), PLACE / host.name, unit_file(host))
    yield from (f"file {path}" for path in files if path.exists())


def wait_clean(host: Host, timeout: float = 10.0) -> list[str]:
    """Wait until nothing is left, at most timeout seconds, and return what is left: the kernel removes some later."""
    deadline = time.monotonic() + timeout
    while any(find_leftovers(host)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return leftovers(host)


def sweep(host: Host) -> None:
    """Remove everything that carries the name by force, whether an agent runs or not."""
    for pid, _ in processes(host):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for point in reversed(list(mounts(host))):
        subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
    for path in netns(host):
        path.unlink(missing_ok=True)
    for path in links(host):
        subprocess.run(["ip", "link", "delete", path.name], check=False, capture_output=True)
    for family, name in tables(host):
        subprocess.run(["nft", "delete", "table", family, name], check=False, capture_output=True)
    for name in profiles(host):
        apparmor.remove(name)
    for device in loops(host):
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)
    _sweep_cgroups(host)
    (PLACE / host.name).unlink(missing_ok=True)
    dissolve(host)
    if not list(mounts(host)):
        discard_tree(host.run_root)


def processes(host: Host) -> Iterator[tuple[int, str]]:
    """Find processes with the name in their command line or in a cgroup of that name."""
    name, ours = os.fsencode(host.name), set(_pids(host))
    for folder in list(os.scandir("/proc")):
        line = _read(f"{folder.path}/cmdline") if folder.name.isdigit() else b""
        if line and (name in line or folder.name in ours) and int(folder.name) != os.getpid():
            yield int(folder.name), line.replace(b"\0", b" ").decode(errors="replace").strip()


def mounts(host: Host) -> Iterator[str]:
    """Find mount points in the agent's folders or with its name, in the order in which they were mounted."""
    marks = (str(host.root), f"{host.run_root}/", f"/{host.name}-")
    table = Path("/proc/self/mountinfo").read_text()
    if any(mark in table for mark in marks):
        yield from (line.split()[4] for line in table.splitlines() if any(mark in line for mark in marks))


def netns(host: Host) -> list[Path]:
    return sorted(Path("/run/netns").glob(f"{host.name}-*"))


def links(host: Host) -> list[Path]:
    return sorted(Path("/sys/class/net").glob(f"{host.name}-*"))


def cgroups(host: Host) -> list[Path]:
    """Find the cgroups of the agent and of its builds, in every hierarchy."""
    hierarchies = Path("/sys/fs/cgroup")
    names = {name for top in host.cgroups for name in (top[1:], f"{top[1:]}-build")}
    return [path for name in names for path in (hierarchies / name, *hierarchies.glob(f"*/{name}")) if path.is_dir()]


def delegations(host: Host) -> list[Path]:
    """Find the cgroup that systemd has delegated to the agent."""
    top = Path("/sys/fs/cgroup") / host.cgroup_root[1:]
    return [top] if host.cgroup_root and top.is_dir() else []


def tables(host: Host) -> list[tuple[str, str]]:
    """Find nftables tables that carry the name, as (family, name)."""
    listing = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout
    words = [line.split() for line in listing.splitlines()]
    return [(family, name) for _, family, name in words if host.name in name]


def profiles(host: Host) -> list[str]:
    """Find AppArmor profiles in the kernel for the agent's containers."""
    return sorted(name for name in apparmor.loaded() if name.startswith(f"{host.name}-"))


def loops(host: Host) -> list[str]:
    """Find loop devices backed by a file in the agent's folders."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if str(host.root) in backing.read_text():
                found.append(f"/dev/{backing.parents[1].name}")
    return found


def _pids(host: Host) -> Iterator[str]:
    """The numbers of the processes in the agent's cgroups, and in those of its monitors."""
    for top in (*cgroups(host), Path(f"/sys/fs/cgroup{host.cgroup_root}/conmon")):
        for folder, _, _ in os.walk(top):
            with contextlib.suppress(OSError):
                yield from (Path(folder) / "cgroup.procs").read_text().split()


def _read(path: str) -> bytes:
    """The first 64 KiB of a file of proc; empty where the process has ended. Path's reading costs twice as much."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            return os.read(handle, 1 << 16).strip(b"\0 ")
        finally:
            os.close(handle)
    return b""


def _files(folder: Path) -> list[Path]:
    return sorted(Path(top) / name for top, _, names in os.walk(folder) for name in names)  # some go as we look


def _sweep_cgroups(host: Host) -> None:
    for top in cgroups(host):
        for folder, _, _ in sorted(os.walk(top), reverse=True):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
