"""The network of builds: which apps need it, and what an app that is to be built waits for. Used by `decide`."""

from __future__ import annotations

from holdfast.plan.draft import PlanDraft
from holdfast.spec.model import BUILD_NETWORK, App


def missing_network(app: App, draft: PlanDraft) -> str:
    """Why an app can't be built yet; "" if nothing is in the way. What is noted here keeps the network standing."""
    if not joins_network(app):
        return ""
    draft.builds = True
    if BUILD_NETWORK not in draft.observed.networks:
        return f"waits for network {BUILD_NETWORK}"
    if draft.observed.networks[BUILD_NETWORK].faults:
        return f"waits for network {BUILD_NETWORK} to be mended"
    firewall = draft.observed.firewall
    if firewall is None or all(each.id != BUILD_NETWORK for each in firewall.networks):
        return f"waits for the firewall to let network {BUILD_NETWORK} out"
    return ""


def joins_network(app: App) -> bool:
    """Whether an app has images to build that join the network of builds."""
    return any(build.network == "default" for build in app.images.values())
