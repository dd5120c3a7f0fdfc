"""Looks at the host: at all of it, and between two such looks at what the agent's own actions have changed.

A full look asks every driver (`observe`), which costs what exists. After one that found everything as recorded, a
look that follows from the agent's own work reads its records instead: what they say is there has just been made. So
a change of one container costs as much among a thousand as among ten. Whatever others may have done is seen by the
next full look: at once where a driver noticed something or an action failed, else soon after the work is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from holdfast.node.context import Context
from holdfast.node.observe import firewall_kept, lacking_binds, network_state, observe, seen_instance
from holdfast.node.watch import ExitWatch
from holdfast.observed import FirewallWant, Instance, InstanceId, Json, NetworkState, Observed, Receipt, Subject
from holdfast.spec.model import Container

LONGEST = 10.0  # seconds that full looks are put off while there is always something to do


class Lookout:
    """Keeps what was seen. Used by one thread; `distrust` by any.

    skipped: whether the last look was not a full one.
    """

    def __init__(self, context: Context, exits: ExitWatch) -> None:
        self._context, self._exits = context, exits
        self._last = Observed()
        self._trusted = False  # whether records say what is there
        self._full_by = math.inf  # when the next full look is due, since records were last made do with
        self._instances: dict[InstanceId, Instance] = {}  # those that are as recorded
        self._networks: dict[str, tuple[Receipt, NetworkState]] = {}
        self._volumes: list[Receipt] = []
        self._wanted: dict[int, Container] = {}  # those whose binds lack nothing, by identity
        self._firewall: tuple[Json | None, FirewallWant | None] = (None, None)
        self.skipped = False

    def distrust(self) -> None:
        """Have the next look be a full one."""
        self._trusted = False

    def look(self, busy: frozenset[Subject], wanted: Sequence[Container], *, deep: bool, light: bool) -> Observed:
        """Read the host. light: reading the records will do, if they are to be trusted. The rest: see `observe`."""
        self.skipped = light and not deep and self._may_skip()
        if not self.skipped:
            return self._full(busy, deep=deep, wanted=wanted)
        self._full_by = min(self._full_by, time.monotonic() + LONGEST)
        new = {id(want): want for want in wanted if id(want) not in self._wanted}
        lacking = lacking_binds(new.values())
        if not lacking:
            self._wanted |= new
        return self._from_records(busy, lacking)

    def _may_skip(self) -> bool:
        due = time.monotonic() >= self._full_by
        return self._trusted and not due and self._context.same_boot() and self._volume_receipts() == self._volumes

    def _volume_receipts(self) -> list[Receipt]:
        return [each for each in self._context.store.owned("") if each.kind == "volume"]

    def _full(self, busy: frozenset[Subject], *, deep: bool, wanted: Sequence[Container]) -> Observed:
        store = self._context.store
        self._wanted = {id(want): want for want in wanted}
        self._trusted, self._full_by, self._volumes = True, math.inf, self._volume_receipts()
        kept = store.fact("firewall")
        seen = observe(self._context, self._exits.watches, busy=busy, deep=deep, wanted=wanted)
        self._instances = {
            each.id: each for each in seen.instances if each is store.instances.get(each.id) and each.key not in busy
        }
        self._firewall = (kept, seen.firewall)
        networks = dict(seen.networks)
        for name, state in seen.networks.items():
            receipt = store.receipt("network", name)
            if receipt is not None:  # else it is being removed right now
                networks[name] = self._network(receipt, state)
        self._networks = {name: known for name, known in self._networks.items() if name in networks}
        self._last = replace(seen, networks=networks)
        if not self._as_recorded(busy):
            self._trusted = False
        return self._last

    def _as_recorded(self, busy: frozenset[Subject]) -> bool:
        """Whether the look found nothing else than what is recorded."""
        seen, plugins = self._last, self._context.plugins.states
        return (
            len(self._instances) + sum(each.key in busy for each in seen.instances) == len(seen.instances)
            and not any(network.faults for network in seen.networks.values())
            and not any(volume.faults for volume in seen.volumes.values())
            and not (seen.orphans or seen.missing or seen.lacking)
            and (seen.firewall is not None or self._firewall[0] is None)
            and all(plugin.state == "ok" for plugin in plugins)
        )

    def _network(self, receipt: Receipt, seen: NetworkState | None = None) -> NetworkState:
        """The state of a network: the same object as long as nothing of it is new."""
        known = self._networks.get(receipt.id)
        if known is not None and known[0] is receipt and (seen is None or known[1] == seen):
            return known[1]
        state = seen or network_state(receipt)
        self._networks[receipt.id] = receipt, state
        return state

    def _from_records(self, busy: frozenset[Subject], lacking: Mapping[str, str]) -> Observed:
        store, known, watching = self._context.store, self._instances, self._exits.watching
        instances = []
        for id, instance in list(store.instances.items()):
            if known.get(id) is not instance or (instance.phase == "running" and id not in watching):
                instance = self._instance(instance, busy)
            instances.append(instance)
        kept = store.fact("firewall")
        if kept is not self._firewall[0]:
            self._firewall = (kept, firewall_kept(kept) if kept else None)
        firewall = self._firewall[1]
        self._last = replace(
            self._last,
            at=time.time(),
            instances=tuple(each for each in instances if each.id in store.instances),
            networks={each.id: self._network(each) for each in store.receipts("network")},
            firewall=firewall,
            published=firewall.ports if firewall else (),
            limits=dict(self._context.limits),
            lacking=lacking,
            busy=busy,
        )
        return self._last

    def _instance(self, instance: Instance, busy: frozenset[Subject]) -> Instance:
        if instance.key in busy:
            return instance
        context = self._context
        seen = seen_instance(context, instance, context.store.receipt, self._exits.watches, deep=False)
        if seen is context.store.instances.get(seen.id):
            self._instances[seen.id] = seen
        return seen
