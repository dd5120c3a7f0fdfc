"""Counts what an agent has on the host, instance by instance, by asking the host and not the agent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ground import wait_for
from holdfast.drivers import Host
from holdfast.observed import Instance
from holdfast.store import Store


@dataclass(frozen=True, slots=True)
class Census:
    """Instance → how many of each kind it has on the host; links: network interfaces on the host's side."""

    conmons: Counter[str] = field(default_factory=Counter)
    programs: Counter[str] = field(default_factory=Counter)
    mounts: Counter[str] = field(default_factory=Counter)
    netns: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    cgroups: Counter[str] = field(default_factory=Counter)
    layers: Counter[str] = field(default_factory=Counter)
    leases: Counter[str] = field(default_factory=Counter)
    bridges: int = 0
    veths: int = 0


def take_census(host: Host) -> Census:
    """Look at the host now."""
    links = list(Path("/sys/class/net").glob(f"{host.name}-*"))
    return Census(
        conmons=Counter(_conmons(host)),
        programs=Counter(_programs(host)),
        mounts=Counter(_mounts(host)),
        netns=Counter(path.name.removeprefix(f"{host.name}-") for path in Path("/run/netns").glob(f"{host.name}-*")),
        runs=Counter(_names(host.run_root / "runs")),
        cgroups=Counter(set(_cgroups(host))),
        layers=Counter(_names(host.root / "instances")),
        leases=Counter(_leases(host)),
        bridges=sum((link / "bridge").is_dir() for link in links),
        veths=sum((link / "brport").is_dir() for link in links),
    )


def expected_census(instances: Mapping[str, Instance], networks: int) -> Census:
    """What the host has when these instances run, each attached to networks of its own."""
    attached = {id: len(each.want.networks) for id, each in instances.items()}
    each = Counter(instances.keys())
    mounts = each + each  # a root file system, and a small one for files
    return Census(each, each, mounts, each, each, each, each, Counter(attached), networks, sum(attached.values()))


def await_census(host: Host, expected: Census, timeout: float = 10.0) -> Census:
    """The census once it is the expected one, or when the time is up: the kernel takes a moment for some of it."""
    with suppress(AssertionError):
        wait_for(lambda: take_census(host) == expected, "the host has what is expected", timeout)
    return take_census(host)


def stored_instances(host: Host) -> dict[str, Instance]:
    """What the agent that ended last knew of instances."""
    store = Store(host.root / "state.db")
    try:
        return {str(id): each for id, each in store.instances.items()}
    finally:
        store.close()


def _conmons(host: Host) -> list[str]:
    lines = map(_argv, Path("/proc").glob("[0-9]*"))
    ours = [argv for argv in lines if argv[0].endswith("/conmon") and str(host.run_root) in " ".join(argv)]
    return [argv[argv.index("--cid") + 1] for argv in ours]


def _programs(host: Host) -> list[str]:
    """The instance of each process that is the first of its container: the parent is a conmon, or gone."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            groups = (place / "cgroup").read_text()
            numbers = (place / "status").read_text().partition("NSpid:")[2].splitlines()[0].split()
        except (OSError, IndexError):
            continue
        marks = [line.rpartition(f":/{host.name}/")[2] for line in groups.splitlines() if f":/{host.name}/" in line]
        if marks and numbers[-1] == "1" and len(numbers) > 1:
            found.append(marks[0].split("/")[0])
    return found


def _argv(place: Path) -> list[str]:
    try:
        return (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


def _mounts(host: Host) -> list[str]:
    places = f"{host.run_root}/instances/"
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point.removeprefix(places).split("/")[0] for point in points if point.startswith(places)]


def _cgroups(host: Host) -> list[str]:
    tops = [Path("/sys/fs/cgroup") / host.cgroup[1:], *Path("/sys/fs/cgroup").glob(f"*{host.cgroup}")]
    return [path.name for top in tops if top.is_dir() for path in top.iterdir() if path.is_dir()]


def _leases(host: Host) -> list[str]:
    """The instance of each address that is in use; the others rest."""
    used = (path for path in (host.root / "networks").glob("*/leases/*") if path.stat().st_mode & 0o200)
    return [instance for path in used if (instance := path.read_text().split()[-1]) != "-"]


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
