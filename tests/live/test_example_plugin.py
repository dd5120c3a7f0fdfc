"""The example of a third-party plugin: built, installed with pip into a folder of its own, and used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from holdfast.drivers import Host
from live.agent import LiveAgent
from live.examples import install, run_tests

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("mounts_alone"), pytest.mark.timeout(600)]

USE = """
import json, sys
from pathlib import Path
from holdfast.drivers import Host, VolumeWant
from holdfast.kinds import VOLUME
from holdfast.plugins import load_plugins

host = Host(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
plugins = load_plugins(host)
state = next(state for state in plugins.states if state.name == "ext4")
want = VolumeWant(id="shop/data", driver_opts={"size": "4MiB"})
plugins.check_volume("ext4", want)
receipt = plugins.driver(VOLUME, "ext4").ensure(want)
(Path(receipt.data["path"]) / "file").write_text("content")
found = [each.id for each in plugins.driver(VOLUME, "ext4").observe()]
mounted = Path(receipt.data["path"]).is_mount()
plugins.driver(VOLUME, "ext4").remove(receipt)
print(json.dumps([state.distribution, state.version, state.state, state.drivers, found, mounted]))
"""

STATE = """
[containers.web]
image = "busybox:1"
command = ["sh", "-c", "echo content > /data/file; exec sleep 1000"]
stop_grace_period = "0s"
networks = ["none"]
volumes = ["data:/data"]

[volumes.data]
driver = "ext4"
driver_opts = { size = "4MiB" }
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Python that has the plugin installed; the tests' own stays as it is."""
    yield install("plugin", tmp_path_factory.mktemp("plugin"))


def test_the_installed_plugin_offers_its_driver_and_holds_a_volume(installed: dict[str, str], site: Host) -> None:
    arguments = [sys.executable, "-c", USE, site.name, str(site.root), str(site.run_root)]
    said = subprocess.run(arguments, env=installed, check=True, capture_output=True, text=True).stdout
    assert json.loads(said) == ["holdfast-ext4", "1.0.0", "ok", ["volume ext4"], ["shop/data"], True]


def test_a_state_file_asks_for_a_volume_of_the_plugin(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    monkeypatch.setenv("PYTHONPATH", installed["PYTHONPATH"])
    agent = new_agent(site)
    agent.through = ("env",)  # the script, as its users start it
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", STATE)
    agent.converge()
    volume = site.root / "volumes-ext4/shop/data/mnt"
    assert volume.is_mount()
    agent.wait(lambda: (volume / "file").exists(), "the container has written")
    assert "ext4" in agent.cli("plugin", "list").stdout
    agent.remove("shop.toml")
    agent.converge()
    assert volume.is_mount(), "a volume outlives its app"
    agent.cli("volume", "prune", "--force")
    assert not volume.exists()


def test_what_a_plugin_made_stays_when_the_plugin_is_gone_and_goes_when_it_is_back(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    monkeypatch.setenv("PYTHONPATH", installed["PYTHONPATH"])
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", STATE)
    agent.converge()
    pid = agent.pid("shop/web")
    monkeypatch.delenv("PYTHONPATH")
    agent.restart()
    agent.sync()
    assert agent.pid("shop/web") == pid
    assert "ext4" in agent.cli("volume", "list").stdout
    agent.remove("shop.toml")
    agent.converge()
    refused = agent.cli("volume", "remove", "shop/data", check=False)
    assert "volume driver 'ext4': no plugin offers it" in refused.stderr
    monkeypatch.setenv("PYTHONPATH", installed["PYTHONPATH"])
    agent.restart()
    agent.cli("volume", "remove", "shop/data")
    assert not (site.root / "volumes-ext4").exists()


def test_the_plugins_own_conformance_tests_pass(installed: dict[str, str], site: Host) -> None:
    run_tests("plugin", installed, site.root / "own")
