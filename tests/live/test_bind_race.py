"""Whoever can write to the folders above a bind's source can't have anything else mounted while containers start."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from holdfast.drivers import Host
from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]

NAMES = ("one", "two", "three", "made")
CONTAINER = """
[containers.web]
image = "busybox:1"
command = ["sleep", "10000"]
environment = {{ ROUND = "{round}" }}
stop_grace_period = "0s"
networks = ["none"]
[[containers.web.volumes]]
source = "{source}"
target = "/a"
create_host_path = {creates}
"""
EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)


@contextmanager
def swapped(*folders: Path) -> Iterator[None]:
    """Exchange `x` and `link` of each folder all the time, and back, a thread for each: by descriptor, as who is in a
    container would do, so that nothing outside is moved."""
    over, libc = threading.Event(), ctypes.CDLL(None)

    def swap(folder: int) -> None:
        while not over.wait(0.0005):
            libc.renameat2(folder, b"x", folder, b"link", EXCHANGE)
            over.wait(0.0002)
            libc.renameat2(folder, b"x", folder, b"link", EXCHANGE)

    descriptors = [os.open(folder, os.O_PATH) for folder in folders]
    threads = [threading.Thread(target=swap, args=(each,)) for each in descriptors]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread, descriptor in zip(threads, descriptors, strict=True):
            thread.join()
            os.close(descriptor)


def test_containers_that_start_while_folders_are_swapped_for_links_get_the_folder_or_nothing(
    new_agent: Callable[[Host], LiveAgent], site: Host, tmp_path: Path
) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder in (allowed / "x/x", outside / "x"):
        folder.mkdir(parents=True)
        (folder / ("secret" if folder.is_relative_to(outside) else "mine")).write_text("")
    (allowed / "x/link").symlink_to(outside / "x")
    (allowed / "link").symlink_to(outside)
    agent = new_agent(site)
    agent.configure(more=f'policy.bind_roots = ["{allowed}"]')
    agent.start()
    agent.image("busybox:1")
    seen: dict[int, list[str]] = {}

    def look() -> None:
        for name in NAMES:
            for instance in agent.instances(f"{name}/web"):
                with suppress(OSError):  # it has just ended
                    folder = Path(f"/proc/{instance['pid']}/root/a")
                    seen[instance["pid"]] = sorted(each.name for each in folder.iterdir())

    def refused() -> int:
        return sum("outside the bind_roots" in str(event["message"]) for event in agent.events())

    def round_(number: int) -> None:
        for name in NAMES:
            source = allowed / ("x/x/deep" if name == "made" else "x/x")
            creates = "true" if name == "made" else "false"
            agent.write(f"{name}.toml", CONTAINER.format(round=number, source=source, creates=creates))
        agent.sync()
        agent.wait(
            lambda: "changing" not in {each["state"] for each in agent.status()["apps"].values()}, "all is done"
        )
        look()

    with swapped(allowed, allowed / "x"):
        number = 0
        while len(seen) < 8 or refused() < 8:
            number += 1
            assert number < 300, (seen, refused())
            round_(number)
    assert {tuple(found) for found in seen.values()} <= {("mine",), ("deep", "mine"), ()}
    assert sorted(path.name for path in outside.rglob("*")) == ["secret", "x"]
    agent.wait(lambda: not list((site.run_root / "binds").iterdir()), "nothing is held between one try and the next")
