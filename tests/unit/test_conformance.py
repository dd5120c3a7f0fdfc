"""The conformance suite finds a driver that breaks a law, and by that law alone; it does no harm to the host."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import pytest

from holdfast.drivers import Host, VolumeWant
from holdfast.kinds import KINDS
from holdfast.observed import Receipt
from holdfast.plugins import load_plugins
from holdfast.syscalls import MS_BIND, mount, unmount
from holdfast.testing import VolumeConformance, temporary_host
from holdfast.testing.confined import run_confined, take_away

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the laws run in a mount namespace of their own"),
    pytest.mark.usefixtures("mounts_alone"),
]

MENDS = "test_ensure_mends_what_was_damaged"
REMEMBERS_NOTHING = "test_observe_reads_the_host_and_remembers_nothing"
NOT_OUTSIDE = "test_nothing_is_made_outside_of_the_hosts_places"
NOT_OF_OTHERS = "test_what_others_made_is_neither_observed_nor_removed"


class Volume:
    """A right driver: root/kept/ID/{made,data}; the wrong ones below differ from it in one thing."""

    name = "kept"

    def __init__(self, host: Host) -> None:
        self.host = host
        self.root = host.root / "kept"

    def check(self, want: VolumeWant) -> None: ...

    def ensure(self, want: VolumeWant) -> Receipt:
        folder = self.folder(want.id)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        if not (folder / "made").exists():
            (folder / "made").touch()
        return self.receipt(want.id)

    def observe(self) -> Iterable[Receipt]:
        for made in sorted(self.root.glob("*/made")):
            receipt = self.receipt(made.parent.name.replace("@", "/"))
            yield receipt if (made.parent / "data").is_dir() else Receipt("volume", self.name, receipt.id)

    def remove(self, receipt: Receipt) -> None:
        folder = self.folder(receipt.id)
        (folder / "made").unlink(missing_ok=True)
        for file in folder.glob("data/*"):
            file.unlink()
        for each in (folder / "data", folder):
            if each.exists():
                each.rmdir()

    def folder(self, id: str) -> Path:
        return self.root / id.replace("/", "@")

    def receipt(self, id: str) -> Receipt:
        return Receipt("volume", self.name, id, data={"path": str(self.folder(id) / "data")})


class ObservesFromMemory(Volume):
    memory: ClassVar[dict[tuple[str, str], Receipt]] = {}

    def ensure(self, want: VolumeWant) -> Receipt:
        return self.memory.setdefault((self.host.name, want.id), super().ensure(want))

    def observe(self) -> Iterable[Receipt]:
        return [receipt for (name, _), receipt in self.memory.items() if name == self.host.name]

    def remove(self, receipt: Receipt) -> None:
        super().remove(receipt)
        self.memory.pop((self.host.name, receipt.id), None)


class WritesElsewhere(Volume):
    def ensure(self, want: VolumeWant) -> Receipt:
        (self.host.root.parent / "log").touch()
        return super().ensure(want)


class MountsElsewhere(Volume):
    def ensure(self, want: VolumeWant) -> Receipt:
        receipt = super().ensure(want)
        unmount(self.host.root.with_name("aside"))
        mount(receipt.data["path"], self.host.root.with_name("aside"), flags=MS_BIND)
        return receipt

    def remove(self, receipt: Receipt) -> None:
        unmount(self.host.root.with_name("aside"))
        super().remove(receipt)


class LeaksDescriptors(Volume):
    def ensure(self, want: VolumeWant) -> Receipt:
        receipt = super().ensure(want)
        os.open(self.root, os.O_PATH | os.O_CLOEXEC)
        return receipt


class LeaksThreads(Volume):
    def ensure(self, want: VolumeWant) -> Receipt:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return super().ensure(want)


class SharesPaths(Volume):
    def receipt(self, id: str) -> Receipt:
        data = {"path": str(self.folder(id) / "data"), "upper": str(self.root.parents[2] / "shared" / id)}
        return Receipt("volume", self.name, id, data=data)


class StartsPrograms(Volume):
    def observe(self) -> Iterable[Receipt]:
        for receipt in super().observe():
            subprocess.run(["true"], check=True)
            yield receipt


class WaitsForEach(Volume):
    def observe(self) -> Iterable[Receipt]:
        for receipt in super().observe():
            threading.Event().wait(0.001)
            yield receipt


class ReadsEachForEach(Volume):
    def observe(self) -> Iterable[Receipt]:
        for receipt in super().observe():
            for made in self.root.glob("*/made"):
                made.read_bytes()
            yield receipt


class Computes(Volume):
    def observe(self) -> Iterable[Receipt]:
        for receipt in super().observe():
            sum(range(200_000))
            yield receipt


class Waits(Volume):
    def observe(self) -> Iterable[Receipt]:
        threading.Event().wait(1.2)
        return super().observe()


class ObservesOfOthers(Volume):
    def observe(self) -> Iterable[Receipt]:
        for folder in sorted(self.host.root.parent.parent.glob("*/root/kept/*/made")):
            id = folder.parent.name.replace("@", "/")
            data = {"path": str(folder.with_name("data"))} if folder.with_name("data").is_dir() else {}
            yield Receipt("volume", self.name, id, data=data)


class RemovesOfOthers(Volume):
    def remove(self, receipt: Receipt) -> None:
        for root in self.host.root.parent.parent.glob("*/root"):
            if root != self.host.root:
                Volume(Host("other", root, root)).remove(receipt)
        super().remove(receipt)


class MendsNothing(Volume):
    def ensure(self, want: VolumeWant) -> Receipt:
        return self.receipt(want.id) if (self.folder(want.id) / "made").exists() else super().ensure(want)


def kit(driver: type[Volume]) -> VolumeConformance:
    class Kit(VolumeConformance):
        def make_driver(self, host: Host) -> Volume:
            return driver(host)

        def make_want(self, host: Host, number: int) -> VolumeWant:
            return VolumeWant(id=f"shop/data-{number}")

    return Kit()


def confined(work: Callable[[], object], *places: Path) -> None:
    run_confined(work, places, network=False, namespaces=False)


def hosts_for(suite: VolumeConformance, folder: Path) -> dict[str, dict[str, Host]]:
    """Make the hosts that each law asks for, with a folder beside their places."""
    laws = inspect.getmembers(suite, inspect.ismethod)
    hosts = {
        name: {each: temporary_host(folder / name / each) for each in inspect.signature(law).parameters}
        for name, law in laws
        if name.startswith("test_")
    }
    for host in (host for each in hosts.values() for host in each.values()):
        host.root.with_name("aside").mkdir(parents=True)
    return hosts


def broken_laws(suite: VolumeConformance, folder: Path) -> dict[str, str]:
    """Run every law on a fresh host, all in one confined process; return those that fail, with what they say."""
    hosts, report = hosts_for(suite, folder), folder / "report"
    places = [place for each in hosts.values() for host in each.values() for place in (host.root, host.run_root)]

    def run() -> None:
        broken: dict[str, str] = {}
        for name, each in hosts.items():
            try:
                getattr(type(suite), name).__wrapped__(suite, **each)
            except (AssertionError, OSError) as error:
                broken[name] = f"{type(error).__name__}: {error}"
        (report / "broken").write_text(json.dumps(broken))

    confined(run, report, *places)
    found: dict[str, str] = json.loads((report / "broken").read_text())
    return found


def test_a_right_driver_keeps_every_law(tmp_path: Path) -> None:
    suite = kit(Volume)
    for name, hosts in hosts_for(suite, tmp_path).items():
        getattr(suite, name)(**hosts)


@pytest.mark.parametrize(
    ("driver", "law", "says"),
    [
        (ObservesFromMemory, REMEMBERS_NOTHING, "another process with a new driver sees something else"),
        (MountsElsewhere, NOT_OUTSIDE, "made outside of the host's places, without its name"),
        (LeaksDescriptors, "test_no_descriptor_is_left_open", "file descriptors are left open"),
        (LeaksThreads, "test_no_thread_is_left_running", "threads are left running"),
        (SharesPaths, "test_two_agents_share_nothing", "assert ['upper'] == []"),
        (ObservesOfOthers, NOT_OF_OTHERS, "id='shop/data-0'"),
        (RemovesOfOthers, NOT_OF_OTHERS, "no longer there: file "),
        (MendsNothing, MENDS, "no longer there: file "),
    ],
)
def test_a_driver_that_breaks_a_law_fails_it_and_no_other(
    driver: type[Volume], law: str, says: str, tmp_path: Path
) -> None:
    broken = broken_laws(kit(driver), tmp_path)
    assert list(broken) == [law]
    assert says in broken[law]


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (StartsPrograms, "observe starts a program"),
        (WaitsForEach, "observe of 50 things waits 5"),
        (ReadsEachForEach, "files for 50 things, and may open 900"),
        (Computes, "ms of CPU, and may take"),
        (Waits, "observe waits for 1.2 s"),
    ],
)
def test_a_driver_with_a_slow_observe_is_told_what_takes_so_long(
    driver: type[Volume], says: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=re.escape(says)):
        kit(driver).test_observe_of_many_things_is_quick(host=temporary_host(tmp_path))


def test_a_driver_that_writes_elsewhere_can_not_and_is_told_so(tmp_path: Path) -> None:
    broken = broken_laws(kit(WritesElsewhere), tmp_path)
    assert NOT_OUTSIDE in broken
    assert {each for each in broken.values() if "Read-only file system" not in each} == set()
    host = temporary_host(tmp_path / "one")
    with pytest.raises(AssertionError, match="may write below host"):
        kit(WritesElsewhere).test_nothing_is_made_outside_of_the_hosts_places(host=host)
    assert list(tmp_path.rglob("log")) == []


def test_every_built_in_driver_is_held_to_the_laws(tmp_path: Path) -> None:
    plugins = load_plugins(temporary_host(tmp_path))
    drivers = {type(each.driver) for kind in KINDS for each in plugins.of_kind(kind).values()}
    built_in = {each.__name__ for each in drivers if each.__module__.startswith("holdfast_plugins.")}
    tests = "".join(file.read_text() for file in Path(__file__).parents[1].glob("*/test_*.py"))
    held = set(re.findall(r"def make_(?:driver|policy)\(.*\) -> (\w+):", tests))
    assert built_in
    assert built_in - held == set()


# -- the suite itself does no harm ---------------------------------------------------------------------------


def test_a_confined_process_writes_in_its_places_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    outside.mkdir()

    def write() -> None:
        (inside / "file").touch()
        with pytest.raises(OSError, match="Read-only file system"):
            (outside / "file").touch()

    confined(write, inside)
    assert (inside / "file").exists()
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("part", ["mounted", "mounted/folder", "."])
def test_what_is_mounted_is_unmounted_and_never_deleted(tmp_path: Path, part: str) -> None:
    precious, place = tmp_path / "precious", tmp_path / "place"
    (precious / "folder").mkdir(parents=True)
    (precious / "folder" / "file").touch()
    (place / "made" / "mounted").mkdir(parents=True)

    def damage() -> None:
        mount(precious, place / "made" / "mounted", flags=MS_BIND)
        assert (place / "made" / "mounted" / "folder" / "file").exists()
        assert take_away(place / "made" / part)
        assert list((place / "made" / "mounted").iterdir()) == []

    confined(damage, place)
    assert (precious / "folder" / "file").exists()
    assert (place / "made" / "mounted").is_dir()


def test_only_what_lies_in_the_places_of_a_confined_process_is_damaged(tmp_path: Path) -> None:
    place, outside = tmp_path / "place", tmp_path / "outside"
    for folder in (place / "mine", outside):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (place / "link").symlink_to(outside)
    with pytest.raises(AssertionError, match="this process is not confined"):
        take_away(place / "mine")

    def damage() -> None:
        for path in (outside, place, place / "link" / "file", place / ".." / "outside" / "file", place / "missing"):
            assert not take_away(path)
        assert take_away(place / "mine")

    confined(damage, place)
    assert (outside / "file").exists()
    assert place.is_dir()
    assert not (place / "mine").exists()


def test_a_root_that_an_agent_lives_in_is_refused(tmp_path: Path) -> None:
    host = temporary_host(tmp_path)
    host.root.mkdir()
    (host.root / "state.db").touch()
    with pytest.raises(AssertionError, match="an agent lives in"):
        kit(Volume).test_check_touches_nothing(host=host)
