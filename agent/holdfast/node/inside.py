"""Predict what a container will see at each path: its image and all mounts over it, before anything is mounted.

Staging checks with it every path that the start will need: mount points, working directory, program, users' files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, UnfitHost, WrongState
from holdfast.images.kept.lookup import Content, Found, View, read_small
from holdfast.node.context import Base, Context
from holdfast.observed import Json
from holdfast.runtime.devices import DeviceNode
from holdfast.runtime.executables import HEAD, Candidate
from holdfast.runtime.oci import FILE_TARGETS, INIT_PATH
from holdfast.spec.model import Mount

LONGEST_NAME, LONGEST_PATH = 255, 4095  # NAME_MAX, PATH_MAX without the terminating zero
KERNELS = ("/proc", "/sys")  # nothing can be made there
#: What runc lets be mounted below /proc (libcontainer/rootfs_linux.go, checkProcMount).
RUNC_PROC = frozenset(
    (
        *("/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps", "/proc/uptime"),
        *("/proc/loadavg", "/proc/slabinfo", "/proc/net/dev", "/proc/sys/kernel/ns_last_pid"),
        "/proc/sys/crypto/fips_enabled",
    )
)


def content_of_mount(context: Context, base: Base, mount: Mount, stored: Path | None) -> Content:
    """What a mount of a state file will show. stored: the path of the content of a file of the revision."""
    match mount.kind:
        case "tmpfs":
            return Content(f"the tmpfs at '{mount.target}'", known=True, fixed=True, read_only=mount.read_only)
        case "file":
            what = f"'{mount.source}' of the repository"
            return _on_host(what, stored or Path("/"), mount, fixed=True)
        case "bind":
            return _on_host(f"'{mount.source}' of this host", Path(mount.source), mount)
        case "volume":
            receipt = context.store.receipt("volume", mount.source)
            path = str(receipt.data.get("path") or "") if receipt else ""
            what = f"volume '{mount.source}'"
            if path and Path(path).is_dir():
                return replace(_on_host(what, Path(path), mount), shared=True)
            seed = View(base.layers).resolve(mount.target)
            entries = seed.entries if seed.kind == "directory" else ()
            return Content(what, entries, shared=True, read_only=mount.read_only)
        case _:  # of a plugin: what is in it is not known before its driver has made it
            return Content(f"the {mount.kind} mount at '{mount.target}'", known=False, read_only=mount.read_only)


def _on_host(what: str, path: Path, mount: Mount, *, fixed: bool = False) -> Content:
    real = path.resolve()
    directory = real.is_dir() or not real.exists()  # create_host_path makes a directory
    entries = (real,) if real.exists() else ()
    mode = mount.mode if mount.kind == "file" else None
    return Content(what, entries, directory=directory, fixed=fixed, read_only=mount.read_only, mode=mode)


def mount_all(
    view: View, mounts: Iterable[Json], theirs: Mapping[str, Content], runtime: str
) -> Iterator[HoldfastError]:
    """Add the mounts of a config.json to the view, in their order; yield the errors that the runtime would have.

    theirs: target → what the state file mounts there; the rest are the runtime's own file systems and files.
    """
    for mount in mounts:
        target = mount["destination"]
        content = theirs.get(target) or _own(target)
        found = _in_kernels(view.resolve(target))
        wrong = _wrong_target(target, found, content)
        hidden = not found.content.known and found.path.startswith("/proc/") and found.path not in RUNC_PROC
        if not wrong and target in theirs and runtime == "runc" and hidden:
            wrong = f"runc mounts nothing at '{found.path}' (expected a target outside /proc)"
        if wrong:
            yield _error(f"mount {content.what} at '{target}': {wrong}", found.content, content)
        else:
            view.mount_at(found.path, content)


def mounted(base: Base, mounts: Iterable[Mapping[str, Any]]) -> View:
    """The view of a container whose mounts are all prepared, as its start sees it."""
    view = View(base.layers)
    for mount in sorted(mounts, key=lambda each: str(each["destination"]).rstrip("/").count("/")):
        path = Path(str(mount["source"]))
        there = mount["type"] == "bind" and path.exists()
        directory = path.is_dir() if there else True
        view.mount(mount["destination"], Content("a mount", (path,) if there else (), directory=directory))
    return view


def _own(target: str) -> Content:
    """What every container has: file systems of the kernel, and a few files."""
    what = "the container's own " + ("file" if target in (*FILE_TARGETS, INIT_PATH) else "file system")
    return Content(what, directory=what.endswith("system"), known=False, read_only=target.startswith(KERNELS))


def _in_kernels(found: Found) -> Found:
    """Below /proc and /sys, a container sees what this host has there."""
    if found.kind != "unknown" or not found.path.startswith(KERNELS):
        return found
    here = Path(found.path)
    return replace(found, kind="missing" if not here.exists() else "directory" if here.is_dir() else "file")


def _wrong_target(target: str, found: Found, content: Content) -> str:
    """Why content can't be mounted at a path; "" if it can."""
    longest = max(len(os.fsencode(step)) for step in target.split("/"))
    if len(os.fsencode(target)) > LONGEST_PATH or longest > LONGEST_NAME:
        return f"the path is too long (at most {LONGEST_NAME} bytes a step, {LONGEST_PATH} in all)"
    where = found.content.what
    at = f"'{found.path}' of {where}" if found.path != target.rstrip("/") else f"of {where}"
    kind = "directory" if content.directory else "file"
    match found.kind:
        case "blocked":
            return f"'{found.path}' of {where} is not a directory"
        case "file" | "directory" if found.kind != kind:
            return f"a {kind} can't be mounted on a {found.kind} ({at})"
        case "missing" if found.content.read_only:
            return f"{where} is read-only and has no such entry (expected it to be there)"
    return ""


def check_working_dir(view: View, folder: str) -> None:
    """Raise for a working directory that is none and can't be made."""
    found = view.resolve(folder)
    where = found.content.what
    if found.kind in ("file", "blocked"):
        raise _error(f"working_dir '{folder}': '{found.path}' of {where} is not a directory", found.content)
    if found.kind == "missing" and found.content.read_only:
        raise _error(f"working_dir '{folder}': {where} is read-only and has no such directory", found.content)


def check_devices(view: View, nodes: Iterable[DeviceNode]) -> None:
    """Raise for devices that can't be made at their paths."""
    for node in nodes:
        found = view.resolve(node.path)
        if found.kind in ("blocked", "file", "directory") and found.content.known:
            wrong = "is there already" if found.kind != "blocked" else "is not a directory"
            raise _error(f"device '{node.path}': '{found.path}' of {found.content.what} {wrong}", found.content)
        if found.content.read_only:
            raise _error(f"device '{node.path}': {found.content.what} is read-only", found.content)


def look(view: View, waits: bool, path: str) -> Candidate:
    """What would be executed at a path. waits: something else runs first, and may put it there."""
    found = view.resolve(path)
    content = found.content
    fixed, missing = content.fixed, found.kind in ("missing", "blocked")
    if found.kind == "unknown" or (missing and not fixed and (waits or content.shared)):
        return Candidate(found.path, known=False)
    there = Candidate(found.path, where=content.what, fixed=fixed)
    if missing:
        return there
    if not found.entries:
        return replace(there, mode=found.mode, known=found.kind == "directory")
    noexec = not fixed and bool(os.statvfs(found.entries[0]).f_flag & os.ST_NOEXEC)
    return replace(there, mode=found.mode, noexec=noexec, head=partial(_head, found.entries[0]))


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def read_file(view: View, path: str) -> bytes | None:
    """The content of a file as the container sees it; None if there is none."""
    found = view.resolve(path)
    if found.kind != "file" or not found.entries or not stat.S_ISREG(found.entries[0].lstat().st_mode):
        return None
    return read_small(found.entries[0])


def _error(message: str, *contents: Content) -> HoldfastError:
    """The error for what only a commit changes, or for what this host may repair."""
    return WrongState(message) if all(each.fixed for each in contents) else UnfitHost(message)
