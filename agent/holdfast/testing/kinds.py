"""The class for each kind of driver: the laws of all, how to damage such a thing, and the laws of its kind alone."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from holdfast.drivers import CgroupPolicy, CgroupWant, Host, Receipt, RootfsWant
from holdfast.errors import HoldfastError
from holdfast.testing.fingerprint import links, tables
from holdfast.testing.laws import DriverConformance, law

OPAQUE = "trusted.overlay.opaque"  # on a directory of a layer: it hides what lower layers have there


class RootfsConformance(DriverConformance):
    """For drivers of root file systems: make_want is written here, with layers that hide files of each other."""

    def make_want(self, host: Host, number: int) -> RootfsWant:
        return RootfsWant(
            instance=f"{host.id}-{number:08}", layers=make_layers(host.root / "some-layers" / str(number))
        )

    @law
    def test_upper_layers_cover_and_hide_what_lower_ones_have(self, host: Host) -> None:
        with self.made(host, 0) as (_, _, receipts):
            root = Path(receipts[0].data["path"])
            found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
            assert found == ["etc", "etc/both", "etc/lower", "etc/new", "etc/new/upper", "link"]
            assert (root / "etc/both").read_text() == "upper"
            assert (root / "etc/lower").stat().st_mode & 0o7777 == 0o640
            assert ((root / "etc/lower").stat().st_uid, (root / "etc/lower").stat().st_gid) == (7, 8)
            assert str((root / "link").readlink()) == "/etc/lower"

    @law
    def test_what_is_written_stays_in_the_writable_layer(self, host: Host) -> None:
        with self.made(host, 0, 1) as (driver, wants, receipts):
            root, other = (Path(receipt.data["path"]) for receipt in receipts)
            (root / "etc/both").write_text("changed")
            (root / "etc/lower").unlink()
            (root / "made").write_text("made")
            driver.ensure(wants[0])
            assert (root / "etc/both").read_text() == "changed", "ensure undoes what the container wrote"
            assert not (root / "etc/lower").exists(), "ensure brings back what the container deleted"
            assert (other / "etc/both").read_text() == "upper"
            assert (wants[0].layers[1] / "etc/both").read_text() == "upper", "a layer of the image was changed"
            assert (wants[0].layers[0] / "etc/lower").exists(), "a layer of the image was changed"
            if upper := receipts[0].data.get("upper"):
                assert (Path(upper) / "made").read_text() == "made"

    @law
    def test_a_size_is_kept_or_refused(self, host: Host) -> None:
        with self.cleaned(host):
            driver, want = self.make_driver(host), replace(self.make_want(host, 0), size=1 << 20)
            try:
                driver.check(want)
            except HoldfastError:
                return
            receipt = driver.ensure(want)
            try:
                written = _written(Path(receipt.data["path"]) / "big", 4 << 20)
                assert written < 4 << 20, "more was written than the size that was asked for"
            finally:
                driver.remove(receipt)


class VolumeConformance(DriverConformance):
    """For drivers of volumes."""

    @law
    def test_a_new_volume_is_empty_and_keeps_what_is_written(self, host: Host) -> None:
        with self.made(host, 0) as (driver, wants, receipts):
            path = Path(receipts[0].data["path"])
            assert list(path.iterdir()) == []
            (path / "file").write_text("content")
            assert driver.ensure(wants[0]) == receipts[0]
            assert (path / "file").read_text() == "content"
            driver.remove(receipts[0])
            again = Path(driver.ensure(wants[0]).data["path"])
            assert list(again.iterdir()) == [], "a volume that was removed and made again has its content still"


class MountConformance(DriverConformance):
    """For drivers of mounts."""

    @law
    def test_what_is_released_is_removed_all_the_same(self, host: Host) -> None:
        with self.made(host, 0) as (driver, _, receipts):
            if hasattr(driver, "release"):
                driver.release(receipts[0])
                driver.release(receipts[0])
            driver.remove(receipts[0])
            assert receipts[0].id not in {each.id for each in driver.observe()}


class NetworkConformance(DriverConformance):
    """For drivers of networks. Laws run in a network namespace of their own, which has a loopback link only."""

    own_network: ClassVar[bool] = True

    def damage(self, host: Host, want: Any, receipt: Receipt) -> bool:
        """Delete the network's link if it bears the agent's name."""
        link = str(receipt.data.get("interface", ""))
        if not link.startswith(f"{host.name}-") or link not in links():
            return False
        subprocess.run(["ip", "link", "delete", link], check=True)
        return True


class EndpointConformance(DriverConformance):
    """For drivers of endpoints. Laws run in a network namespace and with an empty /run/netns of their own."""

    own_network: ClassVar[bool] = True
    own_namespaces: ClassVar[bool] = True

    def damage(self, host: Host, want: Any, receipt: Receipt) -> bool:
        """Delete the link in the namespace of the instance."""
        link = str(receipt.data.get("interface", ""))
        if not link or not want.netns.name.startswith(f"{host.name}-"):
            return False
        subprocess.run(["nsenter", f"--net={want.netns}", "ip", "link", "delete", link], check=True)
        return True

    @law
    def test_the_namespace_has_the_address_of_the_receipt(self, host: Host) -> None:
        with self.made(host, 0) as (_, wants, receipts):
            address = receipts[0].data["address"]
            shown = _inside(wants[0].netns, "ip", "-json", "address", "show")
            found = {each["local"] for link in json.loads(shown) for each in link["addr_info"]}
            assert not address or address in found
            assert not address or receipts[0].data["interface"] == wants[0].interface

    @law
    def test_who_comes_after_an_instance_under_one_lease_gets_its_address(self, host: Host) -> None:
        with self.cleaned(host):
            driver = self.make_driver(host)
            first, second, other = (
                replace(self.make_want(host, number), lease=f"shop/{name}/0")
                for number, name in enumerate(("web", "web", "db"))
            )
            before = driver.ensure(first)
            driver.remove(before)
            receipts = [driver.ensure(other), driver.ensure(second)]
            addresses = [receipt.data["address"] for receipt in (*receipts, before)]
            for receipt in receipts:
                driver.remove(receipt)
            assert addresses[1] == addresses[2]
            assert not addresses[0] or addresses[0] != addresses[1]


class FirewallConformance(DriverConformance):
    """For firewall drivers, of which a host has one receipt. Laws run in a network namespace of their own."""

    many: ClassVar[int] = 1
    own_network: ClassVar[bool] = True

    def damage(self, host: Host, want: Any, receipt: Receipt) -> bool:
        """Delete the nftables tables that bear the agent's name."""
        found = [line.split()[1:] for line in tables() if host.name in line.split()[-1]]
        for family, table in found:
            subprocess.run(["nft", "delete", "table", family, table], check=True)
        return bool(found)


class PolicyConformance:
    """For cgroup policies: subclass it and write make_policy, and wants() for what the policy is about."""

    def make_policy(self) -> CgroupPolicy:
        raise NotImplementedError("make_policy(): return a policy")

    def wants(self) -> list[CgroupWant]:
        raise NotImplementedError("wants(): return wants that the policy accepts")

    def test_the_same_want_comes_to_the_same_settings(self) -> None:
        for want in self.wants():
            policy = self.make_policy()
            policy.check(want)
            settings = policy.settings(want)
            assert policy.settings(want) == settings
            assert self.make_policy().settings(want) == settings

    def test_settings_are_tables_that_survive_json(self) -> None:
        for want in self.wants():
            settings = self.make_policy().settings(want)
            assert set(settings) <= {"resources", "oom_score_adj"}
            assert json.loads(json.dumps(settings)) == settings


def make_layers(folder: Path) -> tuple[Path, ...]:
    """Make two layers as images have them; the upper one covers, hides and replaces what the lower one has."""
    lower, upper = folder / "lower", folder / "upper"
    if not folder.exists():
        (lower / "etc/new").mkdir(parents=True)
        (upper / "etc/new").mkdir(parents=True)
        for name in ("both", "lower", "hidden", "new/lower"):
            (lower / "etc" / name).write_text("lower")
        os.chown(lower / "etc/lower", 7, 8)
        (lower / "etc/lower").chmod(0o640)
        (lower / "link").symlink_to("/etc/lower")
        (upper / "etc/both").write_text("upper")
        (upper / "etc/new/upper").write_text("upper")
        os.mknod(upper / "etc/hidden", 0o20000, os.makedev(0, 0))  # a whiteout: the name is gone
        os.setxattr(upper / "etc/new", OPAQUE, b"y")  # an opaque directory: all that lower layers have in it is gone
    return lower, upper


def _inside(netns: Path, *command: str) -> str:
    entered = ["nsenter", f"--net={netns}", *command]
    return subprocess.run(entered, capture_output=True, text=True, check=True).stdout


def _written(path: Path, size: int) -> int:
    """Write until a file system is full; return how many bytes it took."""
    with path.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.tell() < size:
                file.write(bytes(1 << 16))
            os.fsync(file.fileno())
            return size
        return file.tell() - 1
