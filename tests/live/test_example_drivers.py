"""The three example drivers: installed with pip into a folder of their own, and used by a real agent."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network

import pytest

from holdfast.drivers import Host
from live.agent import LiveAgent
from live.examples import install, run_tests

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("mounts_alone"), pytest.mark.timeout(600)]

CONTAINER = '\nimage = "busybox:1"\nstop_grace_period = "0s"\n'
SLEEPER = f'{CONTAINER}command = ["sleep", "10000"]\n'


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has the drivers installed."""
    return install("drivers", tmp_path_factory.mktemp("drivers"))


@pytest.fixture
def agent(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, new_agent: Callable[[Host], LiveAgent], site: Host
) -> LiveAgent:
    """An agent that has the drivers, and makes root file systems with `copy`."""
    monkeypatch.setenv("PYTHONPATH", installed["PYTHONPATH"])
    agent = new_agent(site)
    agent.configure(more='storage.driver = "copy"')
    agent.start()
    agent.image("busybox:1")
    return agent


@pytest.fixture
def parent(site: Host) -> Iterator[str]:
    """A link of the host to put macvlan networks on."""
    name = site.link("parent", "")
    subprocess.run(["ip", "link", "add", name, "up", "type", "bridge"], check=True)
    yield name
    subprocess.run(["ip", "link", "delete", name], check=True)


def test_a_container_runs_on_a_copy_of_its_image_which_goes_with_it(agent: LiveAgent) -> None:
    agent.write("shop.toml", f'[containers.web]{SLEEPER}networks = ["none"]')
    agent.converge()
    copy = agent.host.root / "copies" / agent.instances("shop/web")[0]["id"]
    agent.exec("shop/web", "touch", "/made")
    assert (copy / "made").exists()
    assert not list(copy.glob("**/.wh.*"))
    pid = agent.pid("shop/web")
    agent.restart()
    agent.sync()
    assert agent.pid("shop/web") == pid
    sized = f'[containers.web]{SLEEPER}networks = ["none"]\nstorage_opt = {{ size = "1GiB" }}'
    agent.write("shop.toml", sized)
    agent.sync()
    agent.wait_until(lambda now: "driver 'copy' has no limits" in " ".join(now["blockers"]))
    assert agent.pid("shop/web") == pid
    agent.remove("shop.toml")
    agent.converge()
    assert list(copy.parent.iterdir()) == []


def test_a_scratch_folder_is_empty_for_each_instance_and_goes_with_it(agent: LiveAgent) -> None:
    mount = '{ type = "scratch", source = "work", target = "/work", driver_opts = { mode = "0750" } }'
    web = f'[containers.web]{SLEEPER}networks = ["none"]\nvolumes = [{mount}]\n'
    agent.write("shop.toml", web)
    agent.converge()
    agent.exec("shop/web", "touch", "/work/file")
    assert agent.exec("shop/web", "stat", "-c", "%a", "/work") == "750\n"
    agent.write("shop.toml", web.replace("0750", "0755"))
    agent.converge()
    assert agent.exec("shop/web", "ls", "/work") == ""
    assert len(list((agent.host.root / "scratch").glob("*/*"))) == 1
    agent.write("shop.toml", web.replace("0750", "rwx"))
    agent.sync()
    agent.wait_until(lambda now: "driver_opts.mode" in " ".join(now["blockers"]))
    agent.remove("shop.toml")
    agent.converge()
    assert list((agent.host.root / "scratch").glob("*/*")) == []


def test_containers_on_a_macvlan_network_reach_each_other_and_keep_their_addresses(
    agent: LiveAgent, parent: str
) -> None:
    subnet = str(next(IPv4Network(agent.host.pool).subnets(new_prefix=26)))
    network = f'[networks.lan]\ndriver = "macvlan"\nsubnet = "{subnet}"\ndriver_opts = {{ parent = "{parent}" }}\n'
    listener = f'{CONTAINER}command = ["nc", "-ll", "-p", "80", "-e", "echo", "hello"]\n'
    text = f'[containers.web]{listener}networks = ["lan"]\n[containers.db]{SLEEPER}networks = ["lan"]\n{network}'
    agent.write("shop.toml", text)
    agent.converge()
    address = agent.instances("shop/web")[0]["addresses"]["shop/lan"]
    assert IPv4Network(subnet).supernet_of(IPv4Network(address))
    asked = ("exec", "shop/db", "nc", "-w", "2", address, "80")
    agent.wait(lambda: agent.cli(*asked, check=False).stdout == "hello\n", "web answers")
    before = agent.instances("shop/web")[0]["id"]
    agent.write("shop.toml", text.replace('"hello"', '"again"'))
    agent.converge()
    (web,) = agent.instances("shop/web")
    assert (web["id"] != before, web["addresses"]["shop/lan"]) == (True, address)
    netns = agent.host.netns(web["id"]).name
    subprocess.run(["ip", "-n", netns, "link", "delete", "eth0"], check=True)
    agent.sync()
    agent.wait(lambda: agent.cli(*asked, check=False).stdout == "again\n", "web answers again")
    agent.remove("shop.toml")
    agent.converge()
    assert list((agent.host.run_root / "macvlan").iterdir()) == []


def test_the_drivers_pass_the_laws_of_their_kinds(installed: dict[str, str], site: Host) -> None:
    run_tests("drivers", installed, site.root / "own")
