"""Read what is on this host under an agent's name or in its folders, to compare it before and after."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from holdfast.drivers import Host
from holdfast.mounts import mount_points

Fingerprint = Mapping[str, tuple[str, ...]]


def host_fingerprint(name: str, *folders: Path) -> Fingerprint:
    """Read what on this host bears a name or lies below folders: equal before and after for what touches nothing.

    Keys: mounts, links, netns, cgroups, tables (nftables), files (path, mode, owner, size, time of change).
    """
    return {
        "mounts": tuple(sorted(_mounts(name, folders))),
        "links": tuple(sorted(link for link in links() if link.startswith(f"{name}-"))),
        "netns": tuple(sorted(path.name for path in Path("/run/netns").glob(f"{name}-*"))),
        "cgroups": tuple(sorted(_cgroups(name))),
        "tables": tuple(line for line in tables() if name in line.split()[-1]),
        "files": tuple(sorted(line for folder in folders for line in _files(folder))),
    }


def fingerprint(host: Host) -> Fingerprint:
    """Read everything that is the agent's."""
    return host_fingerprint(host.name, host.root, host.run_root)


def names(host: Host) -> Fingerprint:
    """Read the names alone: sizes and times of folders change, and loop devices are numbered anew."""
    found = fingerprint(host)
    return {
        **found,
        "mounts": tuple(line.split(" ")[1] for line in found["mounts"]),
        "files": tuple(line.split("\t")[0] for line in found["files"]),
    }


def changes(before: Fingerprint, after: Fingerprint) -> list[str]:
    """List what is there no longer, and what is new."""
    return [
        f"{what} {key.removesuffix('s')} {line}"
        for key in before
        for what, one, other in (("no longer there:", before, after), ("new:", after, before))
        for line in sorted({*one[key]} - {*other[key]})
    ]


def links() -> set[str]:
    """Name the links of this network namespace."""
    return {name for _, name in socket.if_nameindex()}


def tables() -> list[str]:
    """List the nftables tables of this network namespace; none where nft is missing."""
    nft = shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if nft is None or os.geteuid() != 0:
        return []
    listed = subprocess.run([nft, "list", "tables"], capture_output=True, text=True, check=True)
    return sorted(listed.stdout.splitlines())


def _mounts(name: str, folders: tuple[Path, ...]) -> Iterator[str]:
    for each in mount_points():
        what = each.line.split(" ", 3)[3]  # without the mount ids
        if any(map(Path(each.point).is_relative_to, folders)) or f"/{name}" in what or f" {name}" in what:
            yield what


def _cgroups(name: str) -> Iterator[str]:
    root = Path("/sys/fs/cgroup")
    for parent in (root, *(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())):
        top = parent / name
        if top.is_dir():
            yield from (str(path) for path in (top, *top.rglob("*")) if path.is_dir())


def _files(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        return
    for path in (folder, *folder.rglob("*")):
        found = path.lstat()
        yield f"{path}\t{found.st_mode:o} {found.st_uid}:{found.st_gid} {found.st_size} {found.st_ctime_ns}"
