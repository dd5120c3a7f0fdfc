"""Control groups: merge what policies set, write limits, read what the kernel has, remove cgroups.

Files are those of cgroup v1 (Documentation/admin-guide/cgroup-v1) or v2 (cgroup-v2.rst), depending on which tree owns
the memory and cpu controllers. Paths are relative to each hierarchy's root, as `Host.cgroup` is. Called by the node
and by `runtime.conmon`.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from holdfast.drivers import CgroupPolicy, CgroupWant
from holdfast.errors import HoldfastError, TryAgain, UnfitHost, explained
from holdfast.files import names_in
from holdfast.mounts import mount_points
from holdfast.observed import Json, Limits
from holdfast.spec.model import Resources, digest_of

ROOT = Path("/sys/fs/cgroup")
NO_LIMIT = -1
DEFAULT_SHARES = 1024
DEFAULT_PERIOD = 100_000  # microseconds
BRIEF = 0.002  # seconds between two looks where the kernel announces nothing
LARGEST_MEMORY = 2**62  # bytes; v1 says "no limit" as the largest multiple of a page below 2**63
LINKS_OF_A_LEAF = 2  # its own name and `.`; each cgroup in it adds one
_mounted: tuple[tuple[str, ...], tuple[Path, ...]] = ((), ())  # the kernel's hierarchies, and where they are

#: OCI throttle lists → v1 file, v2 key in io.max.
_THROTTLES = {
    "throttleReadBpsDevice": ("blkio.throttle.read_bps_device", "rbps"),
    "throttleWriteBpsDevice": ("blkio.throttle.write_bps_device", "wbps"),
    "throttleReadIOPSDevice": ("blkio.throttle.read_iops_device", "riops"),
    "throttleWriteIOPSDevice": ("blkio.throttle.write_iops_device", "wiops"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The result of a container's policies. warnings: what this host can't do and is left out."""

    resources: Json
    oom_score_adj: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Equal for equal settings: it shows when the policies set something else."""
        return digest_of({"resources": self.resources, "oom_score_adj": self.oom_score_adj})


@dataclass(frozen=True, slots=True)
class Features:
    """Optional features of a host's cgroups."""

    swap: bool = True
    io_weight: bool = True


@dataclass(frozen=True, slots=True)
class Usage:
    """What a container uses: bytes of memory, seconds of CPU so far, processes. None: not known on this host."""

    memory: int | None
    cpu: float | None
    pids: int | None


def policy_names(resources: Resources) -> tuple[str, ...]:
    """The policies for a table: those it names, else `limits`, and `qos` if it has a service class."""
    return resources.policy or (("limits", "qos") if resources.service_class else ("limits",))


def compose(policies: Iterable[CgroupPolicy], want: CgroupWant, features: Features | None = None) -> Settings:
    """Merge the settings of policies, later ones win key by key, and leave out what the host can't do."""
    merged: dict[str, Any] = {}
    for policy in policies:
        merged = _merge(merged, policy.settings(want))
    resources, able, warnings = merged.get("resources", {}), features or Features(), []
    if not able.swap and "swap" in resources.get("memory", {}):
        resources = _without(resources, "memory", "swap")
        warnings.append("memory_swap is left out: this kernel does not account for swap")
    if not able.io_weight and "weight" in resources.get("blockIO", {}):
        resources = _without(resources, "blockIO", "weight")
        warnings.append("io_weight is left out: this kernel has no I/O scheduler with weights")
    return Settings(resources, merged.get("oom_score_adj"), tuple(warnings))


def _merge(old: Json, new: Json) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        merged[key] = _merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def _without(resources: Json, table: str, key: str) -> Json:
    return {**resources, table: {name: value for name, value in resources[table].items() if name != key}}


def version() -> int:
    """The version of the tree that owns the memory and cpu controllers: 2 if the v2 tree is at the root, else 1."""
    return 2 if os.path.exists(f"{ROOT}/cgroup.controllers") else 1  # noqa: PTH110 - asked ten times in a start


def features(runtime: str = "runc") -> Features:
    """Detect the features of this host. crun does not know v1's weights of the BFQ scheduler."""
    if version() == 2:
        owned = (ROOT / "cgroup.controllers").read_text().split()
        weighs = (ROOT / "io.cost.qos").exists() or Path("/sys/module/bfq").exists()
        return Features(swap=Path("/proc/swaps").exists(), io_weight="io" in owned and weighs)
    weights = runtime != "crun" and any(name.startswith("blkio.bfq.") for name in names_in(ROOT / "blkio"))
    return Features(swap=(ROOT / "memory/memory.memsw.limit_in_bytes").exists(), io_weight=weights)


def hierarchies() -> tuple[Path, ...]:
    """The mount points of every cgroup hierarchy of this host.

    Cached, because every start asks and mountinfo has lines for each container. Searched again when the kernel has
    other hierarchies (/proc/self/cgroup), and while one of them is not mounted.
    """
    global _mounted
    own = (_read("/proc/self/cgroup") or "").splitlines()
    kept = tuple(line.split(":", 2)[1] for line in own)
    if _mounted[0] != kept:
        found = tuple(dict.fromkeys(Path(each.point) for each in mount_points("cgroup", "cgroup2")))
        if len(found) < len(kept):
            return found
        _mounted = kept, found
    return _mounted[1]


def folder(controller: str, path: str) -> Path:
    """The directory of a cgroup in the hierarchy that owns a controller."""
    return Path(_place(controller, path, version()))


def _place(controller: str, path: str, tree: int) -> str:
    return f"{ROOT}/{path.lstrip('/')}" if tree == 2 else f"{ROOT}/{controller}/{path.lstrip('/')}"


def folders(path: str) -> list[str]:
    """The directories of a cgroup that exist, one for each hierarchy."""
    places = (f"{root}/{path.lstrip('/')}" for root in hierarchies())
    return [place for place in places if os.path.isdir(place)]  # noqa: PTH112 - of a dozen hierarchies, at every start


def limit_folders(path: str) -> list[Path]:
    """The directories of a cgroup that exist and hold files that limits are written to."""
    tree = version()
    places = {Path(_place(controller, path, tree)) for controller, _ in _files(tree)}
    return [place for place in places if place.is_dir()]


def children(place: Path | str) -> list[str]:
    """The names of the cgroups directly below one; none if it does not exist."""
    try:
        with os.scandir(place) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def snapshot(path: str) -> dict[str, str]:
    """Read every file that limits are written to: name → content. Files that this kernel lacks are left out.

    If it differs from the snapshot that was taken right after limits were written, somebody changed them.
    """
    tree = version()
    read = ((name, _read(f"{_place(controller, path, tree)}/{name}")) for controller, name in _files(tree))
    return {name: content for name, content in read if content is not None}


@lru_cache(maxsize=2)
def _files(tree: int) -> list[tuple[str, str]]:
    """The controller and the name of each file that limits are written to."""
    throttles = ("io.max",) if tree == 2 else (v1 for v1, _ in _THROTTLES.values())
    return [(name.partition(".")[0], name) for name in (*values({}, tree), *throttles)]


def _read(path: str) -> str | None:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a thousand containers are read in one pass
            return file.read().decode().strip()
    except OSError:
        return None


def values(resources: Json, version: int) -> dict[str, str]:
    """The content for each file that limits are written to (see `apply`), except throttles; pure.

    What resources leave out gets the value of a new cgroup: no limit.
    """
    memory, cpu = resources.get("memory", {}), resources.get("cpu", {})
    limit, swap = memory.get("limit", NO_LIMIT), memory.get("swap", NO_LIMIT)
    quota, period = cpu.get("quota", NO_LIMIT), cpu.get("period", DEFAULT_PERIOD)
    shares, weight = cpu.get("shares"), resources.get("blockIO", {}).get("weight")
    common = {
        "pids.max": _or_max(resources.get("pids", {}).get("limit", NO_LIMIT)),
        "cpuset.cpus": cpu.get("cpus", ""),
    }
    if version == 1:
        return common | {
            "memory.limit_in_bytes": str(limit),
            "memory.memsw.limit_in_bytes": str(swap),
            "memory.soft_limit_in_bytes": str(memory.get("reservation", NO_LIMIT)),
            "cpu.cfs_period_us": str(period),
            "cpu.cfs_quota_us": str(quota),
            "cpu.shares": str(shares or DEFAULT_SHARES),
            "blkio.weight": str(weight or 500),
            "blkio.bfq.weight": str(weight or 100),
        }
    only_swap = NO_LIMIT if NO_LIMIT in (limit, swap) else swap - limit
    return common | {
        "memory.max": _or_max(limit),
        "memory.swap.max": _or_max(only_swap),
        "memory.low": str(memory.get("reservation", 0)),
        "memory.min": "0",
        "cpu.max": f"{_or_max(quota)} {period}",
        "cpu.weight": str(1 + (shares - 2) * 9999 // 262_142 if shares else 100),
        "io.weight": f"default {1 + (weight - 10) * 9999 // 990 if weight else 100}",
        "io.bfq.weight": f"default {weight or 100}",
        **resources.get("unified", {}),
    }


def limits(path: str) -> Limits:
    """Read the limits that a container has."""
    return limits_of(snapshot(path))


def limits_of(held: Mapping[str, str]) -> Limits:
    """The limits in a snapshot, of either version; pure."""
    pids = _number(held.get("pids.max"))
    if "cpu.max" in held or "memory.max" in held:
        memory, swap = _number(held.get("memory.max")), _number(held.get("memory.swap.max"))
        quota, _, period = held.get("cpu.max", "max").partition(" ")
        both = None if memory is None or swap is None else memory + swap
    else:
        memory, both = _number(held.get("memory.limit_in_bytes")), _number(held.get("memory.memsw.limit_in_bytes"))
        quota, period = held.get("cpu.cfs_quota_us", "-1"), held.get("cpu.cfs_period_us", "")
    share = _number(quota)
    return Limits(memory, both, None if share is None else share / int(period or DEFAULT_PERIOD), pids)


def _number(text: str | None) -> int | None:
    """Read a limit; None for no limit, which v1 writes as the largest number of pages."""
    return int(text) if text and text.isdecimal() and int(text) <= LARGEST_MEMORY else None


def _or_max(limit: int) -> str:
    return "max" if limit == NO_LIMIT else str(limit)


def apply(path: str, resources: Json) -> None:
    """Write these resources (OCI `linux.resources`) to a cgroup; limits that are left out are lifted.

    The runtimes' own `update` is not used: crun 1.8 can't lift a limit on v1, runc sets memory.low to its maximum
    instead of lifting it, and neither knows throttles. Raises UnfitHost with the file and value that is refused.
    """
    tree = version()
    wanted = values(resources, tree)
    if not wanted["cpuset.cpus"]:
        wanted["cpuset.cpus"] = _any_cpu(path, tree)
    for name in _in_order(path, wanted):
        place = folder(name.partition(".")[0], path) / name
        if place.exists() and _read(str(place)) != wanted[name]:
            _write(place, wanted[name])
    _apply_throttles(path, resources.get("blockIO", {}), tree)


def _any_cpu(path: str, tree: int) -> str:
    """The value that lifts a cpuset. With processes in it, it can be set to its parent's CPUs, but not emptied."""
    place = folder("cpuset", path)
    if tree == 2 and not _read(f"{place}/cpuset.cpus"):
        return ""
    return _read(f"{place.parent}/{'cpuset.cpus' if tree == 1 else 'cpuset.cpus.effective'}") or ""


def _in_order(path: str, wanted: Mapping[str, str]) -> list[str]:
    """The files in the order of writing: on v1, memory must never exceed memory + swap, not even for a moment."""
    both = "memory.memsw.limit_in_bytes"
    held = int(_read(str(folder("memory", path) / both)) or 0)
    limit = int(wanted.get("memory.limit_in_bytes", 0))
    raised = limit == NO_LIMIT or limit > held
    return sorted(wanted, key=lambda name: name != both) if raised else list(wanted)


def _apply_throttles(path: str, block: Json, tree: int) -> None:
    for key, (v1_file, v2_key) in _THROTTLES.items():
        asked = {f"{entry['major']}:{entry['minor']}": entry["rate"] for entry in block.get(key, ())}
        if tree == 1:
            place, lift, line = folder("blkio", path) / v1_file, "0", "{} {}"
        else:
            place, lift, line = folder("io", path) / "io.max", "max", f"{{}} {v2_key}={{}}"
        held = {row.split()[0] for row in (_read(str(place)) or "").splitlines() if row}
        for device in sorted(held - asked.keys()):
            _write(place, line.format(device, lift))
        for device, rate in asked.items():
            _write(place, line.format(device, rate))


def _write(path: Path, value: str) -> None:
    with explained(f"write of '{value.strip()}' to '{path}'"):
        path.write_text(value)


def pids(path: str) -> set[int]:
    """The processes in a cgroup, nested ones included; zombies are not among them."""
    return {pid for place in folders(path) for each in _with_all_below(place) for pid in processes(each)} - {0}


def processes(place: Path | str) -> list[int]:
    """The processes directly in one cgroup; none if it does not exist."""
    return list(map(int, (_read(f"{place}/cgroup.procs") or "").split()))


def oom_kills(path: str) -> int:
    """How many processes of a cgroup the kernel killed because memory was short; 0 when it is gone."""
    name = "memory.events" if version() == 2 else "memory.oom_control"
    return counts(folder("memory", path) / name).get("oom_kill", 0)


def pids_refused(path: str) -> int:
    """How often a cgroup was refused another process; 0 when it is gone."""
    return counts(folder("pids", path) / "pids.events").get("max", 0)


def counts(place: Path | str) -> dict[str, int]:
    """A file with a name and a number on each line; {} when it is gone."""
    return {name: int(value) for name, value in map(str.split, (_read(str(place)) or "").splitlines())}


def usage(path: str) -> Usage:
    """Read what a container uses."""
    tree = version()
    memory = _read(f"{folder('memory', path)}/{'memory.current' if tree == 2 else 'memory.usage_in_bytes'}")
    count = _read(f"{folder('pids', path)}/pids.current")
    if tree == 2:
        microseconds: float | None = counts(folder("cpu", path) / "cpu.stat").get("usage_usec")
    else:
        nanoseconds = _read(f"{folder('cpuacct', path)}/cpuacct.usage")
        microseconds = int(nanoseconds) / 1e3 if nanoseconds else None
    cpu = None if microseconds is None else microseconds / 1e6
    return Usage(int(memory) if memory else None, cpu, int(count) if count else None)


def freeze(path: str, *, timeout: float = 10.0) -> None:
    """Freeze the processes of a cgroup (freezer-subsystem.rst; cgroup-v2.rst, cgroup.freeze).

    Raises TryAgain, and thaws them, if they do not all stop within timeout (seconds): a process that waits for a disk
    or a network file system can't be frozen.
    """
    place, deadline = folder("freezer", path), time.monotonic() + timeout
    try:
        if version() == 2:
            _write(place / "cgroup.freeze", "1")
            stopped = wait_event(place, "frozen", 1, deadline)
        else:  # v1 sends no event, and looks again only when it is written again
            _write(place / "freezer.state", "FROZEN")
            while not (stopped := _read(f"{place}/freezer.state") == "FROZEN") and time.monotonic() < deadline:
                time.sleep(BRIEF)
                _write(place / "freezer.state", "FROZEN")
        if not stopped:
            raise TryAgain(f"pause cgroup '{path}': its processes did not stop in {timeout:g} s")
    except BaseException:
        with suppress(HoldfastError):
            thaw(path)
        raise


def thaw(path: str) -> None:
    """Let the frozen processes of a cgroup run again: on v1, even SIGKILL waits for that."""
    for name, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        state = folder("freezer", path) / name
        if state.exists():
            _write(state, value)


def wait_event(place: Path | str, name: str, value: int, deadline: float) -> bool:
    """Wait for a value in cgroup.events (v2), or until the cgroup is gone; False at the deadline (monotonic)."""
    try:
        with open(f"{place}/cgroup.events", "rb", buffering=0) as events:  # noqa: PTH123 - one for each removal
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            while f"{name} {value}" not in events.read().decode().splitlines():
                if time.monotonic() >= deadline:
                    return False
                poller.poll(max(deadline - time.monotonic(), 0.0) * 1000)
                events.seek(0)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
    return True


def remove(path: str, *, timeout: float = 2.0) -> None:
    """Remove a cgroup and all below it from every hierarchy; succeed when it is gone.

    A cgroup whose last process just ended is busy for a moment: it is tried again until timeout (seconds), then
    UnfitHost names the one that is still in use.
    """
    deadline = time.monotonic() + timeout
    for place in folders(path):
        for current in reversed(_with_all_below(place)):
            while not _rmdir(current):
                if time.monotonic() > deadline:
                    raise UnfitHost(f"removal of cgroup '{current}': processes are left in it")
                if not wait_event(current, "populated", 0, deadline):
                    continue
                time.sleep(BRIEF)  # v1 sends no event; on v2 the last process may still be exiting


def remove_if_empty(path: str) -> None:
    """Remove an agent's parent cgroup from every hierarchy, unless a container is left in it."""
    for place in folders(path):
        _rmdir(place)


def _with_all_below(place: str) -> list[str]:
    """A cgroup and all below it, outer ones first. The number of links tells whether there are any below."""
    found = [place]
    for each in found:
        with suppress(FileNotFoundError):
            if os.stat(each).st_nlink != LINKS_OF_A_LEAF:  # noqa: PTH116 - of a dozen hierarchies, at every removal
                found.extend(f"{each}/{name}" for name in children(each))
    return found


def _rmdir(place: str) -> bool:
    try:
        with suppress(FileNotFoundError):
            os.rmdir(place)  # noqa: PTH106 - of a dozen hierarchies, at every removal
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True
