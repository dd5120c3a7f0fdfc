"""The privileges that agent.toml may forbid: what a container asks for → which rules that breaks.

The rules stand where a commit can't lift them, in agent.toml's [policy]. Called by `authored`; `config` checks the
names in `forbid` against RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Network

from holdfast.spec.model import Container, NodeFacts

RULES: dict[str, tuple[str, Callable[[Container], bool]]] = {
    "privileged": ("privileged", lambda c: c.privileged),
    "host-network": ("networks", lambda c: "host" in c.networks),
    "host-pid": ("pid", lambda c: c.pid == "host"),
    "host-ipc": ("ipc", lambda c: c.ipc == "host"),
    "cap-add": ("cap_add", lambda c: bool(c.cap_add)),
    "devices": ("devices", lambda c: bool(c.devices)),
    "bind-mounts": ("volumes", lambda c: any(mount.kind == "bind" for mount in c.mounts)),
    "rootfs": ("rootfs", lambda c: c.rootfs is not None),
    "seccomp-unconfined": ("seccomp", lambda c: c.seccomp != "default"),  # a profile of one's own may allow all
    "apparmor-unconfined": ("apparmor", lambda c: c.apparmor != "default"),
    "new-privileges": ("no_new_privileges", lambda c: not c.no_new_privileges),
    "builds": ("image", lambda c: False),  # of images, not of containers: see `broken_build_rules`
}
"""Rule → the key of the container that is at fault, and whether the container breaks it."""

IMPLIED = frozenset({"cap-add", "devices", "seccomp-unconfined", "apparmor-unconfined", "new-privileges"})
"""The rules that a privileged container breaks without naming their keys."""


def broken_rules(container: Container, facts: NodeFacts) -> Iterator[tuple[str, str]]:
    """Find the rules of this node that a container breaks: (key, message) pairs."""
    for rule in sorted(facts.forbid):
        key, breaks = RULES[rule]
        if breaks(container):
            yield key, f"is forbidden by the rule '{rule}' in [policy] forbid of agent.toml"
        elif container.privileged and rule in IMPLIED:
            yield "privileged", f"includes what the rule '{rule}' in [policy] forbid of agent.toml forbids"


def broken_build_rules(network: str | None, facts: NodeFacts) -> Iterator[tuple[str, str]]:
    """Find the rules that an image to be built breaks: (key, message) pairs; "" for the image as a whole."""
    if "builds" in facts.forbid:
        yield "", "building is forbidden by the rule 'builds' in [policy] forbid of agent.toml"
    if "host-network" in facts.forbid and network == "host":
        yield "network", "host is forbidden by the rule 'host-network' in [policy] forbid of agent.toml"


def outside_roots(path: str, facts: NodeFacts) -> str | None:
    """Say what is wrong with taking a path of the host into a container; None if it is allowed."""
    if facts.bind_roots is None or any(_within(path, root) for root in facts.bind_roots):
        return None
    allowed = " or ".join(facts.bind_roots) or "nowhere"
    return f"'{path}' is outside what [policy] bind_roots of agent.toml allows (expected a path below {allowed})"


def foreign_subnet(subnet: str, facts: NodeFacts) -> str | None:
    """Say what is wrong with a range of addresses for containers; None if it is allowed."""
    asked = IPv4Network(subnet)
    if any(asked.subnet_of(IPv4Network(allowed)) for allowed in facts.subnets):
        return None
    where = "[network] allowed_subnets of agent.toml"
    return f"'{subnet}' is outside what {where} allows (expected a range in {', '.join(facts.subnets)})"


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
