"""The settings of one link under /proc/sys/net, in the network namespace of the calling thread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from holdfast.errors import explained
from holdfast.files import read_text, write_setting

NET = Path("/proc/sys/net")

NO_IPV6 = {
    "ipv6/disable_ipv6": "1",
    "ipv6/accept_ra": "0",  # these hold when somebody turns IPv6 on later
    "ipv6/autoconf": "0",
    "ipv6/accept_redirects": "0",
}
"""No IPv6, so that nobody's advertisement makes its sender our router."""

GATEWAY = {
    **NO_IPV6,
    "ipv4/accept_redirects": "0",
    "ipv4/send_redirects": "0",
    "ipv4/accept_source_route": "0",
    "ipv4/rp_filter": "1",
}
"""The host accepts no routes from containers, and no source addresses that are elsewhere."""

INSIDE = {**NO_IPV6, "ipv4/accept_redirects": "0"}
"""The same for a container's own link, before it is up."""


def write(link: str, settings: Mapping[str, str]) -> None:
    """Write settings of a link in their order, without those that the kernel lacks. Raises UnfitHost."""
    for name, value in settings.items():
        path = _path(link, name)
        with explained(f"write '{path}'"):  # a link that is gone is reported by the next request for it
            write_setting(path, value)


def differs(link: str, settings: Mapping[str, str]) -> bool:
    """Whether a link has other settings than these; False for a link that is gone."""
    return any(read_text(_path(link, name)).strip() not in ("", value) for name, value in settings.items())


def _path(link: str, name: str) -> str:
    family, _, setting = name.partition("/")
    return f"{NET}/{family}/conf/{link}/{setting}"
