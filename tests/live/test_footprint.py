"""The ground of the other live tests: what bears a name is found, all of it, and can be swept away."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from footprint import leftovers, sweep, wait_clean
from holdfast.drivers import Host

pytestmark = pytest.mark.live


def test_a_site_begins_with_nothing(site: Host) -> None:
    assert leftovers(site) == []


def test_two_sites_share_neither_name_nor_address(new_site: Callable[[], Host]) -> None:
    sites = [new_site() for _ in range(5)]
    assert len({site.name for site in sites}) == len({site.root for site in sites}) == 5
    pools = [IPv4Network(site.pool) for site in sites]
    assert not any(one.overlaps(other) for one in pools for other in pools if one is not other)


def test_ports_are_promised_once(free_port: Callable[[], int]) -> None:
    ports = [free_port() for _ in range(20)]
    assert len({*ports}) == 20


def test_whatever_bears_the_name_is_found_and_swept_away(site: Host) -> None:
    (site.run_root / "point").mkdir(parents=True)
    (site.run_root / "file").touch()
    image = site.root / "image"
    image.write_bytes(bytes(1 << 20))
    (group,) = [make_cgroup(site)]
    sleeper = subprocess.Popen(["sleep", "300"])
    (group / "cgroup.procs").write_text(str(sleeper.pid))
    for command in (
        ["mount", "-t", "tmpfs", "tmpfs", site.run_root / "point"],
        ["nft", "add", "table", "inet", site.name],
        ["ip", "link", "add", site.link("test", "link"), "type", "bridge"],
        ["ip", "netns", "add", f"{site.name}-netns"],
        ["losetup", "--find", image],
    ):
        subprocess.run(list(map(str, command)), check=True)
    kinds = {line.split(" ")[0] for line in leftovers(site)}
    sweep(site)
    sleeper.wait()
    assert kinds == {"process", "mount", "netns", "link", "cgroup", "nft", "loop", "file"}
    assert wait_clean(site) == []


def make_cgroup(site: Host) -> Path:
    """A cgroup of the site's name in whichever hierarchy there is for pids."""
    top = Path("/sys/fs/cgroup")
    group = (top / "pids" if (top / "pids").is_dir() else top) / site.name / "inner"
    group.mkdir(parents=True)
    return group
