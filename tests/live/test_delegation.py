"""The place of containers in the cgroup tree of a host of systemd: asked for, kept, given back, asked for again."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.drivers import Host
from holdfast.runtime import cgroup, delegation

pytestmark = pytest.mark.live


@pytest.fixture
def kept(site: Host) -> Iterator[Host]:
    """A site on a host of systemd with cgroup v2."""
    if not site.cgroup_root:
        pytest.skip("no systemd with cgroup v2")
    yield site
    delegation.dissolve(site)


def weight(host: Host) -> str:
    return (cgroup.ROOT / host.cgroup_root[1:] / "cpu.weight").read_text().strip()


def assert_comes_and_goes(host: Host) -> None:
    delegation.ensure(host)
    assert delegation.keeps(host)
    assert not (cgroup.ROOT / host.cgroup_root[1:] / "cgroup.procs").read_text()
    delegation.dissolve(host)
    assert not delegation.used(host)
    assert not delegation.unit_file(host).exists()


def test_the_place_comes_back_although_another_unit_names_it(kept: Host) -> None:
    """As holdfast-shutdown.service does: systemd then remembers a unit that has ended."""
    other = f"{kept.name}-other"
    order = f"--property=After={delegation.unit_of(kept.name)}"
    subprocess.run(["systemd-run", "--quiet", f"--unit={other}", order, "sleep", "infinity"], check=True)
    try:
        assert_comes_and_goes(kept)
        assert_comes_and_goes(kept)
    finally:
        subprocess.run(["systemctl", "stop", other], check=True)


@pytest.mark.parametrize("known", [True, False], ids=["while it runs", "before it runs"])
def test_settings_of_an_administrator_hold_for_the_place(kept: Host, known: bool) -> None:
    unit = delegation.unit_of(kept.name)
    if known:
        delegation.ensure(kept)
        subprocess.run(["systemctl", "set-property", "--runtime", unit, "CPUWeight=200"], check=True)
    else:
        settings = Path(f"/run/systemd/system/{unit}.d/more.conf")
        settings.parent.mkdir()
        settings.write_text("[Service]\nCPUWeight=200\n")
    try:
        delegation.ensure(kept)
        assert weight(kept) == "200"
        assert_comes_and_goes(kept)
        assert_comes_and_goes(kept)
    finally:
        for folder in ("system", "system.control"):
            subprocess.run(["rm", "-rf", f"/run/systemd/{folder}/{unit}.d"], check=True)
        subprocess.run(["systemctl", "daemon-reload"], check=True)
