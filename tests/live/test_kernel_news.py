"""What is read again only when the kernel says that it has changed: mounts, links, limits of cgroups.

Each change that anybody can make must be found by the next look, and without one nothing is read.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.drivers import Host
from holdfast.mounts import MountTable
from holdfast.runtime import cgroup
from holdfast.runtime.inotify import MODIFY, Inotify
from holdfast.runtime.limits_watch import LimitsWatch
from holdfast.syscalls import CLONE_NEWNET, call
from holdfast_plugins.network.links import LinkTable
from holdfast_plugins.network.netlink import Link, Netlink
from live.mounts import Mounts

pytestmark = [pytest.mark.live, pytest.mark.timeout(60)]


def test_mounts_are_read_again_exactly_when_they_change(mounts: Mounts, tmp_path: Path) -> None:
    table, place = MountTable(), tmp_path / "place"
    place.mkdir()
    table.points()
    mounts.tmpfs(place)
    assert any(each.point == str(place) for each in table.points())
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    assert [each.line.split()[5][:2] for each in table.points() if each.point == str(place)] == ["ro"]
    mounts.gone(place)
    assert not any(each.point == str(place) for each in table.points())


def test_a_child_process_does_not_take_the_news_from_its_parent(mounts: Mounts, tmp_path: Path) -> None:
    table, place = MountTable(), tmp_path / "place"
    place.mkdir()
    table.points()
    mounts.tmpfs(place)
    child = os.fork()
    if child == 0:
        table.points()
        os._exit(0)
    os.waitpid(child, 0)
    assert any(each.point == str(place) for each in table.points())


@pytest.fixture
def apart() -> Iterator[None]:
    """A network namespace of the thread that runs the test."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    call("unshare", CLONE_NEWNET)
    try:
        yield
    finally:
        call("setns", home, CLONE_NEWNET)
        os.close(home)


CHANGES = (
    "link add hfbr type bridge",
    "link add hfv0 type veth peer name hfv1",
    "link set hfv0 up",
    "link set hfv0 alias holdfast:endpoint:a/b",
    "link set hfv0 master hfbr",
    "link set hfv0 mtu 1400",
    "link set hfv0 address 02:00:00:00:00:01",
    "link set hfv0 nomaster",
    "link set hfv0 down",
    "link set hfv0 name hfv2",
    "link add hfv0 type bridge",
    "netns add {name}",
    "link set hfv1 netns {name}",
    "link del hfv2",
    "link del hfbr",
)


@pytest.mark.usefixtures("apart")
def test_links_are_known_as_they_are_after_each_change(site: Host) -> None:
    table = LinkTable()
    assert table.links() == Netlink().links()
    try:
        for change in CHANGES:
            subprocess.run(["ip", *change.format(name=site.name).split()], check=True)
            assert sorted(table.links(), key=_index) == sorted(Netlink().links(), key=_index), change
    finally:
        subprocess.run(["ip", "netns", "del", site.name], check=False, stderr=subprocess.DEVNULL)


@pytest.mark.usefixtures("apart")
def test_links_that_there_was_no_room_to_tell_of_are_read_again() -> None:
    table = LinkTable()
    table.links()
    assert table._news is not None
    table._news._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel takes its least
    for number in range(20):
        subprocess.run(["ip", "link", "add", f"hf{number}", "type", "bridge"], check=True)
    assert table.links() == Netlink().links()


@pytest.mark.usefixtures("apart")
def test_a_thread_in_another_network_namespace_sees_the_links_there() -> None:
    table, found = LinkTable(), list[list[Link]]()
    subprocess.run(["ip", "link", "add", "hf0", "type", "bridge"], check=True)
    assert "hf0" in [each.name for each in table.links()]

    def elsewhere() -> None:
        call("unshare", CLONE_NEWNET)
        found.append(table.links())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert [each.name for each in found[0]] == ["lo"]
    assert "hf0" in [each.name for each in table.links()]


def _index(link: Link) -> int:
    return link.index


@pytest.fixture
def place(site: Host) -> Iterator[str]:
    """A cgroup in every hierarchy."""
    path = f"{site.name}-limits"
    for root in cgroup.hierarchies():
        Path(root, path).mkdir()
    yield path
    cgroup.remove(path)


def written(path: str) -> Path:
    """A file of a cgroup's limits that anybody can write to."""
    return next(folder / "pids.max" for folder in cgroup.limit_folders(path) if (folder / "pids.max").exists())


def test_limits_are_read_again_when_somebody_has_written_to_them(place: str) -> None:
    watch = LimitsWatch()
    before, _ = watch.read(place, 1)
    watch.hear([place])
    assert watch.read(place, 1)[0] is before
    subprocess.run(["sh", "-c", f"echo 77 > {written(place)}"], check=True)
    watch.hear([place])
    after, limits = watch.read(place, 1)
    assert (after, limits) == (cgroup.snapshot(place), cgroup.limits_of(cgroup.snapshot(place)))
    assert after["pids.max"] == "77"


def test_a_cgroup_that_was_made_anew_is_another(place: str) -> None:
    watch = LimitsWatch()
    watch.read(place, 1)
    for folder in map(Path, cgroup.folders(place)):
        folder.rmdir()
        folder.mkdir()
    written(place).write_text("78")
    watch.hear([place])
    assert watch.read(place, 2)[0]["pids.max"] == "78"
    written(place).write_text("79")
    watch.hear([place])
    assert watch.read(place, 2)[0]["pids.max"] == "79"


def test_a_watch_that_the_kernel_has_ended_can_be_removed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    inotify = Inotify(MODIFY)
    watch = inotify.add(folder)
    folder.rmdir()
    assert list(inotify.wait(0)) == [(folder, "")]
    assert inotify.remove(watch) is None
    inotify.close()


def test_limits_are_read_each_time_where_there_are_no_watches_left(place: str, tmp_path: Path) -> None:
    (tmp_path / "allowed").write_text("0")
    watch = LimitsWatch(allowed=tmp_path / "allowed")
    watch.read(place, 1)
    written(place).write_text("80")
    assert watch.read(place, 1)[0]["pids.max"] == "80"


def test_more_news_of_limits_than_the_kernel_keeps_make_all_be_read_again(place: str) -> None:
    watch = LimitsWatch()
    watch.read(place, 1)
    file = written(place)
    other = next((each for each in cgroup.limit_folders(place) if not (each / "pids.max").exists()), file.parent)
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    handles = [os.open(each, os.O_WRONLY) for each in (file, next(other.glob("*.max"), file))]
    for number in range(most + 10):  # two files in turn: the same event twice in a row is one
        os.pwrite(handles[number % 2], b"100\n", 0)
    file.write_text("81")
    for handle in handles:
        os.close(handle)
    watch.hear([place])
    assert watch.read(place, 1)[0]["pids.max"] == "81"
