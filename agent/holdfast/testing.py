"""The laws that every driver is held to, as a test class: for the built-in drivers and for yours.

    from holdfast.testing import DriverConformance, temporary_host

    class TestMyVolume(DriverConformance):
        @pytest.fixture
        def host(self, tmp_path): return temporary_host(tmp_path)

        @pytest.fixture
        def driver(self, host): return MyVolume(host)

        @pytest.fixture
        def want(self): return VolumeWant(id="shop/data")

        @pytest.fixture
        def another_want(self): return VolumeWant(id="shop/cache")

Every test ends with both wants removed. Nothing here needs pytest but the fixtures of a subclass.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, ClassVar

from holdfast.drivers import BASE36, Driver, Host, Receipt
from holdfast.guard import breach

Fingerprint = Mapping[str, tuple[str, ...]]
ONES_OWN = ("address", "host_interface", "path", "subnet", "upper")  # of a receipt's data: never that of another


def temporary_host(folder: Path) -> Host:
    """A host with a name and a /20 of 10.192.0.0/10 of its own, whose places lie below folder."""
    name = "t" + "".join(secrets.choice(BASE36) for _ in range(6))
    pools = list(IPv4Network("10.192.0.0/10").subnets(new_prefix=20))
    pool = str(pools[int(name, 36) % len(pools)])
    return Host(name, folder / "root", folder / "run", pool, secrets.token_hex(4))


def host_fingerprint(name: str, *folders: Path) -> Fingerprint:
    """What on this host bears a name or lies below folders: equal before and after for what touches nothing.

    Keys: mounts, links, netns, cgroups, tables (nftables), files (path, mode, owner, size, time of change).
    """
    return {
        "mounts": tuple(sorted(_mounts(name, folders))),
        "links": tuple(sorted(path.name for path in Path("/sys/class/net").glob(f"{name}-*"))),
        "netns": tuple(sorted(path.name for path in Path("/run/netns").glob(f"{name}-*"))),
        "cgroups": tuple(sorted(_cgroups(name))),
        "tables": tuple(sorted(_tables(name))),
        "files": tuple(sorted(line for folder in folders for line in _files(folder))),
    }


class DriverConformance:
    """Subclass it and provide the fixtures host, driver, want and another_want (of a different id).

    leaves_traces: False for a driver whose ensure makes nothing that could be seen on the host.
    """

    leaves_traces: ClassVar[bool] = True

    def test_check_touches_nothing(self, host: Host, driver: Driver[Any], want: Any) -> None:
        before = _fingerprint(host)
        driver.check(want)
        assert _fingerprint(host) == before

    def test_observe_touches_nothing(self, host: Host, driver: Driver[Any], want: Any) -> None:
        with _ensured(driver, want):
            before = _fingerprint(host)
            list(driver.observe())
            assert _fingerprint(host) == before

    def test_ensure_twice_returns_equal_receipts_and_changes_nothing(
        self, host: Host, driver: Driver[Any], want: Any
    ) -> None:
        with _ensured(driver, want) as receipt:
            before = _fingerprint(host)
            assert driver.ensure(want) == receipt
            assert _fingerprint(host) == before

    def test_check_passes_for_what_is_there_already(self, driver: Driver[Any], want: Any) -> None:
        with _ensured(driver, want):
            driver.check(want)

    def test_receipts_say_whose_they_are_and_survive_json(self, driver: Driver[Any], want: Any) -> None:
        with _ensured(driver, want) as receipt:
            assert breach(driver.name, want, receipt) == ""
            assert Receipt(**json.loads(json.dumps(asdict(receipt)))) == receipt

    def test_observe_finds_what_was_ensured(self, driver: Driver[Any], want: Any, another_want: Any) -> None:
        with _ensured(driver, want) as receipt, _ensured(driver, another_want) as other:
            found = {(each.kind, each.driver, each.id, each.owner) for each in driver.observe()}
            expected = {(each.kind, each.driver, each.id, each.owner) for each in (receipt, other)}
            assert expected <= found if self.leaves_traces else not found

    def test_what_observe_reads_back_agrees_with_the_receipt(self, driver: Driver[Any], want: Any) -> None:
        with _ensured(driver, want) as receipt:
            for found in driver.observe():
                if found.id == receipt.id:
                    assert {key: receipt.data[key] for key in found.data} == dict(found.data)

    def test_remove_leaves_nothing_to_observe(self, driver: Driver[Any], want: Any, another_want: Any) -> None:
        with _ensured(driver, another_want) as other, _ensured(driver, want) as receipt:
            driver.remove(receipt)
            left = {each.id for each in driver.observe()}
            assert receipt.id not in left
            assert other.id in left or not self.leaves_traces

    def test_remove_brings_the_host_back(self, host: Host, driver: Driver[Any], want: Any) -> None:
        with _ensured(driver, want):
            pass  # so that folders which the driver keeps for good are there
        before = _names(host)
        with _ensured(driver, want):
            pass
        assert _names(host) == before

    def test_remove_succeeds_when_it_is_gone_already(self, driver: Driver[Any], want: Any) -> None:
        with _ensured(driver, want) as receipt:
            driver.remove(receipt)
            driver.remove(receipt)

    def test_remove_does_without_the_data_of_the_receipt(self, driver: Driver[Any], want: Any) -> None:
        with _ensured(driver, want) as receipt:
            driver.remove(replace(receipt, data={}))
            assert receipt.id not in {each.id for each in driver.observe()}
            driver.remove(replace(receipt, data={}))

    def test_ensure_works_again_after_remove(self, driver: Driver[Any], want: Any) -> None:
        with _ensured(driver, want) as receipt:
            driver.remove(receipt)
            assert driver.ensure(want).id == receipt.id

    def test_different_ids_are_ensured_and_removed_side_by_side(
        self, driver: Driver[Any], want: Any, another_want: Any
    ) -> None:
        with ThreadPoolExecutor(2) as threads:
            for _ in range(5):
                receipts = list(threads.map(driver.ensure, (want, another_want)))
                assert receipts[0].id != receipts[1].id
                assert not _shared(*receipts)
                list(threads.map(driver.remove, receipts))
        assert not {each.id for each in driver.observe()} & {each.id for each in receipts}


def _shared(one: Receipt, other: Receipt) -> list[str]:
    """What two things have in common that must be each one's own."""
    own = [key for key in ONES_OWN if key != "subnet" or one.kind != "endpoint"]  # endpoints share their network's
    return [key for key in own if one.data.get(key) and one.data.get(key) == other.data.get(key)]


@contextmanager
def _ensured(driver: Driver[Any], want: Any) -> Iterator[Receipt]:
    receipt = driver.ensure(want)
    try:
        yield receipt
    finally:
        driver.remove(receipt)


def _fingerprint(host: Host) -> Fingerprint:
    return host_fingerprint(host.name, host.root, host.run_root)


def _names(host: Host) -> Fingerprint:
    """The fingerprint without sizes and times of files, which folders keep of what was once in them."""
    found = _fingerprint(host)
    return {**found, "files": tuple(line.split("\t")[0] for line in found["files"])}


def _mounts(name: str, folders: tuple[Path, ...]) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        what = line.split(" ", 3)[3]  # without the mount ids
        point = Path(what.split(" ")[1].replace("\\040", " "))
        if any(point.is_relative_to(folder) for folder in folders) or f"/{name}" in what or f" {name}" in what:
            yield what


def _cgroups(name: str) -> Iterator[str]:
    root = Path("/sys/fs/cgroup")
    for parent in (root, *(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())):
        top = parent / name
        if top.is_dir():
            yield from (str(path) for path in (top, *top.rglob("*")) if path.is_dir())


def _tables(name: str) -> list[str]:
    nft = shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if nft is None or os.geteuid() != 0:
        return []
    listed = subprocess.run([nft, "list", "tables"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if name in line.split()[-1]]


def _files(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        return
    for path in (folder, *folder.rglob("*")):
        found = path.lstat()
        yield f"{path}\t{found.st_mode:o} {found.st_uid}:{found.st_gid} {found.st_size} {found.st_ctime_ns}"
