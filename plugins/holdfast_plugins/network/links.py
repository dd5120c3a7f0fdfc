"""The links that are this agent's: how they are marked, found, cut off and deleted. Used by `bridge` and `endpoint`.

A link's ifalias says in full what it is, where its name has room for a hash only:

    holdfast:<root id>:network:<id>            the bridge; without a root id if an earlier version made it
    holdfast:endpoint:<instance>/<network id>  the host's end of a veth pair; an instance's id begins with its root's
    holdfast:gone:<instance>/<network id>      a removed end, until the kernel deletes it with its namespace
"""

from __future__ import annotations

import errno
import os
from ipaddress import IPv4Address, IPv4Network

from holdfast.drivers import Host
from holdfast.errors import Conflict, HoldfastError, NotPermitted, TryAgain, UnfitHost
from holdfast_plugins.network import messages
from holdfast_plugins.network.netlink import Link, Netlink, Sockets

MARK = "holdfast:"
ENDPOINT, GONE = f"{MARK}endpoint:", f"{MARK}gone:"
BRIDGE_PORTS = 1023

sockets = Sockets()


def network_alias(root: str, id: str) -> str:
    """The alias of the bridge of a network."""
    return f"{MARK}{root}:network:{id}"


def network_of(link: Link) -> tuple[str, str] | None:
    """(root id, network id) of a bridge, from its alias; root "" for one of an earlier version."""
    match link.alias.split(":"):
        case ["holdfast", "network", id]:
            return "", id
        case ["holdfast", root, "network", id]:
            return root, id
        case _:
            return None


def links_of(host: Host, kind: str) -> list[Link]:
    """The links of one kind whose names begin with the agent's."""
    return [link for link in sockets.host.links(kind) if link.name.startswith(f"{host.name}-")]


def taken(link: Link, wanted: str) -> Conflict:
    """The error for a link that exists for something else."""
    what = link.alias.partition(":")[2] or "something unknown"
    return Conflict(f"make '{wanted}': link '{link.name}' belongs to {what} (remove or rename it)")


def delete(link: Link, operation: str) -> None:
    """Delete a link; succeed when it is gone."""
    try:
        sockets.host.request(messages.delete_link(link.index))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise explained(error, operation) from error


def abandon(link: Link, id: str) -> None:
    """Cut an endpoint's link off its bridge without waiting; it is deleted with its namespace."""
    wanted = [messages.link_alias(link.index, GONE + id)]
    if link.master:
        wanted.append(messages.port_off(link.index))  # last: a change of alias would turn the port on again
    try:
        sockets.host.request(*wanted)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENETDOWN):  # gone; or down, which is off, too
            raise explained(error, f"detach '{id}'") from error


def other_prefixes(netlink: Netlink, index: int, address: str, subnet: IPv4Network) -> list[bytes]:
    """Requests that remove an address with every other prefix: those of a subnet that has grown since."""
    widths = {
        other.prefixlen for link, other in netlink.addresses() if link == index and IPv4Address(address) in other
    }
    return [messages.no_address(index, address, width) for width in sorted(widths - {subnet.prefixlen})]


def mac_for(address: IPv4Address) -> str:
    """A locally administered MAC that is made from the address, so that neighbours' caches stay right."""
    return "02:42:" + address.packed.hex(":")


def explained(error: OSError, operation: str) -> HoldfastError:
    """The error that tells the reader what to do about a request that the kernel refused."""
    text = os.strerror(error.errno).lower() if error.errno else str(error)
    match error.errno:
        case errno.EXFULL:
            return Conflict(f"{operation}: its bridge is full (at most {BRIDGE_PORTS} containers on a network)")
        case errno.EPERM | errno.EACCES:
            return NotPermitted(f"{operation}: not permitted (root with CAP_NET_ADMIN)")
        case errno.EOPNOTSUPP | errno.EAFNOSUPPORT:
            return UnfitHost(f"{operation}: {text} (a kernel with bridge and veth)")
        case errno.EEXIST:
            return Conflict(f"{operation}: {text}")
        case _:
            return TryAgain(f"{operation}: {text}")
