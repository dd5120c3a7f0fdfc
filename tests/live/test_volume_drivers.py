"""What the core asks of a volume driver: when it is called again, what it is held to, what its failure looks like."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.drivers import Host
from live.agent import LiveAgent

pytestmark = pytest.mark.live

DRIVER = """
import json
from pathlib import Path
from holdfast.drivers import remove_tree
from holdfast.errors import WrongState
from holdfast.hookspecs import hookimpl
from holdfast.observed import Receipt


class Sized:
    '''Keeps its size in a file; `removal` beside the agent's folder says how remove goes wrong.'''

    name = "sized"

    def __init__(self, host):
        self.root = host.root / "volumes-sized"

    def _receipt(self, id):
        folder = self.root / id.replace("/", "@")
        data = {"path": str(folder / "data"), "size": (folder / "size").read_text()}
        return Receipt("volume", "sized", id, data=data)

    def check(self, want):
        if want.driver_opts.get("size") == "small":
            raise WrongState(f"volume {want.id!r}: driver_opts.size: can't shrink in place")

    def ensure(self, want):
        folder = self.root / want.id.replace("/", "@")
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "size").write_text(want.driver_opts.get("size", ""))
        with (self.root / "calls").open("a") as calls:
            calls.write(want.driver_opts.get("size", "") + chr(10))
        return self._receipt(want.id)

    def observe(self):
        for path in self.root.glob("*@*"):
            yield self._receipt(path.name.replace("@", "/"))

    def remove(self, receipt):
        removal = self.root / "removal"
        match removal.read_text() if removal.exists() else "":
            case "raise": raise ValueError("the array is offline")
            case "nothing": return
        folder = self.root / receipt.id.replace("/", "@")
        if folder.exists():
            remove_tree(folder)


@hookimpl
def register_volume_drivers(register, host):
    register(Sized(host))
"""
STATE = """
[containers.web]
image = "busybox:1"
command = ["sleep", "10000"]
stop_grace_period = "0s"
networks = ["none"]
volumes = ["data:/data"]
[volumes.data]
driver = "sized"
driver_opts = {{ size = "{size}" }}
"""


@pytest.fixture
def sized(
    new_agent: Callable[[Host], LiveAgent], site: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LiveAgent:
    """An agent that has the driver `sized`, and runs a container on a volume of it."""
    info = tmp_path / "site/holdfast_sized-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site/sized_plugin.py").write_text(DRIVER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: holdfast-sized\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[holdfast]\nsized = sized_plugin\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", STATE.format(size="8MiB"))
    agent.converge()
    return agent


def calls(agent: LiveAgent) -> list[str]:
    return (agent.host.root / "volumes-sized/calls").read_text().split()


def test_changed_options_and_drift_reach_the_driver_and_nothing_restarts(sized: LiveAgent) -> None:
    pid = sized.pid("shop/web")
    assert calls(sized) == ["8MiB"]
    sized.write("shop.toml", STATE.format(size="16MiB"))
    sized.converge()
    assert calls(sized) == ["8MiB", "16MiB"]
    size = sized.host.root / "volumes-sized/shop@data/size"
    size.write_text("4MiB")
    sized.converge()
    assert size.read_text() == "16MiB"
    assert "its size is 4MiB, and was 16MiB when it was made" in sized.cli("events").stdout
    sized.restart()
    sized.converge()
    assert calls(sized) == ["8MiB", "16MiB", "16MiB"]
    sized.write("shop.toml", STATE.format(size="small"))
    sized.sync()
    sized.wait(lambda: "can't shrink in place" in sized.cli("status").stdout, "staging says so")
    assert calls(sized) == ["8MiB", "16MiB", "16MiB"]
    assert sized.pid("shop/web") == pid


def test_a_removal_says_what_came_of_it(sized: LiveAgent) -> None:
    def remove(*options: str) -> str:
        return sized.cli("volume", "remove", *options, "shop/data", check=False).stderr

    removal = sized.host.root / "volumes-sized/removal"
    assert "mounted by shop/web (expected: holdfast stop shop/web)" in remove("--force")
    sized.cli("stop", "shop/web")
    assert "mounted by shop/web, stopped (--force deletes the data anyway)" in remove()
    removal.write_text("raise")
    assert remove("--force") == (
        "holdfast: remove volume 'shop/data': volume driver 'sized': ValueError: the array is offline\n"
    )
    removal.write_text("nothing")
    assert "volume driver 'sized' removed nothing: it still shows the volume" in remove("--force")
    assert [each["id"] for each in json.loads(sized.cli("volume", "list", "--json").stdout)] == ["shop/data"]
    removal.unlink()
    assert sized.cli("volume", "remove", "--force", "shop/data").stdout == "removed shop/data\n"
    assert json.loads(sized.cli("volume", "list", "--json").stdout) == []
    sized.cli("start", "shop/web")
    sized.wait(lambda: bool(sized.instances("shop/web")[0]["pid"]), "it runs again")
    assert calls(sized) == ["8MiB", "8MiB"]
    assert sized.exec("shop/web", "ls", "/data") == ""
