"""The three drivers under the laws of their kinds: run as root, with holdfast and pytest installed."""

from __future__ import annotations

import os
import subprocess
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from holdfast.drivers import EndpointWant, Host, MountWant, NetworkWant, RootfsWant
from holdfast.errors import Conflict, UnfitHost, WrongState
from holdfast.observed import Receipt
from holdfast.spec.model import Mount
from holdfast.testing import (
    EndpointConformance,
    MountConformance,
    NetworkConformance,
    RootfsConformance,
    take_away,
    temporary_host,
)
from holdfast_copy import CopiedRootfs
from holdfast_macvlan import MacvlanEndpoint, MacvlanNetwork
from holdfast_scratch import ScratchMount


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return temporary_host(tmp_path)


class TestCopiedRootfs(RootfsConformance):
    def make_driver(self, host: Host) -> CopiedRootfs:
        return CopiedRootfs(host)


def test_links_attributes_and_devices_are_copied_as_they_are(host: Host, tmp_path: Path) -> None:
    layer, outside = tmp_path / "layer", tmp_path / "outside"
    for folder in (layer / "bin", outside):
        folder.mkdir(parents=True)
    (layer / "bin/one").write_text("one")
    (layer / "bin/one").chmod(0o4755)
    os.link(layer / "bin/one", layer / "bin/two")
    os.mknod(layer / "null", 0o20666, os.makedev(1, 3))
    os.setxattr(layer / "bin/one", "user.colour", b"red")
    driver = CopiedRootfs(host)
    root = Path(driver.ensure(RootfsWant(instance="web", layers=(layer,))).data["path"])
    assert (root / "bin/one").stat().st_ino == (root / "bin/two").stat().st_ino
    assert (root / "bin/one").stat().st_mode == 0o104755
    assert os.getxattr(root / "bin/two", "user.colour") == b"red"
    assert (root / "null").stat().st_rdev == os.makedev(1, 3)
    driver.remove(Receipt("rootfs", "copy", "web", "web"))


def test_a_link_of_a_lower_layer_leads_an_upper_one_nowhere(host: Host, tmp_path: Path) -> None:
    lower, upper, outside = (tmp_path / name for name in ("lower", "upper", "outside"))
    for folder in (lower, upper / "etc", outside):
        folder.mkdir(parents=True)
    (outside / "kept").touch()
    (lower / "etc").symlink_to(outside)
    (upper / "etc/new").touch()
    os.mknod(upper / "etc/kept", 0o20000, os.makedev(0, 0))
    driver = CopiedRootfs(host)
    root = Path(driver.ensure(RootfsWant(instance="web", layers=(lower, upper))).data["path"])
    assert [path.name for path in (root / "etc").iterdir()] == ["new"]
    assert [path.name for path in outside.iterdir()] == ["kept"]
    driver.remove(Receipt("rootfs", "copy", "web", "web"))


class TestScratchMount(MountConformance):
    def make_driver(self, host: Host) -> ScratchMount:
        return ScratchMount(host)

    def make_want(self, host: Host, number: int) -> MountWant:
        return scratch(f"{host.id}-{number:08}")


def scratch(instance: str, **options: str) -> MountWant:
    mount = Mount(kind="scratch", source="work", target="/var/work", driver_opts=options)
    return MountWant(instance=instance, mount=mount)


def test_a_scratch_folder_has_the_mode_that_is_asked_for(host: Host) -> None:
    driver = ScratchMount(host)
    assert Path(driver.ensure(scratch("web")).data["source"]).stat().st_mode == 0o41777
    assert Path(driver.ensure(scratch("web", mode="0750")).data["source"]).stat().st_mode == 0o40750
    with pytest.raises(WrongState, match="mode"):
        driver.check(scratch("web", mode="rwx"))


def macvlan(
    parent: str, id: str = "shop/lan", subnet: str = "10.7.0.0/24", gateway: str | None = None
) -> NetworkWant:
    return NetworkWant(id=id, subnet=subnet, gateway=gateway, driver_opts={"parent": parent})


def make_parent(host: Host) -> str:
    """Make the link of the host, in the network namespace that the laws have of their own."""
    name = host.link("parent", "")
    subprocess.run(["ip", "link", "add", name, "up", "type", "bridge"], check=False, capture_output=True)
    return name


class OnALink:
    def clean_up(self, host: Host) -> None:
        subprocess.run(["ip", "link", "delete", host.link("parent", "")], check=False, capture_output=True)


class TestMacvlanNetwork(OnALink, NetworkConformance):
    def make_driver(self, host: Host) -> MacvlanNetwork:
        return MacvlanNetwork(host)

    def make_want(self, host: Host, number: int) -> NetworkWant:
        subnet = list(IPv4Network(host.pool).subnets(new_prefix=28))[number]
        return macvlan(make_parent(host), id=f"shop/lan-{number}", subnet=str(subnet))

    def damage(self, host: Host, want: NetworkWant, receipt: Receipt) -> bool:
        return take_away(MacvlanNetwork(host).folder(want.id))


class TestMacvlanEndpoint(OnALink, EndpointConformance):
    many = 10

    def make_driver(self, host: Host) -> MacvlanEndpoint:
        return MacvlanEndpoint(host, MacvlanNetwork(host))

    def make_want(self, host: Host, number: int) -> EndpointWant:
        network = MacvlanNetwork(host).ensure(macvlan(make_parent(host), subnet=host.pool))
        instance = f"{host.id}-{number:08}"
        netns = host.netns(instance)
        subprocess.run(["ip", "netns", "add", netns.name], check=False, capture_output=True)
        return EndpointWant(instance=instance, network=network, netns=netns, interface="eth0", default_route=True)

    def clean_up(self, host: Host) -> None:
        for netns in Path("/run/netns").glob(f"{host.name}-*"):
            subprocess.run(["ip", "netns", "delete", netns.name], check=True)
        MacvlanNetwork(host).remove(Receipt("network", "macvlan", "shop/lan"))
        super().clean_up(host)


def test_what_macvlan_can_not_do_is_refused(host: Host) -> None:
    network = MacvlanNetwork(host)
    with pytest.raises(WrongState, match="has no subnet"):
        network.check(NetworkWant(id="shop/lan", driver_opts={"parent": "lo"}))
    with pytest.raises(WrongState, match="parent"):
        network.check(NetworkWant(id="shop/lan", subnet="10.7.0.0/24"))
    with pytest.raises(UnfitHost, match="this host has no link 'absent0'"):
        network.check(macvlan("absent0"))
    with pytest.raises(WrongState, match="gateway"):
        network.check(macvlan("lo", gateway="10.8.0.1"))
    receipt = network.ensure(macvlan("lo"))
    want = EndpointWant(
        instance="web", network=receipt, netns=host.netns("web"), interface="eth0", default_route=True,
        ipv4_address="10.7.0.1",
    )  # fmt: skip
    with pytest.raises(Conflict, match="taken by the gateway"):
        MacvlanEndpoint(host, network).check(want)
