"""Write the agent's own nftables table, and notice when somebody alters it. Called by node.

While nobody changes any rule, the generation of the rule set shows that the table is as we wrote it; afterwards the
table's fingerprint does. Both are kept in the run root, so that a restarted agent need not write the table again.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from ipaddress import AddressValueError, IPv4Address
from typing import Any

from holdfast.drivers import Host
from holdfast.errors import Conflict, HoldfastError, NotPermitted, UnfitHost, WrongState
from holdfast.files import write_whole
from holdfast.observed import Finding, FirewallNetwork, FirewallWant, PublishedPort, Receipt
from holdfast.spec.model import digest_of
from holdfast_plugins.network import flows, forwarding, rules
from holdfast_plugins.network.conntrack import Conntrack
from holdfast_plugins.network.loopback import Loopback
from holdfast_plugins.network.monitor import Monitor
from holdfast_plugins.network.nftables import Nft, NftError, RuleSet, open_nft
from holdfast_plugins.network.published import published


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What we wrote last, and the rule set's generation, the table's fingerprint and its frame right afterwards."""

    want: FirewallWant
    digest: str
    fingerprint: str
    generation: int
    frame: frozenset[str]


class NftablesFirewall:
    """The firewall driver `nftables`: one table `inet NAME`. data["digest"] of its receipt: of the want in it."""

    name = "nftables"

    def __init__(self, host: Host, conntrack: Conntrack | None = None) -> None:
        self._host = host
        self._file = host.run_root / "firewall.json"
        self._lock = threading.RLock()
        self._snapshot: Snapshot | None = None
        self._conntrack = conntrack or Conntrack()
        self._loopback = Loopback()
        self._found: tuple[Finding, ...] = ()
        self._found_at = -1  # the rule set's generation then
        self._listed: tuple[PublishedPort, ...] = ()
        self._listed_at = -1
        self._layout = digest_of(rules.script(host.name, FirewallWant()))
        self._table = f"table 'inet {host.name}'"

    def check(self, want: FirewallWant) -> None:
        """Raise WrongState for a bad address, Conflict if one port is published twice, UnfitHost without nft."""
        _check_ports(want.ports)
        _ = self._nft

    def ensure(self, want: FirewallWant) -> Receipt:
        """Write the wanted table, or delete it when nothing is wanted; do nothing if it is there unaltered."""
        with self._lock:
            intact = self._intact()
            if self._snapshot is None or not intact or self._snapshot.want != want:
                self.check(want)
                self._refuse_foreign()
                if want.empty:
                    self.remove(self._receipt(""))
                    return self._receipt(digest_of(_plain(want)))
                self._write(want, self._snapshot.want if self._snapshot and intact else None)
            assert self._snapshot is not None
            return self._receipt(self._snapshot.digest)

    def observe(self) -> Iterable[Receipt]:
        """The table's receipt. If the table, or an accept that it needs elsewhere, was altered, it has no digest."""
        with self._lock:
            if self._intact() and self._snapshot is not None:
                return [self._receipt(self._snapshot.digest)]
            if not self._fingerprint():
                return []
            receipt = self._receipt("", self._mark() or "")
            return [replace(receipt, data={"ports": [asdict(port) for port in self._published()]})]

    def _published(self) -> tuple[PublishedPort, ...]:
        """The ports that the altered table publishes: none if one of our rules is missing, else those of its maps."""
        now, table = self._rules.generation(), self._host.name
        if now != self._listed_at:
            wrote = self._snapshot or self._load(of_any_version=True)
            whole = wrote is not None and wrote.frame <= set(self._rules.frame(table))
            bound, wildcard = (self._rules.elements(table, map) if whole else () for map in ("bound", "wildcard"))
            self._listed, self._listed_at = published(bound, wildcard, wrote.want.ports if wrote else ()), now
        return self._listed

    def applied(self) -> FirewallWant | None:
        """What is in the table; None if it is not there or was altered."""
        with self._lock:
            return self._snapshot.want if self._intact() and self._snapshot is not None else None

    def remove(self, receipt: Receipt) -> None:
        """Delete the table, unless it belongs to another root."""
        with self._lock:
            if not self._foreign():
                forwarding.withdraw(self._host, self._nft)
                if self._mark() is not None:
                    self._run(rules.deletion(self._host.name))
            if (snapshot := self._snapshot or self._load(of_any_version=True)) is not None:
                self._loopback.withdraw(snapshot.want)
            try:
                self._settle(FirewallWant(), altered=False)
            finally:
                self._snapshot = None
                self._file.unlink(missing_ok=True)

    def findings(self) -> Iterable[Finding]:
        """Report what other firewalls do to containers; checked again only after somebody changed a rule."""
        with self._lock:
            now = self._rules.generation()
            if now != self._found_at:
                self._found = tuple(forwarding.findings(self._host, self._rules))
                self._found_at = now
            lacking = self._loopback.unguarded
            able = self._conntrack.findings()
            return (*self._found, *able, *((Finding("firewall", lacking),) if lacking else ()))

    def watch(self, tell: Callable[[str, str], None]) -> Callable[[], None]:
        """Restore the table as soon as somebody alters it, and tell who did; return a function that ends this.

        It also tells what the kernel lacks, once, because that does not change while an agent runs.
        """
        for found in self._conntrack.findings():
            tell(found.subject, f"{found.text} ({found.remedy})")

        def look(who: str) -> bool:
            done = "; it is written again"
            try:
                with self._lock:
                    if self._snapshot is None or self._intact():
                        return False
                    self._refuse_foreign()
                    self._write(self._snapshot.want, None)
            except (HoldfastError, OSError) as error:  # the pass that follows tries again
                done = f": {error}"
            tell("firewall", f"{self._table} was altered by {who or 'another program'}{done}")
            return True

        return Monitor(self._host.name, look).close

    @cached_property
    def _nft(self) -> Nft:
        return open_nft()

    @cached_property
    def _rules(self) -> RuleSet:
        return RuleSet()

    def _receipt(self, digest: str, root: str | None = None) -> Receipt:
        """root: the id in the table's comment; a table that is as we wrote it is ours."""
        data, root = {"digest": digest} if digest else {}, self._host.id if root is None else root
        return Receipt("firewall", self.name, self._host.name, data=data, root=root)

    def _mark(self) -> str | None:
        """The id of the root that the table belongs to, "" if it has none; None without a table."""
        comment = self._rules.comment(self._host.name)
        return None if comment is None else comment.removeprefix(rules.MARK)

    def _foreign(self) -> str:
        """The id of the other root that the table belongs to, "" if its comment or its content is ours."""
        mark = self._mark() or self._host.id
        return "" if mark == self._host.id or self._intact() else mark

    def _refuse_foreign(self) -> None:
        if other := self._foreign():
            whose = f"it belongs to the root with the id {other}"
            raise Conflict(f"write {self._table}: {whose} (another name in agent.toml)")

    def _intact(self) -> bool:
        """Whether the table is as in the snapshot."""
        self._snapshot = self._snapshot or self._load()
        if self._snapshot is None or not self._loopback.intact(self._snapshot.want):
            return False
        now = self._rules.generation()
        if now == self._snapshot.generation:
            return True
        if self._fingerprint() != self._snapshot.fingerprint or not forwarding.allowed(self._host, self._nft):
            return False
        self._snapshot = replace(self._snapshot, generation=now)
        return True

    def _write(self, want: FirewallWant, old: FirewallWant | None) -> None:
        """Write the table and take a snapshot. old: what is in it unaltered; only the difference is written then."""
        if old is None:
            forwarding.allow(self._host, self._nft)
        whole = rules.script(self._host.name, want, self._host.id)
        text = whole if old is None else rules.update(self._host.name, old, want)
        before = self._rules.generation()
        self._run(text)
        fingerprint = self._fingerprint()
        after = self._rules.generation()
        if fingerprint is None or after != before + bool(text):  # somebody wrote meanwhile, perhaps to our table
            self._run(whole)
            fingerprint = self._fingerprint() or ""
            after = self._rules.generation()
        self._settle(want, altered=old is None)
        self._loopback.ensure(want)
        frame = self._snapshot.frame if self._snapshot and old else frozenset(self._rules.frame(self._host.name))
        self._keep(Snapshot(want, digest_of(_plain(want)), fingerprint, after, frame))

    def _settle(self, want: FirewallWant, *, altered: bool) -> None:
        """Delete the flows that do not go where the table, which contains want by now, sends them."""
        snapshot = self._snapshot or self._load(of_any_version=True)
        before = snapshot.want if snapshot else FirewallWant()
        flows.settle(self._conntrack, before, want, self._host.pool, altered=altered)

    def _fingerprint(self) -> str | None:
        return self._rules.fingerprint(self._host.name)

    def _run(self, text: str) -> None:
        try:
            self._nft.run(text)
        except NftError as error:
            if "not permitted" in str(error):
                raise NotPermitted(f"write {self._table}: not permitted (root with CAP_NET_ADMIN)") from error
            raise UnfitHost(f"write {self._table}: {error} (a kernel with nf_tables and NAT)") from error

    def _keep(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._file.parent.mkdir(parents=True, exist_ok=True)
        frame = sorted(snapshot.frame)
        kept = [_plain(snapshot.want), snapshot.fingerprint, snapshot.generation, self._layout, frame]
        write_whole(self._file, json.dumps(kept))

    def _load(self, *, of_any_version: bool = False) -> Snapshot | None:
        """Read what `_keep` wrote; None if it is missing, damaged, or of a version that writes another table."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            want, fingerprint, generation, *more = json.loads(self._file.read_text())
            layout, frame = more if len(more) == 2 else ("", ())  # an earlier version wrote no frame
            if of_any_version or layout == self._layout:
                networks = tuple(FirewallNetwork(**network) for network in want["networks"])
                wrote = FirewallWant(networks, tuple(PublishedPort(**port) for port in want["ports"]))
                return Snapshot(wrote, digest_of(want), fingerprint, generation, frozenset(frame))
        return None


def _plain(want: FirewallWant) -> dict[str, Any]:
    """Like dataclasses.asdict, which makes deep copies and takes ten times as long for a thousand ports."""
    tables: dict[str, tuple[FirewallNetwork | PublishedPort, ...]] = {"networks": want.networks, "ports": want.ports}
    return {
        key: [{name: getattr(each, name) for name in each.__dataclass_fields__} for each in table]
        for key, table in tables.items()
    }


def _check_ports(ports: Iterable[PublishedPort]) -> None:
    seen: dict[tuple[str, str, int], PublishedPort] = {}
    for port in ports:
        for address in (port.host_ip or "0.0.0.0", port.address):
            try:
                IPv4Address(address)
            except AddressValueError as error:
                raise WrongState(f"publish '{port}': address '{address}': {error} (an IPv4 address)") from error
        host_ip = "" if port.host_ip in rules.WILDCARDS else port.host_ip
        for number in range(port.host_port, port.host_port + port.count):  # alone or in a range
            other = seen.setdefault((port.protocol, host_ip, number), port)
            if other is not port:
                taken = f"port {number}/{port.protocol} leads to {other.address} already"
                raise Conflict(f"publish '{port}': {taken} (another port)")
