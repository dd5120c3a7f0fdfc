"""Two agents on one host never touch each other's things."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from footprint import leftovers
from holdfast.drivers import Host
from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

SHOP = """
[containers.web]
image = "busybox:1"
init = true
command = "sleep 1000"
ports = ["127.0.0.1:{port}:80"]
volumes = ["data:/data"]
[volumes.data]
on_remove = "delete"
"""


def test_one_agent_comes_and_goes_while_the_other_holds(
    new_agent: Callable[[Host], LiveAgent], new_site: Callable[[], Host], free_port: Callable[[], int]
) -> None:
    one, two = (new_agent(new_site()) for _ in range(2))
    for agent in (one, two):
        agent.start()
        agent.image("busybox:1")
        agent.write("shop.toml", SHOP.format(port=free_port()))
        agent.sync()
    for agent in (one, two):
        agent.converge()
    pid = one.pid("shop/web")
    assert pid != two.pid("shop/web")
    assert one.instances("shop/web")[0]["addresses"] != two.instances("shop/web")[0]["addresses"]
    mark = one.events()[-1]["seq"]
    two.remove("shop.toml")
    two.converge()
    two.stop()
    assert leftovers(two.host) == []
    one.converge()
    assert one.pid("shop/web") == pid
    assert one.events()[-1]["seq"] == mark
    assert one.exec("shop/web", "ls", "-d", "/data").strip() == "/data"
