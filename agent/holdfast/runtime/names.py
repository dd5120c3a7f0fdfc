"""Make the hosts and resolv.conf files of instances from addresses and names, and update them. Called by node.

The files are bind-mounted into containers, so they must keep their inode: they are overwritten, never replaced.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from holdfast.files import held, read_text, write_over

Names = Iterable[tuple[str, Iterable[str]]]

HOST_RESOLV_CONF = Path("/etc/resolv.conf")
UPSTREAM_RESOLV_CONF = Path("/run/systemd/resolve/resolv.conf")


def hosts_text(hostname: str, own: Names, others: Names) -> str:
    """The text of a hosts(5) file: localhost, the instance's own addresses, then its peers, in the order given.

    hostname is the first name of each own address; without an address it is at 127.0.1.1, as in Debian. Repeated
    names on a line are written once, lines without an address or names not at all.
    """
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    mine = [_hosts_line(address, (hostname, *names)) for address, names in own if address]
    lines += mine or [f"127.0.1.1 {hostname}"]
    lines += [_hosts_line(address, names) for address, names in others if address and names]
    return "\n".join(lines) + "\n"


def resolv_conf(host_text: str, upstream_text: str = "") -> str:
    """The host's resolv.conf(5) without resolvers on loopback, which a container can't reach.

    If none is left, upstream_text (UPSTREAM_RESOLV_CONF of systemd-resolved) is used instead. If that has none
    either, no nameserver is written: a libc then asks 127.0.0.1 and fails at once, and no resolver that the operator
    did not choose learns the names. search, options and sortlist are kept.
    """
    own, upstream = _reachable(host_text), _reachable(upstream_text)
    chosen = upstream if not _has_resolver(own) and _has_resolver(upstream) else own
    return "".join(f"{line}\n" for line in chosen)


def read_resolv_conf() -> str:
    """Read the host's files and return the text for containers; a host without them gives ""."""
    return resolv_conf(read_text(HOST_RESOLV_CONF), read_text(UPSTREAM_RESOLV_CONF))


def write_in_place(path: Path, text: str) -> None:
    """Make text the content of path without changing its inode (`files.write_over`)."""
    with held(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)) as file:
        write_over(file, text.encode())


def _hosts_line(address: str, names: Iterable[str]) -> str:
    return " ".join((address, *dict.fromkeys(names)))


def _reachable(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and line[0] not in "#;" and not _on_loopback(line)]


def _on_loopback(line: str) -> bool:
    key, *words = line.split()
    with suppress(ValueError):
        return key == "nameserver" and ipaddress.ip_address(words[0].partition("%")[0] if words else "").is_loopback
    return False


def _has_resolver(lines: Iterable[str]) -> bool:
    return any(line.split()[0] == "nameserver" for line in lines)
