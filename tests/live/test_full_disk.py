"""A disk without room: what runs is stopped and removed all the same, and nothing needs a restart afterwards."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.drivers import Host
from holdfast.store import Store
from live.agent import LiveAgent
from live.processes import has_ended

pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]

IMAGES = '[images]\nmin_free = "1MiB"\nhigh_watermark = 100\nlow_watermark = 99\n'
GREEDY = """
[containers.{name}]
image = "busybox:1"
stop_grace_period = "0s"
command = ["sh", "-c", '''
until [ -e /gate/open ]; do sleep 0.05; done
dd if=/dev/zero of=/fill bs=64k; while true; do dd if=/dev/zero of=/more bs=512; done
''']
volumes = ["{gate}:/gate"]
"""
MODEST = """
[containers.web]
image = "busybox:1"
init = true
command = "sleep 1000"
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "small", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def small(disk: Path, new_agent: Callable[[Host], LiveAgent], site: Host) -> LiveAgent:
    """An agent whose root lies on that file system."""
    root = disk / "root"
    root.mkdir(mode=0o700)
    agent = new_agent(replace(site, root=root))
    agent.configure(more=IMAGES)
    agent.start()
    agent.image("busybox:1")
    return agent


def is_full(disk: Path) -> bool:
    return os.statvfs(disk).f_bavail == 0


def runs(agent: LiveAgent, container: str) -> bool:
    return [each["state"] for each in agent.instances(container)] == ["running"]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A folder that greedy containers wait at: they fill the disk once it has a file `open`."""
    folder = tmp_path / "gate"
    folder.mkdir()
    return folder


def fill(agent: LiveAgent, disk: Path, gate: Path, *containers: str) -> None:
    """Wait until these containers run, and have the greedy ones of them fill the disk then."""
    agent.wait(lambda: all(runs(agent, name) for name in containers), "they run")
    (gate / "open").touch()
    agent.wait(lambda: is_full(disk), "the disk is full")


def test_a_container_that_fills_the_disk_is_stopped_by_hand_and_removed_by_a_commit(
    small: LiveAgent, disk: Path, gate: Path
) -> None:
    small.write("first.toml", MODEST)
    small.write("greedy.toml", GREEDY.format(name="one", gate=gate))
    fill(small, disk, gate, "first/web", "greedy/one")
    pid = small.pid("greedy/one")

    small.write("late.toml", MODEST)  # a commit that makes something waits, and says why in a line
    late = small.wait_until(lambda status: status["apps"].get("late", {}).get("state") == "failed")
    assert "free some space there" in late["apps"]["late"]["reason"]
    assert "\n" not in late["apps"]["late"]["reason"]
    assert not late["converged"]

    small.cli("stop", "greedy/one", "--timeout", "30")
    assert has_ended(pid)
    web = small.pid("first/web")
    small.restart()  # with a disk that is still full
    assert small.pid("first/web") == web
    small.remove("greedy.toml")
    small.wait_until(lambda status: "greedy" not in status["apps"])
    assert not is_full(disk)
    small.wait_until(lambda status: bool(status["converged"]))
    assert small.instances("late/web")
    assert small.pid("first/web") == web


def test_an_app_that_fills_the_disk_goes_by_a_commit_alone(small: LiveAgent, disk: Path, gate: Path) -> None:
    small.write("greedy.toml", GREEDY.format(name="one", gate=gate) + GREEDY.format(name="two", gate=gate))
    fill(small, disk, gate, "greedy/one", "greedy/two")
    pids = [small.pid(f"greedy/{name}") for name in ("one", "two")]
    small.remove("greedy.toml")
    small.wait_until(lambda status: not status["apps"])
    assert all(has_ended(pid) for pid in pids)
    small.wait_until(lambda status: bool(status["converged"]))


def test_an_app_goes_while_the_disk_is_full_and_stays_full(small: LiveAgent, disk: Path) -> None:
    small.write("first.toml", MODEST + 'networks = ["front"]\n[networks.front]\n')
    small.wait(lambda: runs(small, "first/web"), "it runs")
    pid = small.pid("first/web")
    small.wait((small.host.root / "reserve").exists, "there is a reserve")
    (small.host.root / "reserve").unlink()
    with (disk / "of others").open("wb", buffering=0) as other, suppress(OSError):
        while other.write(bytes(4096)):
            pass
    small.remove("first.toml")
    small.wait(lambda: has_ended(pid), "it is stopped")
    with (disk / "of others").open("ab", buffering=0) as other, suppress(OSError):
        while other.write(bytes(4096)):
            pass
    small.wait_until(lambda status: not status["apps"])
    assert is_full(disk)
    (disk / "of others").unlink()
    small.wait_until(lambda status: bool(status["converged"]))


def test_a_kill_of_the_agent_on_a_full_disk_does_no_harm(small: LiveAgent, disk: Path, gate: Path) -> None:
    small.write("first.toml", MODEST)
    small.write("greedy.toml", GREEDY.format(name="one", gate=gate))
    fill(small, disk, gate, "first/web", "greedy/one")
    pid, web = small.pid("greedy/one"), small.pid("first/web")
    small.cli("stop", "greedy/one", "--timeout", "30")
    small.kill()
    small.remove("greedy.toml")
    small.start()
    small.wait_until(lambda status: "greedy" not in status["apps"] and bool(status["converged"]))
    assert has_ended(pid)
    assert small.pid("first/web") == web


def test_a_disk_that_has_become_read_only_gets_no_reserve_and_ends_nothing(disk: Path) -> None:
    store = Store(disk / "state.db")
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
        store.keep_reserve()
        assert not (disk / "reserve").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    store.keep_reserve()
    assert (disk / "reserve").exists()
    store.close()
