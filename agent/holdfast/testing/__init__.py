"""What tests of drivers need: the laws that every driver is held to, one class for each kind, and a host for them.

from holdfast.testing import VolumeConformance

class TestMyVolume(VolumeConformance):
    def make_driver(self, host):
        return MyVolume(host)

    def make_want(self, host, number):
        return VolumeWant(id=f"shop/data-{number}")
"""

import pytest

pytest.register_assert_rewrite("holdfast.testing.laws", "holdfast.testing.kinds")

from holdfast.testing.confined import take_away  # noqa: E402 - only what is imported later is rewritten
from holdfast.testing.fingerprint import host_fingerprint  # noqa: E402
from holdfast.testing.kinds import (  # noqa: E402
    EndpointConformance,
    FirewallConformance,
    MountConformance,
    NetworkConformance,
    PolicyConformance,
    RootfsConformance,
    VolumeConformance,
)
from holdfast.testing.laws import DriverConformance, temporary_host  # noqa: E402

__all__ = [
    "DriverConformance",
    "EndpointConformance",
    "FirewallConformance",
    "MountConformance",
    "NetworkConformance",
    "PolicyConformance",
    "RootfsConformance",
    "VolumeConformance",
    "host_fingerprint",
    "take_away",
    "temporary_host",
]
