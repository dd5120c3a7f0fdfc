"""Two agents on one host never touch each other's things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from footprint import wait_clean
from holdfast.drivers import Host
from holdfast.errors import Conflict
from holdfast.identity import drop, hold_name
from holdfast.node.claim import refuse_new_name
from holdfast.runtime import cgroup, delegation
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
    assert wait_clean(two.host) == []
    one.converge()
    assert one.pid("shop/web") == pid
    assert one.events()[-1]["seq"] == mark
    assert one.exec("shop/web", "ls", "-d", "/data").strip() == "/data"


def test_a_container_below_the_unit_of_a_former_name_keeps_the_root_from_another_name(
    site: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a host of systemd with cgroup v2: a container on the host's network has no other trace."""
    trees = [place for place in cgroup.hierarchies() if (place / "cgroup.controllers").exists()]
    if not trees:
        pytest.skip("no cgroup v2")
    monkeypatch.setattr(cgroup, "ROOT", trees[0])
    monkeypatch.setattr(delegation, "BOOTED", Path("/"))
    former, slice_ = f"o{site.name[1:]}", trees[0] / "system.slice"
    folders = [slice_, slice_ / delegation.unit_of(former)]
    folders += [folders[-1] / former, folders[-1] / former / "abc"]
    made = [folder for folder in folders if not folder.exists()]
    site.root.mkdir(parents=True, exist_ok=True)
    with hold_name(former, site.root) as held:
        held.bind(site.root, "01234567", site.run_root)
    try:
        for folder in made:
            folder.mkdir()
        with pytest.raises(Conflict, match="cgroup abc"):
            refuse_new_name(replace(site, cgroup_root=delegation.place_of(site.name)))
    finally:
        drop(former)
        for folder in reversed(made):
            folder.rmdir()
