"""What drivers are asked on a real host: what is there already when they check, and which of them makes what."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from live.agent import LiveAgent

pytestmark = pytest.mark.live

SLEEPER = '\nimage = "busybox:1"\ncommand = ["sleep", "10000"]\nstop_grace_period = "0s"\n'


def fixed(subnet: str, address: str, more: str = "") -> str:
    """A container with a fixed address on a network of its app."""
    return f"""
[containers.web]{SLEEPER}networks = {{ front = {{ ipv4_address = "{address}" }} }}{more}
[containers.db]{SLEEPER}networks = ["front"]
[networks.front]
subnet = "{subnet}"
"""


def test_a_fixed_address_passes_to_the_successor_and_is_refused_to_others_before_anything_stops(
    agent: LiveAgent,
) -> None:
    subnet = str(next(IPv4Network(agent.host.pool).subnets(new_prefix=26)))
    address, other = str(IPv4Network(subnet)[9]), str(IPv4Network(subnet)[10])
    agent.write("shop.toml", fixed(subnet, address))
    joins = f'[containers.api]{SLEEPER}networks = {{ "shop/front" = {{ ipv4_address = "%s" }} }}\n'
    agent.write("rest.toml", joins % other)
    agent.converge()
    before, api = agent.pid("shop/web"), agent.pid("rest/api")
    agent.write("shop.toml", fixed(subnet, address, '\nenvironment = { COLOUR = "red" }'))
    agent.converge()
    assert agent.pid("shop/web") != before
    assert agent.instances("shop/web")[0]["addresses"] == {"shop/front": address}
    taken = agent.instances("shop/db")[0]["addresses"]["shop/front"]
    agent.write("rest.toml", joins % taken)
    agent.sync()
    agent.wait_until(lambda now: f"address '{taken}' is taken by" in " ".join(now["blockers"]))
    assert agent.pid("rest/api") == api
    assert agent.instances("rest/api")[0]["addresses"] == {"shop/front": other}
