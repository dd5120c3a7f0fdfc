"""Networks, names and published ports as containers and their clients see them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

SLEEPER = """
image = "busybox:1"
init = true
cap_add = ["NET_RAW"]  # for busybox's ping
command = "sleep 1000"
"""
ECHO = """
image = "busybox:1"
init = true
command = ["sh", "-c", "echo hello from $$HOSTNAME > /tmp/index.html; exec httpd -f -p 80 -h /tmp"]
"""
CLIENT = """
import sys, urllib.request
print(urllib.request.urlopen(f"http://{sys.argv[1]}:{sys.argv[2]}/", timeout=5).read().decode())
"""
UDP = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("", 53))
while True:
    server.sendto(*server.recvfrom(100))
"""


def ask(address: str, port: int, timeout: float = 2) -> str:
    """What an HTTP server answers, "" if nothing does."""
    try:
        with socket.create_connection((address, port), timeout) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.makefile().read()
    except OSError:
        return ""


def ask_udp(address: str, port: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        client.sendto(b"ping", (address, port))
        try:
            return client.recv(100)
        except OSError:
            return b""


def reaches(agent: LiveAgent, container: str, target: str) -> bool:
    return agent.cli("exec", container, "ping", "-c", "1", "-W", "1", target, check=False).returncode == 0


def subnets(agent: LiveAgent) -> list[str]:
    return [str(subnet) for subnet in list(IPv4Network(agent.host.pool).subnets(new_prefix=24))[-3:]]


@contextmanager
def udp_server(agent: LiveAgent, container: str) -> Iterator[None]:
    """Echo datagrams to port 53 of a container: busybox has nothing that could."""
    space = f"{agent.host.name}-{agent.instances(container)[0]['id']}"
    with subprocess.Popen(["ip", "netns", "exec", space, sys.executable, "-c", UDP]) as server:
        yield
        server.kill()


@contextmanager
def other_host(agent: LiveAgent) -> Iterator[str]:
    """A namespace that is linked to this host as a neighbour on a wire is; yields its name. It reaches the host at
    the first address of the pool's last subnet."""
    name, link = f"{agent.host.name}-peer", f"{agent.host.name}-w"
    subnet = IPv4Network(subnets(agent)[-1])
    commands = (
        f"netns add {name}",
        f"link add {link} type veth peer name eth0 netns {name}",
        f"addr add {subnet[1]}/24 dev {link}",
        f"link set {link} up",
        f"-n {name} addr add {subnet[2]}/24 dev eth0",
        f"-n {name} link set eth0 up",
    )
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "link", "delete", link], check=True)
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_published_ports_answer_from_everywhere(agent: LiveAgent, free_port: Callable[[], int]) -> None:
    web, local, udp = (free_port() for _ in range(3))
    agent.write(
        "shop.toml",
        f"""
[containers.web]{ECHO}ports = ["{web}:80", "127.0.0.1:{local}:80"]
[containers.dns]{SLEEPER}ports = ["{udp}:53/udp"]
""",
    )
    agent.converge()
    agent.wait(lambda: "hello" in ask("127.0.0.1", web), "it answers on loopback")
    assert "hello from web" in ask("127.0.0.1", local)
    with udp_server(agent, "shop/dns"):
        agent.wait(lambda: ask_udp("127.0.0.1", udp) == b"ping", "it answers by UDP")
    gateway = agent.instances("shop/web")[0]["addresses"]["shop/default"].rpartition(".")[0] + ".1"
    assert "hello" in ask(gateway, web)
    assert ask(gateway, local) == ""
    host = str(IPv4Network(subnets(agent)[-1])[1])
    with other_host(agent) as peer:
        client = ["ip", "netns", "exec", peer, sys.executable, "-c", CLIENT, host]
        found = subprocess.run([*client, str(web)], capture_output=True, text=True, check=True)
        assert "hello" in found.stdout
        assert subprocess.run([*client, str(local)], capture_output=True, check=False).returncode
    agent.remove("shop.toml")
    agent.converge()
    assert ask("127.0.0.1", web) == ""


def test_networks_lead_where_they_should_and_nowhere_else(agent: LiveAgent) -> None:
    front, back, _ = subnets(agent)
    fixed = str(IPv4Network(front)[50])
    agent.write(
        "shop.toml",
        f"""
[containers.web]{SLEEPER}networks = {{ front = {{ ipv4_address = "{fixed}", aliases = ["www"] }}, back = {{}} }}
[containers.client]{SLEEPER}networks = ["front"]
[containers.db]{SLEEPER}networks = ["back"]
[containers.alone]{SLEEPER}networks = ["none"]
[containers.open]{SLEEPER}networks = ["host"]
[networks.front]
subnet = "{front}"
[networks.back]
subnet = "{back}"
internal = true
""",
    )
    agent.converge()
    assert agent.instances("shop/web")[0]["addresses"]["shop/front"] == fixed
    for name in ("web", "www", "web.shop", fixed):
        agent.wait(lambda name=name: reaches(agent, "client", name), f"client reaches {name}")  # type: ignore[misc]
    agent.wait(lambda: reaches(agent, "web", "db"), "web reaches db")
    assert not reaches(agent, "client", "db")
    address = agent.instances("shop/db")[0]["addresses"]["shop/back"]
    assert not reaches(agent, "client", address)
    routes = {name: agent.exec(name, "ip", "route") for name in ("client", "db", "alone")}
    assert "default" in routes["client"]
    assert "default" not in routes["db"]
    assert routes["alone"] == ""
    mine = Path("/proc/self/ns/net").readlink()
    assert Path(f"/proc/{agent.pid('shop/open')}/ns/net").readlink() == mine
    assert Path(f"/proc/{agent.pid('shop/alone')}/ns/net").readlink() != mine
    agent.wait(lambda: reaches(agent, "client", str(IPv4Network(front)[1])), "client reaches its gateway")


def test_names_follow_neighbours_on_a_shared_network_that_come_and_go_in_the_same_file(agent: LiveAgent) -> None:
    agent.write("shop.toml", f'[containers.web]{SLEEPER}networks = ["bridge"]')
    agent.converge()
    pid = agent.pid("shop/web")
    before = agent.exec("web", "stat", "-c", "%i", "/etc/hosts")
    assert not reaches(agent, "shop/web", "api.other")
    agent.write("other.toml", f'[containers.api]{SLEEPER}networks = ["bridge"]')
    agent.converge()
    agent.wait(lambda: reaches(agent, "shop/web", "api.other"), "the new neighbour is known")
    agent.wait(lambda: reaches(agent, "other/api", "web.shop"), "the new one knows its neighbour")
    agent.remove("other.toml")
    agent.converge()
    agent.wait(lambda: "api" not in agent.exec("shop/web", "cat", "/etc/hosts"), "the neighbour is forgotten")
    assert agent.exec("shop/web", "stat", "-c", "%i", "/etc/hosts") == before
    assert agent.pid("shop/web") == pid
    assert "nameserver 127." not in agent.exec("shop/web", "cat", "/etc/resolv.conf")


def test_addresses_stay_and_never_clash_across_restarts_of_the_agent(agent: LiveAgent) -> None:
    names = [f"c{number}" for number in range(4)]
    agent.write("shop.toml", "".join(f"[containers.{name}]{SLEEPER}" for name in names[:2]))
    agent.converge()
    before = {name: agent.instances(f"shop/{name}")[0]["addresses"] for name in names[:2]}
    agent.restart()
    agent.write("shop.toml", "".join(f"[containers.{name}]{SLEEPER}" for name in names))
    agent.converge()
    after = {name: agent.instances(f"shop/{name}")[0]["addresses"] for name in names}
    assert {name: after[name] for name in before} == before
    assert len({each["shop/default"] for each in after.values()}) == len(names)
    taken = after["c0"]["shop/default"]
    agent.write("late.toml", f'[containers.web]{SLEEPER}networks = {{ bridge = {{ ipv4_address = "{taken}" }} }}')
    agent.sync()
    status = agent.wait_until(lambda now: taken in " ".join(now["blockers"]))
    assert not status["converged"]
    assert after == {name: agent.instances(f"shop/{name}")[0]["addresses"] for name in names}
