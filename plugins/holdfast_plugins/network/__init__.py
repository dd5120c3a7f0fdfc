"""Built-in networking: the networks none, host and bridge with their endpoints, and the nftables firewall.

Entry point: `network`. Modules that talk to the kernel are imported when the drivers are registered.
"""

from __future__ import annotations

from collections.abc import Callable

from holdfast.drivers import Driver, FirewallWant, Host
from holdfast.hookspecs import RegisterNetwork, hookimpl


@hookimpl
def register_network_drivers(register: RegisterNetwork, host: Host) -> None:
    """Offer none, host and bridge."""
    from holdfast_plugins.network.bridge import BridgeNetwork
    from holdfast_plugins.network.endpoint import BridgeEndpoint
    from holdfast_plugins.network.none_host import BareEndpoint, BareNetwork

    register(BareNetwork("none"), BareEndpoint("none"))
    register(BareNetwork("host"), BareEndpoint("host"))
    network = BridgeNetwork(host)
    register(network, BridgeEndpoint(host, network))


@hookimpl
def register_firewall_drivers(register: Callable[[Driver[FirewallWant]], None], host: Host) -> None:
    """Offer nftables."""
    from holdfast_plugins.network.firewall import NftablesFirewall

    register(NftablesFirewall(host))
