"""The networks without a link: `none` (a namespace with loopback only) and `host` (the host's namespace).

The node makes the namespace, or none; these drivers only return receipts.
"""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.drivers import EndpointWant, NetworkWant
from holdfast.errors import WrongState
from holdfast.observed import Receipt


class _Bare:
    def __init__(self, name: str) -> None:
        self.name = name

    def observe(self) -> Iterable[Receipt]:
        return ()

    def remove(self, receipt: Receipt) -> None:
        """Nothing was made."""


class BareNetwork(_Bare):
    """A network without interface and addresses, which always exists and has no options."""

    def check(self, want: NetworkWant) -> None:
        if want.subnet or want.gateway or want.internal or want.driver_opts:
            raise WrongState(f"network '{want.id}': driver '{self.name}' takes no settings (driver = \"bridge\")")

    def ensure(self, want: NetworkWant) -> Receipt:
        self.check(want)
        data = {"interface": "", "subnet": "", "gateway": "", "internal": False}
        return Receipt("network", self.name, want.id, data=data)


class BareEndpoint(_Bare):
    """An attachment that changes nothing and has no address."""

    def check(self, want: EndpointWant) -> None:
        if want.ipv4_address or want.mac_address:
            raise WrongState(
                f"network '{want.network.id}': driver '{self.name}' gives no addresses (a bridge network)"
            )

    def ensure(self, want: EndpointWant) -> Receipt:
        self.check(want)
        data = {"address": "", "interface": "", "host_interface": ""}
        return Receipt("endpoint", self.name, f"{want.instance}/{want.network.id}", want.instance, data)
