"""Each app has a network of its own, unless it asks for another one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest

from ground import patient
from holdfast.store import Store
from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

SERVER = """
[containers.{name}]
image = "busybox:1"
init = true
command = "httpd -f -p 80 -h /etc"
"""
CLIENT = """
[containers.client]
image = "busybox:1"
init = true
command = "sleep 1000"
"""


def address(agent: LiveAgent, container: str, network: str) -> str:
    (instance,) = agent.instances(container)
    return str(instance["addresses"][network])


def fetches(agent: LiveAgent, container: str, host: str, port: int = 80) -> bool:
    """Whether a container gets a page from a host, by an address or a name that its hosts file has."""
    lines = [line.split() for line in agent.exec(container, "cat", "/etc/hosts").splitlines()]
    known = next((words[0] for words in lines if host in words[1:]), host)
    ask = f"printf 'GET /hostname HTTP/1.0\\r\\n\\r\\n' | timeout 3 nc {known} {port} | grep -q ' 200 '"
    return known[0].isdigit() and agent.cli("exec", container, "sh", "-c", ask, check=False).returncode == 0


def gets(agent: LiveAgent, container: str, host: str, port: int = 80) -> None:
    """Wait until it gets one: a container that runs need not listen yet."""
    agent.wait(lambda: fetches(agent, container, host, port), f"{container} gets a page from {host}:{port}")


def bridges(agent: LiveAgent) -> set[str]:
    return {path.name for path in Path("/sys/class/net").glob(f"{agent.host.name}-*") if (path / "bridge").is_dir()}


def test_apps_reach_their_own_containers_and_no_others(agent: LiveAgent, free_port: Callable[[], int]) -> None:
    port = free_port()
    agent.write("shop.toml", SERVER.format(name="db") + f'ports = ["{port}:80"]\n' + CLIENT)
    agent.write("other.toml", CLIENT)
    agent.converge()
    database = address(agent, "shop/db", "shop/default")
    assert bridges(agent) == {agent.host.link("bridge", id) for id in ("shop/default", "other/default")}
    gets(agent, "shop/client", "db")
    gets(agent, "shop/client", "db.shop")
    assert not fetches(agent, "other/client", database)
    assert "db" not in agent.exec("other/client", "cat", "/etc/hosts")
    way_out = agent.exec("other/client", "ip", "route").split("default via ")[1].split()[0]
    gets(agent, "other/client", way_out, port)  # a published port is open to other apps
    gets(agent, "shop/client", way_out, port)  # and to the app itself
    with urlopen(f"http://127.0.0.1:{port}/hostname", timeout=patient(10)) as answer:
        assert answer.read() == b"db\n"


def test_app_reaches_another_by_joining_its_network_which_goes_with_its_last_user(agent: LiveAgent) -> None:
    agent.write("shop.toml", SERVER.format(name="db"))
    agent.write("other.toml", CLIENT + 'networks = ["default", "shop/default"]\n[app]\ndepends_on = ["shop"]\n')
    agent.converge()
    gets(agent, "other/client", "db.shop")
    agent.write("other.toml", CLIENT)
    agent.converge()
    assert not fetches(agent, "other/client", "db.shop")
    agent.remove("shop.toml")
    agent.converge()
    assert bridges(agent) == {agent.host.link("bridge", "other/default")}


def test_apps_that_ask_for_it_share_the_bridge(agent: LiveAgent) -> None:
    for name, text in (("shop", SERVER.format(name="db")), ("other", CLIENT)):
        agent.write(f"{name}.toml", f'[app]\nnetwork = "bridge"\n{text}')
    agent.converge()
    assert bridges(agent) == {agent.host.link("bridge", "bridge")}
    gets(agent, "other/client", "db.shop")


def test_network_of_an_earlier_version_grows_in_place(agent: LiveAgent) -> None:
    agent.write("shop.toml", SERVER.format(name="db"))
    agent.converge()
    before = agent.pid("shop/db"), address(agent, "shop/db", "shop/default")
    agent.stop()
    store = Store(agent.host.root / "state.db")
    for receipt in (*store.receipts("network"), *store.receipts("endpoint")):
        data = {key: value for key, value in receipt.data.items() if key not in ("hosts", "joined")}
        if receipt.kind == "endpoint":
            data.pop("subnet")
        store.put_receipt(replace(receipt, data=data))
    store.close()
    agent.write("shop.toml", SERVER.format(name="db") + "".join(CLIENT.replace("client", f"c{n}") for n in range(13)))
    agent.start()
    agent.converge(timeout=120)
    assert (agent.pid("shop/db"), address(agent, "shop/db", "shop/default")) == before
    assert f"{before[1]}/27" in agent.exec("shop/db", "ip", "address", "show", "eth0")
    gets(agent, "shop/c12", "db")


def test_network_grows_under_running_containers(agent: LiveAgent) -> None:
    agent.write("shop.toml", SERVER.format(name="db"))
    agent.converge()
    before = agent.pid("shop/db"), address(agent, "shop/db", "shop/default")
    more = "".join(CLIENT.replace("client", f"c{n}") for n in range(13))
    agent.write("shop.toml", SERVER.format(name="db") + more)
    agent.converge(timeout=120)
    assert (agent.pid("shop/db"), address(agent, "shop/db", "shop/default")) == before
    assert f"{before[1]}/27" in agent.exec("shop/db", "ip", "address", "show", "eth0")
    gets(agent, "shop/c12", "db")
    shown = subprocess.run(["ip", "-4", "address"], check=True, capture_output=True, text=True).stdout
    assert (
        sum(agent.host.link("bridge", "shop/default") in line for line in shown.splitlines() if "inet " in line) == 1
    )
