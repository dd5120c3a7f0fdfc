"""Which networks stand, which are made, mended, widened or taken away, and what waits for one. Used by `decide`."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.observed import Generation, Instance, NetworkState, Subject
from holdfast.plan.actions import Change, EnsureNetwork, RemoveNetwork, Replace
from holdfast.plan.builds import joins_network
from holdfast.plan.draft import PlanDraft
from holdfast.plan.memory import UNMANAGED
from holdfast.plan.reasons import counted
from holdfast.plan.targets import current
from holdfast.spec.model import BUILD_NETWORK, Container, Network

DEFAULT_NETWORK = Network()


def joined(draft: PlanDraft) -> Mapping[str, int]:
    """How many of the containers that are wanted join each network; that of builds is there if it is needed."""
    apps = [generation.app for generation in draft.targets.values()]
    counted = draft.memory.count_joining(apps)
    if draft.builds or any(app.images and joins_network(app) for app in apps):
        return {**counted, BUILD_NETWORK: counted.get(BUILD_NETWORK, 0) + 1}
    return counted


def plan_networks(draft: PlanDraft) -> None:
    """Decide about every network that containers are to join, or that is there."""
    states, known = draft.observed.networks, draft.memory.networks
    settled = {"", *draft.memory.apps}
    unsettled = [
        network
        for network, joining in draft.joining.items()
        if (rests := known.get(network)) is None
        or rests[0] is not states.get(network)
        or rests[1] != joining
        or rests[2] not in settled
    ]
    for network in sorted(unsettled):
        joining, state = draft.joining[network], states.get(network)
        if _hold_network(network, state, draft) and state is not None:
            known[network] = (state, joining, _owner(network))
        else:
            known.pop(network, None)
    for network in sorted(states.keys() - draft.joining.keys()):
        if network not in draft.in_use:
            draft.offer(RemoveNetwork(app=_owner(network), network=network, reason="nothing uses it"))


def _hold_network(network: str, state: NetworkState | None, draft: PlanDraft) -> bool:
    """Decide about a network that containers are to join; True when it is as it should be."""
    owner, joining = _owner(network), draft.joining[network]
    if state is not None and is_outdated(network, draft):
        if network not in draft.in_use:
            draft.offer(RemoveNetwork(app=owner, network=network, reason="its definition changed"))
        return False
    reason = ("; ".join(state.faults) or _outgrown(network, draft)) if state else "it is not there"
    if not reason:
        return True
    defined = _defined(network, draft)
    if defined is not None:
        draft.offer(EnsureNetwork(app=owner, network=network, spec=defined, hosts=joining, reason=reason))
    elif state is None or state.faults:
        draft.waiting[Subject.of("network", network)] = f"{reason}, and no app in force defines it"
    return False


def _outgrown(network: str, draft: PlanDraft) -> str:
    """Why a network is to be ensured again for more containers; "" if it need not."""
    data, joining = draft.observed.networks[network].data, draft.joining[network]
    if "joined" not in data:
        return "an earlier version made it"
    return (
        f"it has room for {counted(data['hosts'], 'container')}, and {joining} join it"
        if _too_small(network, draft)
        else ""
    )


def _too_small(network: str, draft: PlanDraft) -> bool:
    """Whether more containers are to join a network than it has room for, and it can grow."""
    state = draft.observed.networks.get(network)
    room = state.data.get("hosts") if state else None
    return isinstance(room, int) and room < draft.joining.get(network, 0)


def _defined(network: str, draft: PlanDraft) -> Network | None:
    """How a network is defined now. None for one whose app is gone, which thereby stays as it stands."""
    owner, _, name = network.rpartition("/")
    if not owner:
        return DEFAULT_NETWORK
    target = draft.targets.get(owner) or current(draft.history.generations.get(owner, ()))
    return target.app.networks.get(name) if target else None


def is_outdated(network: str, draft: PlanDraft) -> bool:
    """Whether a network stands, but otherwise than it is defined now."""
    state, defined = draft.observed.networks.get(network), _defined(network, draft)
    return state is not None and defined is not None and state.want != defined.digest


def network_changes(instance: Instance, generation: Generation, draft: PlanDraft) -> tuple[Change, ...]:
    """A network that is defined otherwise than it stands is made anew, and so is all that is attached to it."""
    return tuple(
        Change(f"network {network}", "as it stands", "as defined now", Replace())
        for network in instance.want.networks
        if network in generation.app.containers[instance.container].networks and is_outdated(network, draft)
    )


def _owner(network: str) -> str:
    return network.rpartition("/")[0]


def missing_network(want: Container, draft: PlanDraft, instance: Instance | None = None) -> str:
    """The first network that does not stand as wanted, "" if all do. One that is only outdated is no obstacle to
    replacing an instance that is attached to it."""
    for network in want.networks:
        if network in UNMANAGED:
            continue
        if network not in draft.observed.networks:
            return f"waits for network {network}"
        if is_outdated(network, draft) and (instance is None or network not in instance.want.networks):
            return f"waits for network {network} to be made anew"
        if draft.observed.networks[network].faults:
            return f"waits for network {network} to be mended"
        if _too_small(network, draft) and f"network {network}" not in draft.history.failures:
            return f"waits for network {network} to grow"
    return ""
