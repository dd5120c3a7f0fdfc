"""Macvlan networks: containers with links of their own on a link of the host, and addresses in its network.

    root/macvlan/APP~NAME/network       the network: {"subnet", "gateway", "internal", "parent"}
    root/macvlan/APP~NAME/leases/       its addresses (`holdfast.leases`)
    run_root/macvlan/INSTANCE@APP~NAME  an attachment: {"interface", "mac", "address"}

A link of an attachment lives in the container's network namespace alone, and goes with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from holdfast.drivers import EndpointWant, Host, NetworkWant
from holdfast.errors import Conflict, UnfitHost, WrongState
from holdfast.files import discard_tree
from holdfast.hookspecs import RegisterNetwork, hookimpl
from holdfast.keys import Table
from holdfast.leases import Leases, parse_address, parse_subnet, room
from holdfast.observed import Receipt
from holdfast.tables import read_options

api_version = 2

CLONE_NEWNET = 0x40000000  # setns(2)
SIOCGIFHWADDR = 0x8927  # netdevice(7)
LIBC = ctypes.CDLL(None, use_errno=True)
ENVIRONMENT = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


class Options(Table):
    parent: Annotated[str, Field(min_length=1, max_length=15, description="the link of the host")]
    mode: Annotated[
        Literal["bridge", "private", "vepa"], Field(description="who reaches whom on the host: see ip-link(8)")
    ] = "bridge"


@hookimpl
def register_network_drivers(register: RegisterNetwork, host: Host) -> None:
    network = MacvlanNetwork(host)
    register(network, MacvlanEndpoint(host, network))


class MacvlanNetwork:
    """The network driver `macvlan`; driver_opts: parent, mode."""

    name = "macvlan"
    options = Options

    def __init__(self, host: Host) -> None:
        self.root = host.root / "macvlan"
        self._leases: dict[str, Leases] = {}

    def check(self, want: NetworkWant) -> None:
        """Raise WrongState for wrong options and addresses, UnfitHost for a parent that this host lacks."""
        options = read_options(Options, want.driver_opts)
        if want.subnet is None:
            raise WrongState(f"network {want.id!r}: has no subnet (subnet = that of the parent's network)")
        subnet = parse_subnet(want.id, want.subnet)
        parse_address(want.id, "gateway", _gateway(want, subnet), subnet)
        if want.hosts > room(subnet):
            raise WrongState(f"network {want.id!r}: {want.hosts} containers join it, {subnet} is for {room(subnet)}")
        if not _is_there(options.parent):
            raise UnfitHost(f"network {want.id!r}: driver_opts.parent: this host has no link {options.parent!r}")

    def ensure(self, want: NetworkWant) -> Receipt:
        """Write down what the network is; there is nothing to make on the host for it."""
        self.check(want)
        subnet = parse_subnet(want.id, want.subnet or "")
        data = {
            "subnet": str(subnet),
            "gateway": _gateway(want, subnet),
            "internal": want.internal,
            **read_options(Options, want.driver_opts).model_dump(),
        }
        folder = self.folder(want.id)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "network", data)
        return self._receipt(want.id, data)

    def observe(self) -> Iterable[Receipt]:
        """List the networks; the data of one whose parent is gone is empty."""
        for file in sorted(self.root.glob("*/network")):
            data, id = json.loads(file.read_text()), file.parent.name.replace("~", "/")
            yield self._receipt(id, data) if _is_there(data["parent"]) else Receipt("network", self.name, id)

    def remove(self, receipt: Receipt) -> None:
        """Forget the network with its leases."""
        self._leases.pop(receipt.id, None)
        folder = self.folder(receipt.id)
        (folder / "network").unlink(missing_ok=True)
        discard_tree(folder)

    def folder(self, id: str) -> Path:
        return self.root / id.replace("/", "~")

    def leases(self, id: str) -> Leases:
        return self._leases.setdefault(id, Leases(id, self.folder(id) / "leases"))

    def _receipt(self, id: str, data: dict[str, Any]) -> Receipt:
        # no interface: the host has none of this network, and its firewall has nothing to do with it
        return Receipt("network", self.name, id, data={"interface": "", **data})


class MacvlanEndpoint:
    """The endpoint driver `macvlan`."""

    name = "macvlan"

    def __init__(self, host: Host, network: MacvlanNetwork) -> None:
        self.host = host
        self.root = host.run_root / "macvlan"
        self.network = network

    def check(self, want: EndpointWant) -> None:
        """Raise WrongState for an impossible address, Conflict for one that another instance has."""
        if want.ipv4_address is None:
            return
        network, subnet = want.network.id, IPv4Network(want.network.data["subnet"])
        parse_address(network, "address", want.ipv4_address, subnet)
        holder = self.network.leases(network).holder(want.ipv4_address)
        before = want.predecessor.owner if want.predecessor else None
        if want.ipv4_address == want.network.data["gateway"]:
            holder = "the gateway"
        if holder not in (None, want.instance, before):
            raise Conflict(f"network {network!r}: address {want.ipv4_address!r} is taken by {holder}")

    def ensure(self, want: EndpointWant) -> Receipt:
        """Have the link in the namespace, with its address and the way out."""
        self.check(want)
        data, subnet = want.network.data, IPv4Network(want.network.data["subnet"])
        leases = self.network.leases(want.network.id)
        owner = want.lease or want.instance
        address = leases.take(owner, want.instance, subnet, data["gateway"], want.ipv4_address)
        mac = (want.mac_address or _mac(self.host.id, want.network.id, address)).lower()
        state = {"interface": want.interface, "mac": mac, "address": address}
        file = self._file(want.instance, want.network.id)
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, state)
        if _mac_in(want.netns, want.interface) != mac:
            _ip("link", "add", "link", data["parent"], "name", want.interface, "address", mac,
                "netns", want.netns.name, "type", "macvlan", "mode", data["mode"])  # fmt: skip
        inside = ("-n", want.netns.name)
        _ip(*inside, "address", "replace", f"{address}/{subnet.prefixlen}", "dev", want.interface)
        _ip(*inside, "link", "set", want.interface, "up")
        if want.default_route and not data["internal"]:
            _ip(*inside, "route", "replace", "default", "via", data["gateway"], "dev", want.interface)
        return self._receipt(want.instance, want.network.id, state)

    def observe(self) -> Iterable[Receipt]:
        """List the attachments; the data of one whose link is not in its namespace is empty."""
        files = sorted(self.root.glob("[!.]*@*"))
        states = [json.loads(file.read_text()) for file in files]
        names = [file.name.partition("@")[::2] for file in files]
        links = ((self.host.netns(name[0]), state["interface"]) for name, state in zip(names, states, strict=True))
        for (instance, network), state, mac in zip(names, states, _macs_in(links), strict=True):
            yield self._receipt(instance, network.replace("~", "/"), state if mac == state["mac"] else {})

    def remove(self, receipt: Receipt) -> None:
        """Let the address rest and delete the link, if its namespace is there still."""
        instance, _, network = receipt.id.partition("/")
        self.network.leases(network).release(instance)
        file = self._file(instance, network)
        with suppress(FileNotFoundError):
            state, netns = json.loads(file.read_text()), self.host.netns(instance)
            if _mac_in(netns, state["interface"]) == state["mac"]:
                _ip("-n", netns.name, "link", "delete", state["interface"])
        file.unlink(missing_ok=True)

    def _file(self, instance: str, network: str) -> Path:
        return self.root / f"{instance}@{network.replace('/', '~')}"

    def _receipt(self, instance: str, network: str, state: dict[str, Any]) -> Receipt:
        data = {**state, "host_interface": ""} if state else {}
        return Receipt("endpoint", self.name, f"{instance}/{network}", instance, data)


def _gateway(want: NetworkWant, subnet: IPv4Network) -> str:
    return want.gateway or str(subnet.network_address + 1)


def _is_there(link: str) -> bool:
    try:
        socket.if_nametoindex(link)
    except OSError:
        return False
    return True


def _mac(root: str, network: str, address: str) -> str:
    """Make a locally administered MAC address for an IP address: the same for each owner, as neighbours cache it."""
    return "02:" + hashlib.sha256(f"{root} {network} {address}".encode()).digest()[:5].hex(":")


def _mac_in(netns: Path, link: str) -> str:
    """Return the MAC address of a link in a network namespace, "" where there is none."""
    return _macs_in([(netns, link)])[0]


def _macs_in(links: Iterable[tuple[Path, str]]) -> list[str]:
    """Do the same for several: one thread enters one namespace after the other, and ends there."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: [_look(netns, link) for netns, link in links]).result()


def _look(netns: Path, link: str) -> str:
    try:
        with netns.open("rb") as file:
            if LIBC.setns(file.fileno(), CLONE_NEWNET) != 0:
                return ""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            found = fcntl.ioctl(control, SIOCGIFHWADDR, struct.pack("16s24x", link.encode()))
        return found[18:24].hex(":")
    except OSError:  # neither is there
        return ""


def _write(file: Path, data: dict[str, Any]) -> None:
    """Write a file whole, unless it has this content."""
    text = json.dumps(data)
    with suppress(FileNotFoundError):
        if file.read_text() == text:
            return
    fresh = file.with_name(f".{file.name}")
    fresh.write_text(text)
    fresh.rename(file)


def _ip(*arguments: str) -> None:
    """Run ip(8). Raises UnfitHost with its own words."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode != 0:
        raise UnfitHost(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
