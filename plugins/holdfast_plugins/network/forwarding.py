"""Accept our bridges' traffic where another product drops what the host forwards (dockerd does, ufw may).

An accept in our own table does not undo a drop in another. So one rule is put into the chain DOCKER-USER, or else
into FORWARD of the table filter, with the agent's name in its comment. The program iptables does it, because the
tables are its own. Nothing of this runs on a host that does not drop.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from holdfast.drivers import Host
from holdfast.errors import UnfitHost
from holdfast.observed import Finding
from holdfast_plugins.network.nftables import Nft, NftError, RuleSet

FORWARD, DOCKER_USER = "FORWARD", "DOCKER-USER"
FAMILIES = {1: "inet", 2: "ip", 7: "bridge"}


def dropping_chain(nft: Nft) -> str | None:
    """The chain that needs our accept; None if iptables' table does not drop by policy."""
    if "policy drop" not in _listing(nft, FORWARD):
        return None
    return DOCKER_USER if _listing(nft, DOCKER_USER) else FORWARD


def allowed(host: Host, nft: Nft) -> bool:
    """Whether what our own table lets through is not dropped elsewhere."""
    chain = dropping_chain(nft)
    return chain is None or all(_run("-C", chain, *rule) for rule in _rules(host))


def allow(host: Host, nft: Nft) -> None:
    """Add the accept where it is needed. Idempotent; raises UnfitHost."""
    chain = dropping_chain(nft)
    if chain is None:
        return
    for rule in _rules(host):
        if not _run("-C", chain, *rule) and not _run("-I", chain, *rule):
            raise UnfitHost(f"accept forwarding in chain '{chain}': iptables refuses (a policy other than drop)")


def withdraw(host: Host, nft: Nft) -> None:
    """Remove our rules from every chain that has them. Calling it again changes nothing."""
    for chain in (FORWARD, DOCKER_USER):
        if _listing(nft, chain):
            for rule in _rules(host):
                while _run("-D", chain, *rule):
                    pass


def findings(host: Host, rule_set: RuleSet) -> Iterator[Finding]:
    """The chains of others that drop forwarded packets by policy, in tables where no rule names our bridges.

    A rule that names them is somebody's decision, or our own accept in iptables' table.
    """
    for family, table, chain in rule_set.dropping_forward():
        if f"{host.name}-".encode() not in b"".join(rule_set.rules(table, family)):
            text = f"chain '{FAMILIES[family]} {table} {chain}' drops what is forwarded by policy: containers may not"
            text += " reach the outside, nor be reached from there"
            yield Finding("firewall", text, f"accept iifname and oifname '{host.name}-*' there")


def _listing(nft: Nft, chain: str) -> str:
    """A chain of iptables' table filter as nft prints it; "" if it does not exist."""
    try:
        return nft.run(f"list chain ip filter {chain}")
    except NftError:
        return ""


def _rules(host: Host) -> Iterator[tuple[str, ...]]:
    for direction in ("-i", "-o"):
        comment = ("-m", "comment", "--comment", f"holdfast:{host.name}")
        yield (direction, f"{host.name}-+", *comment, "-j", "ACCEPT")


def _run(*arguments: str) -> bool:
    program = shutil.which("iptables", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise UnfitHost("change table 'ip filter': the program iptables is missing (apt install iptables)")
    done = subprocess.run([program, "-w", *arguments], capture_output=True, check=False)
    return done.returncode == 0
