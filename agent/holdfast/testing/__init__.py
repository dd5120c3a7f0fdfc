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

# Only what is imported after the line above is rewritten.
from holdfast.testing.confined import take_away as take_away  # noqa: E402
from holdfast.testing.fingerprint import host_fingerprint as host_fingerprint  # noqa: E402
from holdfast.testing.kinds import EndpointConformance as EndpointConformance  # noqa: E402
from holdfast.testing.kinds import FirewallConformance as FirewallConformance  # noqa: E402
from holdfast.testing.kinds import MountConformance as MountConformance  # noqa: E402
from holdfast.testing.kinds import NetworkConformance as NetworkConformance  # noqa: E402
from holdfast.testing.kinds import PolicyConformance as PolicyConformance  # noqa: E402
from holdfast.testing.kinds import RootfsConformance as RootfsConformance  # noqa: E402
from holdfast.testing.kinds import VolumeConformance as VolumeConformance  # noqa: E402
from holdfast.testing.laws import DriverConformance as DriverConformance  # noqa: E402
from holdfast.testing.laws import temporary_host as temporary_host  # noqa: E402
