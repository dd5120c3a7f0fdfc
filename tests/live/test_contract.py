"""What drivers are asked on a real host: what is there already when they check, and which of them makes what."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import tarfile
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from holdfast.drivers import Host
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


PLUGIN = """
import os
import signal
import shutil
from typing import Annotated
from urllib.parse import quote

from pydantic import Field

from holdfast.files import remove_tree
from holdfast.hookspecs import hookimpl
from holdfast.keys import Table
from holdfast.observed import Receipt
from holdfast.tables import read_options

api_version = 2


class Settings(Table):
    motto: Annotated[str, Field(description="what stands in every root file system")]


class Copy:
    name = "copy"

    def __init__(self, host, settings):
        self.host, self.settings, self.root = host, settings, host.root / "copies"

    def check(self, want): ...

    def ensure(self, want):
        place = self.root / want.instance
        if not place.exists():
            made = self.root / f".{want.instance}"
            for layer in want.layers:
                shutil.copytree(layer, made, symlinks=True, dirs_exist_ok=True)
            (made / "motto").write_text(f"{self.settings.motto} {want.app}/{want.container} {want.labels['tier']}")
            made.rename(place)
        return self.receipt(want.instance)

    def observe(self):
        return [self.receipt(each.name) for each in self.root.glob("[!.]*")]

    def remove(self, receipt):
        if (self.root / receipt.id).exists():
            remove_tree(self.root / receipt.id)

    def receipt(self, id):
        return Receipt("rootfs", self.name, id, id, {"path": str(self.root / id)})


class Line(Table):
    text: Annotated[str, Field(description="what it says")]


class Options(Table):
    lines: Annotated[tuple[Line, ...], Field(description="what is in the file")]


class Greeting:
    name = "greeting"
    options = Options

    def __init__(self, host):
        self.host = host

    def check(self, want): ...

    def ensure(self, want):
        folder = self.place(want.instance, want.mount.target)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [line.text for line in read_options(Options, want.mount.driver_opts).lines]
        (folder / "words").write_text(" ".join([want.mount.source, *lines]))
        data = {"type": "bind", "source": str(folder), "options": ["rbind", "ro"]}
        return Receipt("volume", self.name, f"{want.instance}:{want.mount.target}", want.instance, data)

    def observe(self):
        return ()

    def remove(self, receipt):
        instance, _, target = receipt.id.partition(":")
        if self.place(instance, target).exists():
            remove_tree(self.place(instance, target))

    def place(self, instance, target):
        return self.host.files(instance) / quote(target, safe="")


@hookimpl
def register_rootfs_drivers(register, host, settings):
    register(Copy(host, settings))


@hookimpl
def register_mount_drivers(register, host):
    register(Greeting(host))
"""
CHOSEN = 'storage.driver = "copy"\nplugins.doors.motto = "hello"'
WEB = f"""
[containers.web]{SLEEPER}networks = ["none"]
labels = {{ tier = "front" }}
[[containers.web.volumes]]
type = "greeting"
source = "to you"
target = "/greeting"
driver_opts = {{ lines = [{{ text = "a" }}, {{ text = "b" }}] }}
"""


def install(site: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    """Install a plugin where the agents of this test find it."""
    info = site / f"holdfast_{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}_plugin.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: holdfast-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[holdfast]\n{name} = {name}_plugin\n")
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture
def doors(
    new_agent: Callable[[Host], LiveAgent], site: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LiveAgent:
    """An agent with a plugin that offers the root file system driver `copy` and the mount kind `greeting`."""
    install(tmp_path / "site", monkeypatch, "doors", PLUGIN)
    agent = new_agent(site)
    agent.configure(more='plugins.doors.motto = "hello"')
    agent.start()
    agent.image("busybox:1")
    return agent


def root_of(agent: LiveAgent, container: str) -> str:
    """The type of file system that a container has at its root."""
    lines = agent.exec(container, "cat", "/proc/mounts").splitlines()
    return next(line.split()[2] for line in reversed(lines) if line.split()[1] == "/")


def test_agent_toml_chooses_who_makes_root_file_systems_of_new_containers(doors: LiveAgent) -> None:
    doors.write("old.toml", f'[containers.one]{SLEEPER}networks = ["none"]')
    doors.converge()
    old = doors.pid("old/one")
    doors.configure(more=CHOSEN)
    doors.restart()
    doors.write("shop.toml", WEB)
    doors.converge()
    (web,) = doors.instances("shop/web")
    copy = doors.host.root / "copies" / web["id"]
    assert (copy / "motto").read_text() == doors.exec("shop/web", "cat", "/motto") == "hello shop/web front"
    assert root_of(doors, "shop/web") != "overlay"
    assert (doors.pid("old/one"), root_of(doors, "old/one")) == (old, "overlay")
    doors.exec("old/one", "touch", "/written")
    doors.cli("restart", "old/one")
    doors.converge()
    assert (root_of(doors, "old/one"), doors.exec("old/one", "ls", "/written")) == ("overlay", "/written\n")
    doors.exec("shop/web", "touch", "/kept")
    doors.configure(more='plugins.doors.motto = "hello"')
    doors.restart()
    doors.cli("restart", "shop/web")
    doors.converge()
    assert doors.exec("shop/web", "ls", "/kept") == "/kept\n"
    doors.cli("export", "shop/web", "-o", str(doors.home / "root.tar"))
    with tarfile.open(doors.home / "root.tar") as tar:
        names = tar.getnames()
    assert ({"motto", "kept"} <= {*names}, [name for name in names if name.startswith("proc/")]) == (True, [])
    refused = doors.cli("commit", "shop/web", "web:2", check=False).stderr
    assert "rootfs driver 'copy' keeps no writable layer of its own" in refused
    doors.remove("shop.toml")
    doors.converge()
    assert not copy.exists()


def test_a_mount_kind_of_a_plugin_is_mounted_in_a_container_with_its_options(doors: LiveAgent) -> None:
    doors.write("shop.toml", WEB)
    doors.converge()
    assert doors.exec("shop/web", "cat", "/greeting/words") == "to you a b"
    pid = doors.pid("shop/web")
    doors.write("shop.toml", WEB.replace('text = "b"', 'text = "c"'))
    doors.converge()
    assert doors.exec("shop/web", "cat", "/greeting/words") == "to you a c"
    assert doors.pid("shop/web") != pid
    doors.remove("shop.toml")
    doors.converge()  # while the plugin is there


def test_what_agent_toml_says_wrongly_of_plugins_is_refused_before_anything_is_done(doors: LiveAgent) -> None:
    doors.write("shop.toml", WEB.replace("text", "txt", 1))
    checked = doors.cli("check", str(doors.state), check=False)
    assert "driver_opts.lines[0].txt: unknown key" in checked.stdout
    doors.stop()
    doors.configure(more='storage.driver = "copi"\nplugins.doors.moto = "hello"')
    for words in (("apply",), ("check", str(doors.state))):
        done = doors.cli(*words, check=False)
        assert done.returncode != 0
        assert "plugins.doors.moto: unknown key 'moto' (did you mean 'motto'?)" in done.stderr
        assert "storage.driver: no plugin offers the rootfs driver 'copi'" in done.stderr
    doors.configure(more='plugins.doors.motto = "hello"')
    doors.start()
    doors.configure(more='plugins.doors.motto = "hello"\ncgroup.policy = ["limits", "golden"]')
    assert doors.process is not None
    doors.process.send_signal(signal.SIGHUP)
    wrong = "cgroup.policy[1]: no plugin offers the policy driver 'golden'"
    doors.wait(lambda: any(wrong in str(event) for event in doors.events()), "the reload is refused")


VERSIONED = """
from pathlib import Path

from holdfast.files import remove_tree
from holdfast.hookspecs import hookimpl
from holdfast.observed import Receipt

VERSION = int((Path(__file__).parent / "version").read_text())


class Versioned:
    name = "versioned"
    receipt_version = VERSION

    def __init__(self, host):
        self.root = host.root / "volumes-versioned"

    def check(self, want): ...

    def ensure(self, want):
        self.place(want.id).mkdir(parents=True, exist_ok=True)
        return self.receipt(want.id)

    def observe(self):
        return [self.receipt(each.name.replace("@", "/")) for each in self.root.glob("*@*")]

    def remove(self, receipt):
        if self.place(receipt.id).exists():
            remove_tree(self.place(receipt.id))

    def migrate(self, receipt):
        return Receipt("volume", self.name, receipt.id, data={**receipt.data, "form": VERSION})

    def place(self, id):
        return self.root / id.replace("/", "@")

    def receipt(self, id):
        return Receipt("volume", self.name, id, data={"path": str(self.place(id)), "form": VERSION})


@hookimpl
def register_volume_drivers(register, host):
    register(Versioned(host))
"""


def stored(agent: LiveAgent, volume: str) -> dict[str, object]:
    """The receipt of a volume, as the agent has stored it."""
    with contextlib.closing(sqlite3.connect(agent.host.root / "state.db")) as database:
        (value,) = database.execute(
            "SELECT value FROM receipts WHERE kind = 'volume' AND id = ?", (volume,)
        ).fetchone()
        return dict(json.loads(value))


def test_another_version_of_a_driver_takes_over_or_leaves_alone_what_was_made_and_stops_nothing(
    new_agent: Callable[[Host], LiveAgent], site: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", monkeypatch, "versioned", VERSIONED)
    version = tmp_path / "site/version"
    version.write_text("2")
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    web = f'[containers.web]{SLEEPER}networks = ["none"]\nvolumes = ["data:/data"]\n'
    agent.write("shop.toml", f'{web}[volumes.data]\ndriver = "versioned"\n')
    agent.converge()
    pid = agent.pid("shop/web")
    agent.exec("shop/web", "touch", "/data/kept")
    before = stored(agent, "shop/data")
    assert before["version"] == 2
    agent.stop()
    version.write_text("1")
    agent.start()
    status = agent.wait_until(lambda now: any(each["state"] == "refused" for each in now["plugins"]))
    assert "receipts of version 2, and it knows 1" in str(status["plugins"])
    agent.sync()
    assert (agent.pid("shop/web"), stored(agent, "shop/data")) == (pid, before)
    agent.stop()
    version.write_text("3")
    agent.start()
    agent.converge()
    assert agent.pid("shop/web") == pid
    now = stored(agent, "shop/data")
    assert now["version"] == 3
    assert agent.exec("shop/web", "ls", "/data") == "kept\n"
    agent.remove("shop.toml")
    agent.converge()
    agent.cli("volume", "remove", "shop/data")
