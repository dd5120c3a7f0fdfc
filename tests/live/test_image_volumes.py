"""What an image declares as VOLUME outlives its containers, is listed, and goes by the rules of volumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.config import ImageSettings, load_config
from holdfast.daemon.compose import acting_node
from holdfast.images.kept.store import ImageStore
from holdfast.node.start import start_instance
from holdfast.observed import Instance
from holdfast.plan.actions import StartInstance
from holdfast.store import Store
from live.agent import LiveAgent

pytestmark = pytest.mark.live

DB = """
[containers.db]
image = "{image}"
command = ["sleep", "10000"]
environment = {{ LEVEL = "{level}" }}
stop_grace_period = "0s"
networks = ["none"]
"""
BACKUP = """
[containers.backup]
image = "busybox:1"
command = ["sleep", "10000"]
stop_grace_period = "0s"
networks = ["none"]
volumes_from = ["db:ro"]
"""


def with_volume(agent: LiveAgent, name: str, *paths: str) -> None:
    changes = [word for path in paths for word in ("-c", f"VOLUME {path}")]
    agent.cli("image", "import", *changes, str(agent.rootfs.tar), name)


def listed(agent: LiveAgent) -> dict[str, bool]:
    """Volume → whether it is an orphan."""
    return {each["id"]: each["orphan"] for each in json.loads(agent.cli("volume", "list", "--json").stdout)}


def test_a_volume_of_the_image_outlives_the_container_and_goes_when_it_is_pruned(agent: LiveAgent) -> None:
    with_volume(agent, "db:1", "/var/data")
    agent.write("shop.toml", DB.format(image="db:1", level="info") + BACKUP)
    agent.converge()
    agent.exec("shop/db", "sh", "-c", "echo precious > /var/data/file")
    before = agent.pid("shop/db")
    agent.write("shop.toml", DB.format(image="db:1", level="debug") + BACKUP)
    agent.converge()
    assert agent.pid("shop/db") != before
    assert agent.exec("shop/db", "cat", "/var/data/file") == "precious\n"
    assert agent.exec("shop/backup", "cat", "/var/data/file") == "precious\n"
    assert agent.cli("exec", "shop/backup", "touch", "/var/data/mine", check=False).returncode != 0
    assert listed(agent) == {"shop/db.var-data": False}
    refused = agent.cli("volume", "remove", "shop/db.var-data", check=False)
    assert refused.returncode == 73 and "shop/db" in refused.stderr
    agent.remove("shop.toml")
    agent.converge()
    assert listed(agent) == {"shop/db.var-data": True}
    agent.write("shop.toml", DB.format(image="db:1", level="debug"))
    agent.converge()
    assert agent.exec("shop/db", "cat", "/var/data/file") == "precious\n"
    agent.remove("shop.toml")
    agent.converge()
    agent.cli("volume", "prune", "--force")
    assert listed(agent) == {}


def test_a_state_file_may_define_the_volume_that_an_image_declares(agent: LiveAgent) -> None:
    with_volume(agent, "db:1", "/data")
    volume = '[volumes."db.data"]\non_remove = "delete"\n'
    agent.write("shop.toml", DB.format(image="db:1", level="info") + volume)
    agent.converge()
    agent.exec("shop/db", "touch", "/data/file")
    assert (agent.host.root / "volumes/shop/db.data/_data/file").exists()
    agent.remove("shop.toml")
    agent.converge()
    assert listed(agent) == {}


def test_a_new_image_with_another_volume_replaces_who_takes_it_over(agent: LiveAgent) -> None:
    with_volume(agent, "db:1", "/data")
    with_volume(agent, "db:2", "/data", "/log")
    agent.write("shop.toml", DB.format(image="db:1", level="info") + BACKUP)
    agent.converge()
    agent.write("shop.toml", DB.format(image="db:2", level="info") + BACKUP)
    agent.converge()
    agent.exec("shop/db", "touch", "/log/line")
    assert agent.exec("shop/backup", "ls", "/log") == "line\n"
    assert "volumes of the image" in agent.cli("events").stdout


def test_what_an_earlier_version_kept_in_the_writable_layer_is_saved_when_its_container_is_replaced(
    agent: LiveAgent,
) -> None:
    with_volume(agent, "db:1", "/data")
    agent.write("shop.toml", DB.format(image="busybox:1", level="info"))
    agent.converge()
    before = agent.pid("shop/db")
    agent.exec("shop/db", "sh", "-c", "mkdir /data; echo precious > /data/file; chown 7 /data")
    agent.stop()
    digest = ImageStore(agent.host.root / "images", ImageSettings()).resolve("db:1").digest
    store = Store(agent.host.root / "state.db")
    (made,) = store.instances.values()
    as_before: Instance = replace(made, image=digest, image_volumes=None)
    store.put_instance(as_before)
    generation = store.generation("shop", made.generation)
    store.put_generation(replace(generation, images={"db": digest}, image_volumes=None))
    store.close()
    agent.start()
    agent.converge()
    assert agent.pid("shop/db") == before
    agent.write("shop.toml", DB.format(image="db:1", level="debug"))
    agent.converge()
    assert agent.exec("shop/db", "cat", "/data/file") == "precious\n"
    assert agent.exec("shop/db", "stat", "-c", "%u", "/data") == "7\n"


def test_each_of_two_instances_side_by_side_has_a_volume_of_its_own(agent: LiveAgent) -> None:
    with_volume(agent, "db:1", "/data")
    rest = BACKUP + '[volumes."db.data"]\non_remove = "delete"\n'
    agent.write("shop.toml", DB.format(image="db:1", level="info") + rest)
    agent.converge()
    agent.exec("shop/db", "sh", "-c", "echo first > /data/file")
    agent.stop()
    with acting_node(load_config(agent.config)) as node:
        start_instance(node.context, StartInstance(app="shop", container="db", generation=1, reason="a second side"))
        start_instance(
            node.context, StartInstance(app="shop", container="backup", generation=1, reason="a second side")
        )
        pids = {(each.container, each.slot): each.pid for each in node.context.store.instances.values()}

    def files(container: str, slot: int) -> list[str]:
        return [each.name for each in Path(f"/proc/{pids[container, slot]}/root/data").iterdir()]

    assert (files("db", 1), files("db", 2)) == (["file"], [])
    assert (files("backup", 1), files("backup", 2)) == (["file"], ["file"])
    agent.start()
    agent.converge()
    assert listed(agent) == {"shop/db.data": False, "shop/db.data--2": False}
    agent.write("shop.toml", DB.format(image="db:1", level="debug") + rest)
    agent.converge()
    assert agent.exec("shop/db", "cat", "/data/file") == "first\n"  # the first slot is free again
    agent.remove("shop.toml")
    agent.converge()
    assert listed(agent) == {}
