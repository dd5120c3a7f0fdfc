"""The agent is killed at every boundary of every kind of action, and the next one finishes or undoes what was begun.

After each kill: what ran before runs on untouched, another agent converges, the host has exactly what is wanted, each
thing once, and the volume has its data. A bystander app runs through all of it.
"""

from __future__ import annotations

import random
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

from footprint import cgroups, tables
from ground import Rootfs, patient, wait_for
from holdfast.drivers import Host
from holdfast.observed import Hold
from holdfast.store import Store
from live.agent import LiveAgent
from live.boundaries import PASS
from live.census import await_census, expected_census, stored_instances, take_census
from live.crashing_agent import Boundary, CrashingAgent, Run
from live.processes import kill

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]  # some twenty agents a test, on a machine that may be busy

CALM = """
[containers.calm]
image = "busybox:1"
command = ["sh", "-c", "trap 'exit 0' TERM; sleep 10000 & wait"]
"""
SHOP = """
[containers.api]
image = "busybox:1"
command = ["sh", "-c", "trap 'exit 0' TERM; sleep 10000 & wait"]
networks = ["front"]

[containers.web]
image = "busybox:1"
command = ["sh", "-c", '''
trap 'exit 0' TERM
trap 'echo hup >> /data/hups' HUP
echo up >> /data/log
httpd -p 80 -h /data
while :; do sleep 10000 & wait $!; done
''']
environment = {{ LOOK = "{look}" }}
networks = ["front"]
ports = ["127.0.0.1:{port}:80"]
depends_on = {{ api = "started" }}
restart_policy = {{ policy = "on-failure", delay = "1ms", factor = 1.0 }}

[containers.web.resources]
memory = "{memory}MiB"

[[containers.web.volumes]]
type = "volume"
source = "data"
target = "/data"

[[containers.web.volumes]]
type = "volume"
source = "scratch"
target = "/scratch"

[[containers.web.volumes]]
type = "file"
source = "./web.conf"
target = "/etc/web.conf"
on_change = "SIGHUP"

[networks.front]

[volumes.data]

[volumes.scratch]
on_remove = "delete"
"""


class World:
    """An agent's host with the bystander running, and the app `shop` there or not."""

    def __init__(self, agent: LiveAgent, port: int) -> None:
        self.agent, self.host, self.port = agent, agent.host, port
        self.crashing = CrashingAgent(agent.config)
        self.turn = self.look = 0
        agent.image("busybox:1")
        agent.write("calm.toml", CALM)
        self.settle()
        self.calm = self.runs()["calm/calm"]

    @property
    def memory(self) -> int:
        """The memory limit that is asked for, in MiB."""
        return 64 + self.turn

    def put_shop(self) -> None:
        """Ask for the shop as it is to look in this turn."""
        self.agent.write("web.conf", f"turn {self.turn}")
        self.agent.write("shop.toml", SHOP.format(look=self.look, port=self.port, memory=self.memory))

    def remove_shop(self) -> None:
        self.agent.remove("shop.toml")

    def settle(self, kill: Boundary | None = None) -> Run:
        """Let an agent converge, or be killed on the way."""
        run = self.crashing.run(kill)
        assert run.killed or run.status["converged"], run.status
        return run

    def runs(self) -> dict[str, tuple[int, float]]:
        """Container → the pid and the start of what runs, as the store has it, if it is really there."""
        store = Store(self.host.root / "state.db")
        try:
            found: dict[str, tuple[int, float]] = {}
            for id, instance in store.instances.items():
                receipt = store.receipt("run", id)
                if instance.phase == "running" and receipt and Path(f"/proc/{receipt.data['run']['pid']}").exists():
                    found[instance.key] = (int(receipt.data["run"]["pid"]), instance.started_at or 0.0)
            return found
        finally:
            store.close()

    def pid(self, container: str) -> int:
        return self.runs()[container][0]

    @property
    def data(self) -> Path:
        return self.host.root / "volumes/shop/data/_data"

    def check(self, *, shop: bool) -> None:
        """Everything that is wanted is there once, and nothing else; the bystander was never touched."""
        instances = stored_instances(self.host)
        wanted = ["calm/calm", "shop/api", "shop/web"] if shop else ["calm/calm"]
        assert sorted(each.key for each in instances.values()) == wanted
        assert {each.phase for each in instances.values()} == {"running"}
        expected = expected_census(instances, networks=len({n for i in instances.values() for n in i.want.networks}))
        assert await_census(self.host, expected) == expected
        assert self.runs()["calm/calm"] == self.calm
        self._check_memory(shop=shop)
        if shop:
            self._check_service()

    def _check_memory(self, *, shop: bool) -> None:
        store = Store(self.host.root / "state.db")
        try:
            assert store.intents() == {}
            assert store.history().failures == {}
            owners = {
                receipt.owner for id in ("rootfs", "netns", "run", "endpoint") for receipt in store.receipts(id)
            }
            assert owners == set(store.instances)
            assert {each.id for each in store.receipts("network")} == {
                "calm/default",
                *(["shop/front"] if shop else []),
            }
            assert bool(store.receipt("volume", "shop/scratch")) == shop
            assert sorted(store.history().generations) == ["calm", *(["shop"] if shop else [])]
        finally:
            store.close()
        assert (self.host.root / "volumes/shop/scratch/_data").is_dir() == shop

    def _check_service(self) -> None:
        """What was written into the volume is served through the published port, from what is configured now."""
        assert b"kept" in fetch(self.port, "/kept")
        pid = self.pid("shop/web")
        assert Path(f"/proc/{pid}/root/etc/web.conf").read_text() == f"turn {self.turn}"
        assert f"LOOK={self.look}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        assert memory_limit(self.host, pid) == self.memory << 20

    def close(self) -> None:
        """Ask for nothing, and find the host as it was."""
        for path in self.agent.state.glob("*.toml"):
            path.unlink()
        self.settle()


def fetch(port: int, path: str) -> bytes:
    """GET from a server that may not listen yet."""

    def answer() -> bytes:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b""))
        return b""

    return wait_for(answer, f"somebody answers on port {port}")


def memory_limit(host: Host, pid: int) -> int:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return int(Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes").read_text())
        if number == "0" and Path(f"/sys/fs/cgroup{path}/memory.max").exists():
            return int(Path(f"/sys/fs/cgroup{path}/memory.max").read_text())
    raise AssertionError(f"process {pid} of {host.name} has no memory cgroup")


@pytest.fixture
def world(
    new_agent: Callable[[Host], LiveAgent], site: Host, free_port: Callable[[], int], busybox_rootfs: Rootfs
) -> Iterator[World]:
    made = World(new_agent(site), free_port())
    yield made
    made.close()


# -- what is done to the world, and back -----------------------------------------------------------------------


def _appears(world: World) -> None:
    world.put_shop()
    world.data.mkdir(parents=True, exist_ok=True)
    (world.data / "kept").write_text("kept\n")


def _goes(world: World) -> None:
    world.remove_shop()


def _dies(world: World) -> None:
    kill(world.pid("shop/web"))


def _is_resized(world: World) -> None:
    world.turn += 1
    world.put_shop()


def _is_replaced(world: World) -> None:
    world.look += 1
    world.put_shop()


def _loses_its_root(world: World) -> None:
    (id,) = (id for id, each in stored_instances(world.host).items() if each.key == "shop/web")
    subprocess.run(["umount", "--lazy", str(world.host.instance(id) / "rootfs")], check=True)


def _is_haunted(world: World) -> None:
    """What an agent might have left that lost its memory: each thing that carries its root's id, with no receipt."""
    host, ghost = world.host, f"{world.host.id}-feedface"
    subprocess.run(["ip", "netns", "add", host.netns(ghost).name], check=True)
    mounted, layer = host.instance(ghost) / "rootfs", host.root / "instances" / ghost
    for folder in (mounted, layer / "upper", layer / "work", host.run_root / "runs" / ghost, host.files(ghost)):
        folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", host.name, str(host.files(ghost))], check=True)
    options = f"lowerdir={world.agent.rootfs.path},upperdir={layer}/upper,workdir={layer}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, host.name, str(mounted)], check=True)
    (cgroups(host)[0] / f"{host.id}-beefbeef").mkdir()
    bridge, port = host.link("bridge", "ghost/net"), host.link("endpoint", f"{ghost}/ghost/net")
    ip = "ip", "link"
    subprocess.run([*ip, "add", bridge, "type", "bridge"], check=True)
    subprocess.run([*ip, "set", bridge, "alias", f"holdfast:{host.id}:network:ghost/net"], check=True)
    peer = ("peer", "name", "eth0", "netns", host.netns(ghost).name)
    subprocess.run([*ip, "add", port, "type", "veth", *peer], check=True)
    subprocess.run([*ip, "set", port, "alias", f"holdfast:endpoint:{ghost}/ghost/net", "master", bridge], check=True)


@dataclass(frozen=True)
class Story:
    """A change that the agent is killed over: whether the shop is there before and after it, and which actions.

    back: the story that begins where this one ends, and ends where it begins. parts: how many tests share its
    boundaries.
    """

    change: Callable[[World], None]
    before: bool
    after: bool
    actions: tuple[str, ...]
    back: Story | None = None
    parts: int = 1


GOES = Story(
    _goes,
    True,
    False,
    (
        "StopInstance shop/web",
        "RemoveInstance shop/web",
        "RemoveNetwork network shop/front",
        "RemoveVolume volume shop/scratch",
        "ForgetApp shop",
        "WriteFirewall firewall",
    ),
)
STORIES: Mapping[str, Story] = {
    "an app that comes and goes": Story(
        _appears,
        False,
        True,
        (
            "StageGeneration shop",
            "EnsureNetwork network shop/front",
            "StartInstance shop/web",
            "WriteFirewall firewall",
            "WriteNames names",
            "MarkGood shop",
        ),
        back=GOES,
        parts=8,
    ),
    "a restart": Story(_dies, True, True, ("StartInstance shop/web", PASS), parts=2),
    "an update while it runs": Story(_is_resized, True, True, ("UpdateInstance shop/web",)),
    "a replacement": Story(_is_replaced, True, True, ("StopInstance shop/web", "RemoveInstance shop/web"), parts=2),
    "a stop that is to be followed by a start": Story(_loses_its_root, True, True, ("StopInstance shop/web",)),
    "things that belong to nothing": Story(
        _is_haunted,
        False,
        False,
        (
            "RemoveOrphan netns ROOT-feedface",
            "RemoveOrphan rootfs ROOT-feedface",
            "RemoveOrphan run ROOT-feedface",
            "RemoveOrphan run ROOT-beefbeef",
            "RemoveOrphan network ghost/net",
            "RemoveOrphan endpoint ROOT-feedface/ghost/net",
        ),
        parts=2,
    ),
}


def _prepare(world: World, story: Story) -> None:
    """Bring the shop to where the story begins."""
    there = (world.agent.state / "shop.toml").exists()
    if there != story.before:
        if story.before:
            _appears(world)
        else:
            world.remove_shop()
        world.settle()


def _recorded(world: World, story: Story) -> list[Boundary]:
    """Let the story go well once, and list the boundaries that its actions came past."""
    _prepare(world, story)
    if story.change is _dies:  # the first restart alone settles a volume that the image had no content for
        _dies(world)
        world.settle()
    story.change(world)
    run = world.settle()
    world.check(shop=story.after)
    actions = {action.replace("ROOT", world.host.id) for action in story.actions}
    assert {each.action for each in run.boundaries} >= actions
    return [each for each in run.boundaries if each.action in actions]


@pytest.mark.parametrize(
    ("title", "part"), [(title, part) for title, story in STORIES.items() for part in range(story.parts)]
)
def test_every_boundary_of_an_action_survives_a_kill(world: World, title: str, part: int) -> None:
    story = STORIES[title]
    turns = [story, story.back] if story.back else [story]
    recorded = [_recorded(world, turn)[part :: story.parts] for turn in turns]
    failures = []
    for boundaries in zip_longest(*recorded):
        for turn, boundary in zip(turns, boundaries, strict=True):
            try:
                if boundary:
                    _survive(world, turn, boundary)
            except AssertionError as failure:
                failures.append(f"{boundary}\n{failure}")
                _start_over(world)
    assert not failures, f"{len(failures)} kills did harm:\n\n" + "\n\n".join(failures)


def _survive(world: World, story: Story, boundary: Boundary) -> None:
    """Have the agent killed at a boundary of a story, and the next one finish it."""
    _prepare(world, story)
    before = world.runs()
    restarts = _restarts(world)
    story.change(world)
    killed = world.settle(kill=boundary)
    assert killed.killed or boundary.action == PASS, "the boundary was not reached"
    assert world.runs()["calm/calm"] == before["calm/calm"]
    world.settle()
    world.check(shop=story.after)
    if story.change is _dies:
        assert _restarts(world) == restarts + 1


def test_kills_at_any_moment_while_the_state_changes_do_no_harm(world: World) -> None:
    moments, changes, over = random.Random(11), random.Random(12), threading.Event()

    def edit() -> None:
        while not over.wait(changes.uniform(0.0, 0.3)):
            if changes.random() < 0.3:
                (world.agent.state / "shop.toml").unlink(missing_ok=True)
            else:
                world.turn, world.look = changes.randrange(9), changes.randrange(3)
                world.put_shop()

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        deadline, kills = time.monotonic() + patient(12), 0
        while time.monotonic() < deadline:
            kills += world.crashing.run(kill_after=moments.uniform(0.01, 0.5)).killed
            assert world.runs()["calm/calm"] == world.calm
    finally:
        over.set()
        editor.join()
    assert kills > 10
    _appears(world)
    world.settle()
    world.check(shop=True)


def test_a_start_that_was_cut_short_leaves_nothing_running_when_it_is_held_by_then(world: World) -> None:
    """The program runs, the record says that it ended, and a person's stop is the last thing that was written."""
    _appears(world)
    world.settle()
    _dies(world)
    started = Boundary("StartInstance shop/web", _number_of(world, "runtime.start"), "runtime.start")
    assert world.settle(kill=started).killed
    store = Store(world.host.root / "state.db")
    store.hold("shop/web", Hold("stopped", time.time()))
    store.close()
    world.crashing.run()
    assert sorted(world.runs()) == ["calm/calm", "shop/api"]
    running = Counter(id for id, each in stored_instances(world.host).items() if each.phase == "running")
    wait_for(lambda: take_census(world.host).programs == running, "nothing else runs", state=lambda: running)


def test_a_file_that_was_being_rewritten_is_brought_back_when_the_commit_is_reverted(world: World) -> None:
    """Old and new content are told apart by the record, which a crash leaves behind what was done."""
    _appears(world)
    world.settle()
    refreshes = _boundaries_of_an_update(world, "mount file.refresh")
    world.turn += 1
    world.put_shop()
    assert world.settle(kill=refreshes[0]).killed
    world.turn -= 1
    world.put_shop()
    world.settle()
    world.check(shop=True)


def test_a_volume_that_was_being_deleted_is_deleted_to_the_end(world: World) -> None:
    _appears(world)
    world.settle()
    world.remove_shop()
    assert world.settle(kill=Boundary("RemoveVolume volume shop/scratch", 1, "store.put_intent")).killed
    volume = world.data.parents[1] / "scratch"
    doomed = volume.rename(volume.with_name(".removed-scratch"))  # as far as its driver may have come
    world.settle()
    world.check(shop=False)
    assert not doomed.exists()


def _boundaries_of_an_update(world: World, what: str) -> list[Boundary]:
    world.turn += 1
    world.put_shop()
    run = world.settle()
    return [each for each in run.boundaries if each.action == "UpdateInstance shop/web" and each.what == what]


def _number_of(world: World, what: str) -> int:
    """Which boundary of a restart of the shop's web a call is."""
    run = world.settle()
    found = [each.number for each in run.boundaries if each.action == "StartInstance shop/web" and each.what == what]
    _dies(world)
    return found[-1]


def test_a_table_that_nobody_wrote_goes(world: World) -> None:
    world.agent.remove("calm.toml")
    world.settle()
    table = f'table inet {world.host.name} {{\n comment "holdfast:{world.host.id}"\n}}'
    subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
    world.settle()
    assert tables(world.host) == []
    store = Store(world.host.root / "state.db")
    try:
        assert "removed" in [each["kind"] for each in store.events() if each["subject"] == "firewall"]
    finally:
        store.close()


def _restarts(world: World) -> int:
    return sum(each.restarts for each in stored_instances(world.host).values() if each.key == "shop/web")


def _start_over(world: World) -> None:
    """After a failure, so that the next boundary is judged by itself."""
    (world.agent.state / "shop.toml").unlink(missing_ok=True)
    world.crashing.run()


def test_what_was_being_removed_never_runs_again(agent: LiveAgent) -> None:
    many = 10_000
    fill = f"mkdir /many; seq {many} | (cd /many && xargs touch); touch /all"
    state = f"""
[containers.c]
image = "busybox:1"
command = ["sh", "-c", "[ -e /all ] || {{ {fill}; }}; exec sleep 10000"]
stop_grace_period = "0s"
networks = ["none"]
"""
    for _ in range(20):  # until a kill comes while the files are being deleted, which takes a tenth of a second
        agent.write("app.toml", state)
        agent.converge()
        (before,) = agent.instances("app/c")
        folder = agent.host.root / "instances" / before["id"] / "upper"
        agent.wait((folder / "all").exists, "it has written its files")
        agent.remove("app.toml")
        while (folder / "all").exists():
            pass
        agent.kill()
        if folder.parent.exists():
            break
        agent.start()
    else:
        pytest.fail("each kill came too late")
    agent.write("app.toml", state)
    agent.start()
    agent.converge()
    (after,) = agent.instances("app/c")
    assert after["id"] != before["id"]
    assert not folder.parent.exists()
