"""A container's address is its own: it survives replacements, agents and upgrades."""

from __future__ import annotations

import sqlite3

import pytest

from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

SHOP = """
[containers.web]
image = "busybox:1"
init = true
command = "sleep 1000"
networks = ["front"]
environment = {{ V = "{version}" }}

[containers.client]
image = "busybox:1"
init = true
command = "sleep 1000"
networks = ["front"]

[networks.front]
"""


def address(agent: LiveAgent, container: str = "shop/web") -> str:
    (instance,) = agent.instances(container)
    return str(instance["addresses"]["shop/front"])


def hold(agent: LiveAgent, version: str) -> str:
    """Bring the shop to a version; return the instance of its web."""
    agent.write("shop.toml", SHOP.format(version=version))
    agent.converge()
    (instance,) = agent.instances("shop/web")
    return str(instance["id"])


def test_replaced_container_keeps_its_address_and_its_neighbours_find_it(agent: LiveAgent) -> None:
    first = hold(agent, "one")
    before = address(agent)
    assert hold(agent, "two") != first
    assert address(agent) == before
    assert f"{before} web" in agent.exec("shop/client", "cat", "/etc/hosts")
    agent.restart()
    hold(agent, "three")
    assert address(agent) == before


def test_app_that_comes_back_has_its_addresses_again(agent: LiveAgent) -> None:
    hold(agent, "one")
    before = address(agent), address(agent, "shop/client")
    agent.remove("shop.toml")
    agent.converge()
    hold(agent, "two")
    assert (address(agent), address(agent, "shop/client")) == before


def test_address_of_a_removed_container_goes_to_no_other_right_away(agent: LiveAgent) -> None:
    hold(agent, "one")
    before = address(agent)
    agent.write("shop.toml", SHOP.format(version="one").replace("containers.web", "containers.stranger"))
    agent.converge()
    assert address(agent, "shop/stranger") != before


def test_addresses_that_an_older_agent_gave_stay_through_the_upgrade_and_the_next_replacement(
    agent: LiveAgent,
) -> None:
    first = hold(agent, "one")
    before = address(agent)
    agent.stop()
    for lease in (agent.host.root / "networks/shop~front/leases").iterdir():
        lease.write_text(lease.read_text().split()[1])
    with sqlite3.connect(agent.host.root / "state.db") as database:
        database.execute("DELETE FROM facts WHERE name = 'leases'")
    database.close()
    agent.start()
    agent.converge()
    assert (address(agent), agent.instances("shop/web")[0]["id"]) == (before, first)
    assert hold(agent, "two") != first
    assert address(agent) == before
