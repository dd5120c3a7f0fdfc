"""What a look costs, in files read and objects made anew: the same among ten containers and among many."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.config import Config
from holdfast.daemon.compose import node_of
from holdfast.drivers import Host
from holdfast.node import Node
from holdfast.observed import Exit, Instance, InstanceId, Observed
from holdfast.spec.model import Container

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]

ENDED = Instance(
    id=InstanceId("c"),
    app="shop",
    container="c",
    generation=1,
    want=Container(image="a"),
    image="sha",
    phase="exited",
)
ASKED = re.compile(r".*/firewall\.json")  # what the driver of firewalls reads in every look
opened: list[str] | None = None  # while somebody counts


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None:
        opened.append(str(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture
def node(site: Host) -> Iterator[Node]:
    """A node that nothing runs on."""
    site.root.mkdir(parents=True, exist_ok=True)
    config = Config.model_validate({"name": site.name, "root": site.root, "run_root": site.run_root})
    with node_of(config) as made:
        yield made
        for id in list(made.context.store.instances):
            made.context.store.drop_instance(id)
        made.context.leave()


def look(node: Node, *, light: bool = True) -> tuple[Observed, list[str]]:
    """A look, and the files that were opened for it."""
    global opened
    opened = []
    try:
        return node.look(deep=False, light=light, spec=None), opened
    finally:
        opened = None


@pytest.mark.parametrize("count", [10, 300])
def test_a_look_after_our_own_work_reads_records_and_asks_no_driver(node: Node, count: int) -> None:
    store = node.context.store
    for number in range(count):
        store.put_instance(replace(ENDED, id=InstanceId(f"c{number}"), container=f"c{number}"))
    node.context.mark_boot()
    whole, files = look(node, light=False)
    assert any(map(ASKED.match, files))
    changed = store.change_instance(InstanceId("c3"), exit=Exit(1))
    again, files = look(node)
    assert not [file for file in files if not file.startswith((str(node.context.host.run_root), "/proc/sys/"))]
    assert again.instances[3] is changed
    assert all(one is other for one, other in zip(whole.instances, again.instances, strict=True) if one.id != "c3")


def test_after_something_went_wrong_the_whole_host_is_looked_at(node: Node) -> None:
    node.context.mark_boot()
    look(node, light=False)
    assert not any(map(ASKED.match, look(node)[1]))
    node._noticed("firewall", "")
    assert any(map(ASKED.match, look(node)[1]))
    assert not any(map(ASKED.match, look(node)[1]))
    Path(node.context.host.run_root / "boot").unlink()  # as a reboot does
    assert any(map(ASKED.match, look(node)[1]))
