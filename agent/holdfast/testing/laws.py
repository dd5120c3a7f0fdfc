"""The laws that every driver is held to. The classes for each kind are in `holdfast.testing.kinds`.

Each law is a test method. It runs in a process of its own that may write to the hosts' places only
(`holdfast.testing.confined`), and all that it makes is removed at its end.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from holdfast.drivers import BASE36, Driver, Host, Receipt
from holdfast.guard import breach
from holdfast.kinds import kind_of_want
from holdfast.mounts import mount_points
from holdfast.testing.confined import NAMESPACES, forked, run_confined, take_away
from holdfast.testing.fingerprint import Fingerprint, changes, fingerprint, links, names, tables

T = TypeVar("T")

#: Keys of a receipt's data whose values no two things may share; of an endpoint, `subnet` and `interface` are not.
ONES_OWN = ("address", "host_interface", "path", "upper", "subnet", "interface")
OF_ALL = {"endpoint": ("subnet", "interface")}
STORE = "state.db"  # what a root has that belongs to an agent
ROUNDS = 4  # how often a thing is made and removed to see whether anything adds up
SETTLING = 3.0  # seconds until the kernel has taken away what was removed, or a thread has ended

# What one `observe` may do: opened files and directories, and CPU time as so many reads of a small file
OPENED, OPENED_EACH = 100, 16
READS, READS_EACH = 400, 40
WAITS = 20  # how often, besides once in five things
WAITED = 1.0  # seconds, beyond ten times what it computes
PROGRAMS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.spawn", "os.exec", "os.fork", "os.forkpty")


def temporary_host(folder: Path) -> Host:
    """Make a host with a name and a /20 of 10.192.0.0/10 of its own, whose places lie below folder."""
    name = "t" + "".join(secrets.choice(BASE36) for _ in range(6))
    pools = list(IPv4Network("10.192.0.0/10").subnets(new_prefix=20))
    pool = str(pools[int(name, 36) % len(pools)])
    return Host(name, folder / "root", folder / "run", pool, secrets.token_hex(4))


def law(check: Callable[..., None]) -> Callable[..., None]:
    """Have a test method run in a confined process; its parameters are hosts."""

    @functools.wraps(check)
    def run(self: DriverConformance, **hosts: Host) -> None:
        in_use = [host.root for host in hosts.values() if (host.root / STORE).exists()]
        assert not in_use, f"an agent lives in '{in_use[0]}' (use temporary_host)"
        places = [place for host in hosts.values() for place in (host.root, host.run_root)]
        run_confined(lambda: check(self, **hosts), places, network=self.own_network, namespaces=self.own_namespaces)

    return run


class DriverConformance:
    """Subclass the class of the driver's kind, and write make_driver and make_want.

    leaves_traces: False for a driver whose `ensure` makes nothing that could be seen on the host.
    many: how many things the suite makes to see how `observe` grows; 1 if a host has one such thing at most.
    own_network, own_namespaces: whether laws have a network namespace and an empty /run/netns of their own.
    """

    leaves_traces: ClassVar[bool] = True
    many: ClassVar[int] = 50
    own_network: ClassVar[bool] = False
    own_namespaces: ClassVar[bool] = False

    def make_driver(self, host: Host) -> Driver[Any]:
        """Make a new driver object, as an agent on this host has it after its start."""
        raise NotImplementedError("make_driver(host): return a new driver")

    def make_want(self, host: Host, number: int) -> Any:
        """Make the want of one of many things, and what it needs to be there: layers, a network namespace, …"""
        raise NotImplementedError("make_want(host, number): return a want, another one for each number")

    def damage(self, host: Host, want: Any, receipt: Receipt) -> bool:
        """Take away by hand what was made, and return whether there was something.

        This unmounts what is mounted at the path of the receipt, else it deletes it (`take_away`). Override it for
        what is no path.
        """
        return take_away(Path(str(receipt.data.get("path") or receipt.data.get("source"))))

    def clean_up(self, host: Host) -> None:
        """Take away what make_want has made on a host besides files."""

    @pytest.fixture
    def host(self, tmp_path: Path) -> Host:
        """Make the places of an agent. Override it to choose them."""
        return temporary_host(tmp_path / "one")

    @pytest.fixture
    def another_host(self, tmp_path: Path) -> Host:
        """Make the places of another agent on the same machine."""
        return temporary_host(tmp_path / "another")

    # -- check, ensure and receipts ---------------------------------------------------------------------------

    @law
    def test_check_touches_nothing(self, host: Host) -> None:
        with self.cleaned(host):
            driver, want = self.make_driver(host), self.make_want(host, 0)
            before = fingerprint(host)
            driver.check(want)
            assert changes(before, fingerprint(host)) == []

    @law
    def test_check_passes_for_what_is_there_already(self, host: Host) -> None:
        with self.made(host, 0) as (driver, wants, _):
            driver.check(wants[0])

    @law
    def test_ensure_twice_returns_equal_receipts_and_changes_nothing(self, host: Host) -> None:
        with self.made(host, 0) as (driver, wants, receipts):
            before = fingerprint(host)
            assert driver.ensure(wants[0]) == receipts[0]
            assert changes(before, fingerprint(host)) == []

    @law
    def test_ensure_works_again_after_remove(self, host: Host) -> None:
        with self.made(host, 0) as (driver, wants, receipts):
            driver.remove(receipts[0])
            assert driver.ensure(wants[0]).id == receipts[0].id

    @law
    def test_ensure_mends_what_was_damaged(self, host: Host) -> None:
        with self.made(host, 0) as (driver, wants, receipts):
            before, seen = names(host), seen_by(driver)
            for mending in (driver, self.make_driver(host)):  # the agent that made it, and the next one
                damaged = self.damage(host, wants[0], receipts[0])
                assert damaged or not self.leaves_traces, "nothing was found to damage (override damage)"
                assert mending.ensure(wants[0]) == receipts[0]
                assert settled(host, before) == []
                assert seen_by(mending) == seen

    @law
    def test_receipts_say_whose_they_are_and_survive_json(self, host: Host) -> None:
        with self.made(host, 0) as (driver, wants, receipts):
            assert breach(driver.name, wants[0], receipts[0]) == ""
            assert Receipt(**json.loads(json.dumps(asdict(receipts[0])))) == receipts[0]

    @law
    def test_different_ids_are_ensured_and_removed_side_by_side(self, host: Host) -> None:
        with self.cleaned(host), ThreadPoolExecutor(2) as threads:
            driver, wants = self.make_driver(host), [self.make_want(host, number) for number in self._two()]
            for _ in range(5):
                receipts = list(threads.map(driver.ensure, wants))
                assert len({receipt.id for receipt in receipts}) == len(wants)
                assert len(wants) == 1 or _shared(*receipts) == []
                list(threads.map(driver.remove, receipts))
            assert not {each.id for each in driver.observe()} & {each.id for each in receipts}

    # -- observe ----------------------------------------------------------------------------------------------

    @law
    def test_observe_touches_nothing(self, host: Host) -> None:
        with self.made(host, 0) as (driver, _, _):
            before = fingerprint(host)
            list(driver.observe())
            assert changes(before, fingerprint(host)) == []

    @law
    def test_observe_finds_what_was_ensured(self, host: Host) -> None:
        with self.made(host, *self._two()) as (driver, _, receipts):
            found = {_name(each) for each in driver.observe()}
            expected = {_name(each) for each in receipts}
            assert expected <= found if self.leaves_traces else not found

    @law
    def test_what_observe_reads_back_agrees_with_the_receipt(self, host: Host) -> None:
        with self.made(host, 0) as (driver, _, receipts):
            for found in driver.observe():
                if found.id == receipts[0].id:
                    assert {key: receipts[0].data[key] for key in found.data} == dict(found.data)

    @law
    def test_observe_reads_the_host_and_remembers_nothing(self, host: Host) -> None:
        """Another process, which began before anything was made, finds the same; damage is seen."""
        with (
            forked(lambda: seen_by(self.make_driver(host))) as seen_elsewhere,
            self.made(host, *self._two()) as (driver, wants, receipts),
        ):
            whole = seen_by(driver)
            assert seen_elsewhere() == whole, "another process with a new driver sees something else"
            if self.damage(host, wants[0], receipts[0]) and kind_of_want(wants[0]).observed:
                assert seen_by(driver) != whole, "observe does not see that something was taken away"
            assert seen_elsewhere() == seen_by(driver)

    @law
    def test_observe_of_many_things_is_quick(self, host: Host) -> None:
        """It starts no program, waits for nothing, and opens a few files at most for each thing."""
        with self.made(host, *range(self.many)) as (driver, _, _):
            probe = host.root / "a-small-file"
            probe.write_text("x" * 512)

            def read() -> None:
                for _ in range(READS + READS_EACH * self.many):
                    probe.read_bytes()

            events = _events(lambda: list(driver.observe()))
            assert [each for each in events if each in PROGRAMS] == [], "observe starts a program"
            opened = sum(each in ("open", "os.listdir", "os.scandir") for each in events)
            most = OPENED + OPENED_EACH * self.many
            assert opened <= most, f"observe opens {opened} files for {self.many} things, and may open {most}"
            allowed = min(_costs(read)[0] for _ in range(3))
            used, took, waits = map(
                min, zip(*(_costs(lambda: list(driver.observe())) for _ in range(5)), strict=True)
            )
            assert used <= allowed, (
                f"observe of {self.many} things takes {used * 1e3:.1f} ms of CPU, and may take {allowed * 1e3:.1f} ms"
            )
            most = WAITS + self.many // 5
            assert waits <= most, f"observe of {self.many} things waits {waits} times, and may wait {most} times"
            assert took <= WAITED + 10 * used, f"observe waits for {took:.1f} s"

    # -- remove -----------------------------------------------------------------------------------------------

    @law
    def test_remove_leaves_nothing_to_observe(self, host: Host) -> None:
        with self.made(host, *self._two()) as (driver, _, receipts):
            driver.remove(receipts[0])
            left = {each.id for each in driver.observe()}
            assert receipts[0].id not in left
            assert not self.leaves_traces or {each.id for each in receipts[1:]} <= left

    @law
    def test_remove_brings_the_host_back(self, host: Host) -> None:
        with self.made(host, 0):
            pass  # so that folders which the driver keeps for good are there
        before = names(host)
        with self.made(host, 0):
            pass
        assert settled(host, before) == []

    @law
    def test_remove_succeeds_when_it_is_gone_already(self, host: Host) -> None:
        with self.made(host, 0) as (driver, _, receipts):
            driver.remove(receipts[0])
            driver.remove(receipts[0])

    @law
    def test_remove_does_without_the_data_of_the_receipt(self, host: Host) -> None:
        with self.made(host, 0) as (driver, _, receipts):
            driver.remove(replace(receipts[0], data={}))
            assert receipts[0].id not in {each.id for each in driver.observe()}
            driver.remove(replace(receipts[0], data={}))

    # -- what is left behind, and where -------------------------------------------------------------------------

    @law
    def test_no_descriptor_is_left_open(self, host: Host) -> None:
        left = self._left(host, "/proc/self/fd")
        assert left <= 0, f"{left} file descriptors are left open"

    @law
    def test_no_thread_is_left_running(self, host: Host) -> None:
        left = self._left(host, "/proc/self/task")
        assert left <= 0, f"{left} threads are left running: {threading.enumerate()}"

    @law
    def test_nothing_is_made_outside_of_the_hosts_places(self, host: Host) -> None:
        """Files can't be made there, because they lie on read-only file systems; mounts, links, tables are seen."""
        with self.cleaned(host):
            driver, want = self.make_driver(host), self.make_want(host, 0)
            before = self._elsewhere(host)
            receipt = driver.ensure(want)
            try:
                assert self._elsewhere(host) - before == set(), "made outside of the host's places, without its name"
            finally:
                driver.remove(receipt)
            _live_through(driver, want)

    # -- others on the same machine -----------------------------------------------------------------------------

    @law
    def test_two_agents_share_nothing(self, host: Host, another_host: Host) -> None:
        with self.made(another_host, 0) as (_, _, their_receipts):
            before = fingerprint(another_host)
            with self.made(host, 0) as (_, _, my_receipts):
                assert _shared(my_receipts[0], their_receipts[0]) == []
                assert changes(before, fingerprint(another_host)) == []

    @law
    def test_what_others_made_is_neither_observed_nor_removed(self, host: Host, another_host: Host) -> None:
        """Others are another agent with things of the same ids, and other drivers of the same agent."""
        with (
            ExitStack() as stack,
            self.made(another_host, *self._two()) as (theirs, _, their_receipts),
            self.cleaned(host),
        ):
            mine = self.make_driver(host)
            strangers = stack.enter_context(_strangers(host))
            before, seen = names(another_host), seen_by(theirs)
            assert [each for each in mine.observe() if each.root in ("", host.id)] == []
            for receipt in their_receipts:
                mine.remove(replace(receipt, data={}))
            assert changes(before, names(another_host)) == []
            assert seen_by(theirs) == seen
            assert [stranger for stranger in strangers if not stranger.exists()] == []

    # -- helpers ------------------------------------------------------------------------------------------------

    def _two(self) -> range:
        return range(min(2, self.many))

    def _left(self, host: Host, folder: str) -> int:
        """Count what is in a folder of this process after some things were made and removed, and was not before."""

        def count() -> int:
            gc.collect()
            return len(os.listdir(folder))  # noqa: PTH208 - some go as we look

        with self.cleaned(host):
            driver, want = self.make_driver(host), self.make_want(host, 0)
            _live_through(driver, want)  # what a driver opens or starts once and keeps is there now
            before = count()
            for _ in range(ROUNDS):
                _live_through(driver, want)
            return _first_true(count, lambda now: now <= before) - before

    def _elsewhere(self, host: Host) -> set[str]:
        """List mounts that do not lie in the agent's places, and links and nftables tables that lack its name."""
        places = (host.root, host.run_root, NAMESPACES)
        points = {each.point for each in mount_points() if not any(map(Path(each.point).is_relative_to, places))}
        if not self.own_network:  # others make links on the host meanwhile
            return points
        strange = {link for link in links() if not link.startswith(f"{host.name}-")}
        return points | strange | {line for line in tables() if host.name not in line.split()[-1]}

    @contextmanager
    def cleaned(self, host: Host) -> Iterator[None]:
        """Clean up after make_want at the end."""
        try:
            yield
        finally:
            self.clean_up(host)

    @contextmanager
    def made(self, host: Host, *numbers: int) -> Iterator[tuple[Driver[Any], list[Any], list[Receipt]]]:
        """Make things with a new driver, and remove them at the end."""
        with ExitStack() as stack:
            stack.enter_context(self.cleaned(host))
            driver, wants, receipts = self.make_driver(host), [], []
            for number in numbers:
                wants.append(self.make_want(host, number))
                receipts.append(driver.ensure(wants[-1]))
                stack.callback(driver.remove, receipts[-1])
            yield driver, wants, receipts


def seen_by(driver: Driver[Any]) -> list[str]:
    """List what a driver observes, so that two looks can be compared."""
    return sorted(json.dumps(asdict(each), sort_keys=True) for each in driver.observe())


def settled(host: Host, before: Fingerprint) -> list[str]:
    """List what has changed since then, once the kernel has had its time to take away what was removed."""
    return _first_true(lambda: changes(before, names(host)), lambda found: not found)


@contextmanager
def _strangers(host: Host) -> Iterator[list[Path]]:
    """Make files of other drivers in an agent's places, and take them away at the end."""
    made = [place / "somebody" / "shop" / "data-0" / "file" for place in (host.root, host.run_root)]
    made += [host.instance("somebody") / "config.json", host.root / "instances-old" / "x" / "y"]
    for each in made:
        each.parent.mkdir(parents=True, exist_ok=True)
        each.touch()
    try:
        yield made
    finally:
        for each in made:
            each.unlink(missing_ok=True)
            with suppress(OSError):  # others keep things there
                for folder in each.parents:
                    if not {host.root, host.run_root} & {*folder.parents}:
                        break
                    folder.rmdir()


def _live_through(driver: Driver[Any], want: Any) -> None:
    """Make a thing, look at it, mend it and take it away, twice each."""
    driver.check(want)
    receipt = driver.ensure(want)
    try:
        driver.ensure(want)
        list(driver.observe())
    finally:
        driver.remove(receipt)
        driver.remove(receipt)


def _name(receipt: Receipt) -> tuple[str, ...]:
    return receipt.kind, receipt.driver, receipt.id, receipt.owner


def _shared(one: Receipt, other: Receipt) -> list[str]:
    """List what two things have in common that must be each one's own."""
    own = [key for key in ONES_OWN if key not in OF_ALL.get(one.kind, ())]
    return [key for key in own if one.data.get(key) and one.data.get(key) == other.data.get(key)]


def _first_true(look: Callable[[], T], wanted: Callable[[T], bool]) -> T:
    """Look until it is as wanted, or the time is up; return what was seen last."""
    deadline = time.monotonic() + SETTLING
    while not wanted(found := look()) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return found


def _events(work: Callable[[], object]) -> list[str]:
    """Name the audit events (sys.addaudithook) of a piece of work. The hook stays for the life of the process."""
    events: list[str] = []
    at_work = True

    def note(event: str, _: Any) -> None:
        if at_work:
            events.append(event)

    sys.addaudithook(note)
    work()
    at_work = False
    return events


def _costs(work: Callable[[], object]) -> tuple[float, float, int]:
    """Measure what a piece of work takes: seconds of CPU time, seconds, and how often it waits."""
    used, began, waited = time.process_time(), time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    work()
    waits = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - waited
    return time.process_time() - used, time.monotonic() - began, waits
