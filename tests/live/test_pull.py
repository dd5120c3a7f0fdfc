"""Pulling and pushing with real registries: what is fetched, how often, and what a broken pull leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from ground import Rootfs, wait_for
from holdfast.errors import HoldfastError, Stopping, TryAgain, UnfitHost, WrongCall, WrongState
from holdfast.images.incoming.pull import Puller
from holdfast.images.incoming.transfers import Transfers
from holdfast.images.kept.store import ImageStore
from holdfast.images.outgoing.write import push
from layouts import Layout, make_layout
from live.agent import LiveAgent
from live.conftest import QUICK
from live.faulty import Answer, FaultyRegistry
from live.processes import command_line, descendants
from live.registry import Registry

pytestmark = pytest.mark.live

ONE, TWO, THREE = ({f"etc/{name}": os.urandom(40_000)} for name in ("one", "two", "three"))


def layers_of(layout: Path, tag: str = "latest") -> list[str]:
    """The digests of an image's layers as the registry has them."""
    there = Layout(layout)
    return [layer["digest"] for layer in there.json(there.find(tag)["digest"])["layers"]]


@pytest.fixture
def drip(tmp_path: Path) -> Iterator[FaultyRegistry]:
    """Serves an image of three layers as `app`, so slowly that pulls overlap."""
    make_layout(tmp_path / "layout", [ONE, TWO, THREE])
    registry = FaultyRegistry(tmp_path / "layout")
    for digest in layers_of(tmp_path / "layout"):
        registry.answer(digest, Answer(body=Layout(tmp_path / "layout").read(digest), drip=2000))
    yield registry
    registry.close()


@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
def test_a_pull_brings_the_image_under_its_name(
    compression: str, registry: Registry, puller: Puller, tmp_path: Path
) -> None:
    digest = make_layout(tmp_path / "layout", [ONE, {"b": b"2"}], compression=compression, config={"User": "web"})
    registry.push(tmp_path / "layout", "shop/web:1")
    ref = f"{registry.address}/shop/web:1"
    image = puller.pull(ref)
    assert (image.digest, image.config["User"]) == (digest, "web")
    assert image.read_file("/b") == b"2"
    assert puller.store.resolve(ref) == puller.store.resolve(f"{registry.address}/shop/web@{digest}") == image
    name = puller.store.names()[ref]
    assert (name.digest, name.top, name.source) == (digest, digest, "registry")


@pytest.mark.parametrize("docker", [False, True])
def test_an_index_gives_this_hosts_image(docker: bool, registry: Registry, puller: Puller, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    others = [layout.image([{"a": name.encode()}], architecture=name, docker=docker) for name in ("s390x", "mips")]
    mine = layout.image([ONE], docker=docker)
    top = layout.tag(layout.index([others[0], mine, others[1]], docker=docker))
    registry.push(layout.path, "multi")
    image = puller.pull(f"{registry.address}/multi")
    assert image.digest == mine["digest"]
    assert puller.store.names()[f"{registry.address}/multi:latest"].top == top
    assert puller.store.resolve(f"{registry.address}/multi@{top}") == image
    assert registry.fetched(layout.json(others[0]["digest"])["layers"][0]["digest"]) == 0


def test_an_index_in_an_index_is_followed(puller: Puller, registry: Registry, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    mine = layout.image([ONE])
    inner = layout.index([layout.image([TWO], architecture="s390x"), mine])
    layout.tag(layout.index([inner]))
    registry.push(layout.path, "nested")
    assert puller.pull(f"{registry.address}/nested").digest == mine["digest"]


def test_a_pinned_image_is_pulled_by_its_digest_and_moves_no_name(
    puller: Puller, registry: Registry, tmp_path: Path
) -> None:
    old = make_layout(tmp_path / "old", [ONE])
    registry.push(tmp_path / "old", "app:1")
    make_layout(tmp_path / "new", [TWO])
    registry.push(tmp_path / "new", "app:1")
    image = puller.pull(f"{registry.address}/app:1@{old}")
    assert image.digest == old
    assert not puller.store.names()


def test_layers_that_are_here_are_not_fetched_again(puller: Puller, registry: Registry, tmp_path: Path) -> None:
    make_layout(tmp_path / "layout", [ONE, TWO], tag="a")
    make_layout(tmp_path / "layout", [ONE, TWO, THREE, ONE], tag="b")
    for tag in ("a", "b"):
        registry.push(tmp_path / "layout", f"app:{tag}", tag=tag)
        puller.pull(f"{registry.address}/app:{tag}")
    assert [registry.fetched(digest) for digest in layers_of(tmp_path / "layout", "b")] == [1, 1, 1, 1]
    before = len(registry.requests("/blobs/"))
    assert len(puller.pull(f"{registry.address}/app:b").layers) == 4
    assert len(registry.requests("/blobs/")) == before


def test_a_tag_that_moved_is_followed(puller: Puller, registry: Registry, tmp_path: Path) -> None:
    ref = f"{registry.address}/app:1"
    for layer in (ONE, TWO):
        digest = make_layout(tmp_path / "layout", [layer])
        registry.push(tmp_path / "layout", "app:1")
        remote = puller.resolve(ref)
        assert remote.digest == remote.top_digest == digest
        assert puller.pull(ref, remote).digest == puller.store.resolve(ref).digest == digest


def test_what_several_want_at_once_is_fetched_once(drip: FaultyRegistry, puller: Puller, tmp_path: Path) -> None:
    make_layout(tmp_path / "layout", [ONE, TWO, {"own": b"1"}], tag="other")
    refs = [f"{drip.address}/app", f"{drip.address}/app:other"] * 3
    with ThreadPoolExecutor(len(refs)) as pool:
        images = list(pool.map(puller.pull, refs))
    assert len({image.digest for image in images}) == 2
    digests = {*layers_of(tmp_path / "layout"), *layers_of(tmp_path / "layout", "other")}
    assert {digest: drip.asked(digest) for digest in digests} == dict.fromkeys(digests, 1)


def test_a_registry_is_asked_for_so_many_layers_at_once_and_no_more(
    drip: FaultyRegistry, new_puller: Callable[..., Puller], tmp_path: Path
) -> None:
    make_layout(tmp_path / "layout", [{"a": os.urandom(9000)}, {"b": os.urandom(9000)}], tag="other")
    for digest in layers_of(tmp_path / "layout", "other"):
        drip.answer(digest, Answer(body=Layout(tmp_path / "layout").read(digest), drip=500))
    puller = new_puller(QUICK.model_copy(update={"concurrent_downloads": 2}))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(puller.pull, [f"{drip.address}/app", f"{drip.address}/app:other"]))
    assert drip.peak == 2
    puller.skopeo.settings, drip.peak = QUICK.model_copy(update={"concurrent_downloads": 1}), 0
    puller.store.remove(f"{drip.address}/app")
    puller.pull(f"{drip.address}/app")
    assert drip.peak == 1


def test_what_comes_is_counted_and_told(
    drip: FaultyRegistry, new_puller: Callable[..., Puller], tmp_path: Path
) -> None:
    told: list[tuple[Any, ...]] = []
    transfers = Transfers()
    puller = new_puller(transfers=transfers, told=lambda *words, **more: told.append((*words, more)))
    ref = f"{drip.address}/app"
    seen: list[Any] = []
    for digest in layers_of(tmp_path / "layout"):
        drip.answer(digest, Answer(body=Layout(tmp_path / "layout").read(digest), drip=400))
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(puller.pull, ref)
        while not wait([pulling], 0.005).done:
            seen += transfers.look()
    sizes = sorted(len(Layout(tmp_path / "layout").read(digest)) for digest in layers_of(tmp_path / "layout"))
    total = sum(sizes)
    assert {each["ref"] for each in seen} == {ref}
    assert {"resolving", "pulling"} <= {each["state"] for each in seen}
    assert any(0 < each["done"] < each["total"] == total for each in seen)
    assert any(0 < layer["done"] < layer["total"] for each in seen for layer in each["layers"])
    assert any(sorted(layer["total"] for layer in each["layers"]) == sizes for each in seen)
    kinds = [kind for kind, *_ in told]
    assert (kinds[0], kinds[-1]) == ("pulling", "pulled") and told[0][1] == ref
    assert told[0][3] == {"bytes": 0, "total": total} and "3 layers" in told[0][2]
    assert told[-1][3]["bytes"] == total and 0 < told[-1][3]["took"] < 20
    assert not transfers.look()


PULLS = """
import sys
from pathlib import Path
from holdfast.config import ImageSettings
from holdfast.images.incoming.pull import Puller
from holdfast.images.kept.store import ImageStore
Puller(ImageStore(Path(sys.argv[1])), ImageSettings(min_free=0)).pull(sys.argv[2])
"""


def test_a_pull_that_is_killed_leaves_no_process_and_repeats_only_unfinished_layers(
    tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    make_layout(tmp_path / "layout", [ONE, TWO])
    first, second = layers_of(tmp_path / "layout")
    body = Layout(tmp_path / "layout").read(second)
    registry = FaultyRegistry(tmp_path / "layout")
    root = tmp_path / "images"
    ref = f"{registry.address}/app"
    try:
        registry.answer(second, Answer(body=body[:20_000], length=len(body), hang=True))
        process = subprocess.Popen([sys.executable, "-c", PULLS, str(root), ref])
        done = root / "layers/sha256"
        wait_for(lambda: registry.asked(second) and any(map(Path.is_dir, done.glob("*"))), "one layer is done")
        started = descendants(process.pid)
        assert started
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(map(command_line, started)), "what it started has ended")  # a zombie has none
        registry.mend()
        puller = new_puller(root=root)
        assert {path.suffix for path in puller.store.partial.iterdir()} <= {".lock"}
        assert len(puller.pull(ref).layers) == 2
        assert (registry.asked(first), registry.asked(second)) == (1, 2)
    finally:
        registry.close()


def test_a_skopeo_that_is_killed_is_replaced(
    drip: FaultyRegistry, new_puller: Callable[..., Puller], tmp_path: Path
) -> None:
    puller, layers = new_puller(QUICK.model_copy(update={"stall_timeout": 60.0})), layers_of(tmp_path / "layout")
    for digest in layers:
        body = Layout(tmp_path / "layout").read(digest)
        drip.answer(digest, Answer(body=body[:1000], length=len(body), hang=True, times=1))
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(puller.pull, f"{drip.address}/app")
        wait_for(lambda: all(map(drip.asked, layers)), "all layers are on their way")
        killed = [pid for pid in descendants(os.getpid()) if b"image-proxy" in command_line(pid)]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert len(pulling.result().layers) == 3
    assert len(killed) == 3


def test_closing_ends_what_is_under_way(
    drip: FaultyRegistry, new_puller: Callable[..., Puller], tmp_path: Path
) -> None:
    drip.answer(layers_of(tmp_path / "layout")[0], Answer(length=40_000, hang=True))
    puller = new_puller(QUICK.model_copy(update={"stall_timeout": 60.0}))
    errors: list[BaseException] = []

    def pull() -> None:
        try:
            puller.pull(f"{drip.address}/app")
        except HoldfastError as error:
            errors.append(error)

    threads = [threading.Thread(target=pull) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: drip.asked(layers_of(tmp_path / "layout")[0]), "the layer is asked for")
    began = time.monotonic()
    puller.close()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 30, "long before it stalls"
    assert [type(error) for error in errors] == [Stopping, Stopping]
    with pytest.raises(TryAgain, match="stopping"):
        puller.pull(f"{drip.address}/app")


def test_a_registry_that_dies_and_comes_back_costs_only_what_was_not_finished(
    registry: Registry, puller: Puller, tmp_path: Path
) -> None:
    make_layout(tmp_path / "layout", [ONE, TWO])
    first, second = layers_of(tmp_path / "layout")
    registry.push(tmp_path / "layout", "app")
    kept = registry.blob(second).read_bytes()
    registry.blob(second).unlink()
    with pytest.raises(HoldfastError, match="404"):
        puller.pull(f"{registry.address}/app")
    registry.stop()
    with pytest.raises(TryAgain, match="connection refused"):
        puller.pull(f"{registry.address}/app")
    registry.blob(second).write_bytes(kept)
    registry.start()
    assert len(puller.pull(f"{registry.address}/app").layers) == 2
    assert registry.fetched(first) == 1


def write_policy(path: Path, **policy: Any) -> Path:
    path.write_text(json.dumps(policy))
    return path


ANYTHING, NOTHING = [{"type": "insecureAcceptAnything"}], [{"type": "reject"}]


def test_a_policy_decides_and_costs_no_second_download(
    registry: Registry, new_puller: Callable[..., Puller], tmp_path: Path
) -> None:
    digest = make_layout(tmp_path / "layout", [ONE, TWO])
    registry.push(tmp_path / "layout", "app")
    ref = f"{registry.address}/app"
    closed = write_policy(tmp_path / "closed.json", default=NOTHING)
    with pytest.raises(
        WrongState, match=r"unning image .* is rejected by policy \(policy.json does not allow it"
    ) as no:
        new_puller(QUICK.model_copy(update={"policy": closed})).pull(ref)
    assert no.value.retry and no.value.wait == 300
    assert sum(registry.fetched(layer) for layer in layers_of(tmp_path / "layout")) == 0
    scoped = write_policy(
        tmp_path / "scoped.json", default=NOTHING, transports={"docker": {registry.address: ANYTHING}}
    )
    assert new_puller(QUICK.model_copy(update={"policy": scoped})).pull(ref).digest == digest
    assert [registry.fetched(layer) for layer in layers_of(tmp_path / "layout")] == [1, 1]
    with pytest.raises(WrongState, match="does not allow it"):
        new_puller(QUICK.model_copy(update={"policy": closed})).pull(ref)  # what is here as well
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UnfitHost, match="policy"):
        new_puller(QUICK.model_copy(update={"policy": broken}), tmp_path / "other").pull(ref)


def test_registries_conf_decides_about_mirrors_and_tls(
    registry: Registry, new_puller: Callable[..., Puller], tmp_path: Path
) -> None:
    digest = make_layout(tmp_path / "layout", [ONE])
    registry.push(tmp_path / "layout", "mirror/app")
    conf = tmp_path / "registries.conf"
    settings = QUICK.model_copy(update={"registries_conf": conf})
    conf.write_text(
        f'[[registry]]\nlocation = "registry.invalid"\n[[registry.mirror]]\n'
        f'location = "{registry.address}/mirror"\ninsecure = true\n'
    )
    puller = new_puller(settings)
    assert puller.pull("registry.invalid/app").digest == digest
    assert "registry.invalid/app:latest" in puller.store.names()
    with pytest.raises(TryAgain, match=r"lookup registry.invalid.* \(its mirrors failed as well\)"):
        puller.pull("registry.invalid/other")
    conf.write_text(f'[[registry]]\nlocation = "{registry.address}"\ninsecure = false\n')
    with pytest.raises(UnfitHost, match="server gave HTTP response to HTTPS client"):
        puller.pull(f"{registry.address}/mirror/app")
    conf.write_text(f'[[registry]]\nlocation = "{registry.address}"\nblocked = true\n')
    with pytest.raises(UnfitHost, match=r"is blocked in"):
        puller.pull(f"{registry.address}/mirror/app")


def test_what_is_pushed_can_be_pulled_and_is_not_sent_twice(
    registry: Registry, new_puller: Callable[..., Puller], tmp_path: Path
) -> None:
    make_layout(tmp_path / "layout", [ONE, TWO], config={"Cmd": ["/one"]})
    registry.push(tmp_path / "layout", "app:1")
    puller = new_puller()
    image = puller.pull(f"{registry.address}/app:1")
    digest = push(puller.store, puller.skopeo, image, f"{registry.address}/copies/app:2", puller.told)
    other = new_puller(root=tmp_path / "other")
    copy = other.pull(f"{registry.address}/copies/app:2")
    assert (copy.digest, copy.config, copy.config_digest) == (digest, image.config, image.config_digest)
    assert [path.name for path in copy.layers] == [path.name for path in image.layers]
    uploads = len(registry.requests("/blobs/uploads/"))
    assert push(puller.store, puller.skopeo, image, f"{registry.address}/copies/app:3", puller.told) == digest
    assert len(registry.requests("/blobs/uploads/")) == uploads
    assert sorted(puller.tags(f"{registry.address}/copies/app")) == ["2", "3"]
    assert {path.suffix for path in puller.store.partial.iterdir()} <= {".lock"}
    with pytest.raises(WrongCall, match="the digest of a push can't be chosen"):
        push(puller.store, puller.skopeo, image, f"{registry.address}/app@{digest}", puller.told)
    registry.stop()
    with pytest.raises(TryAgain, match=r"^push '.*/app:4': .*connection refused"):
        push(puller.store, puller.skopeo, image, f"{registry.address}/app:4", puller.told)


def test_the_store_of_an_older_pull_is_enough_when_the_registry_is_gone(
    registry: Registry, puller: Puller, tmp_path: Path
) -> None:
    make_layout(tmp_path / "layout", [ONE])
    registry.push(tmp_path / "layout", "app")
    image = puller.pull(f"{registry.address}/app")
    registry.stop()
    assert ImageStore(puller.store.root).resolve(f"{registry.address}/app") == image


def test_what_runs_keeps_running_while_its_successors_registry_is_away(
    agent: LiveAgent, registry: Registry, busybox_rootfs: Rootfs, tmp_path: Path
) -> None:
    busybox = busybox_rootfs.tar.read_bytes()
    for tag in ("1", "2"):
        make_layout(tmp_path / "layout", [busybox, {"version": tag.encode()}], tag=tag)
        registry.push(tmp_path / "layout", f"app:{tag}", tag=tag)

    def commit(tag: str) -> None:
        image = f"{registry.address}/app:{tag}"
        run = 'command = "sleep 1000"\nnetworks = ["none"]\nstop_signal = "SIGKILL"\n'
        agent.write("shop.toml", f'[containers.web]\nimage = "{image}"\n{run}')

    commit("1")
    agent.converge()
    pid = agent.pid("shop/web")
    assert agent.exec("shop/web", "cat", "/version") == "1"
    registry.stop()
    commit("2")
    agent.sync()
    line = f"pull '{registry.address}/app:2': connect: connection refused"
    agent.wait_until(lambda status: line in json.dumps(status["apps"]["shop"]))
    assert agent.pid("shop/web") == pid
    assert line in " ".join(agent.cli("status", check=False).stdout.split())
    registry.start()
    agent.wait_until(lambda status: bool(status["converged"]))
    assert agent.exec("shop/web", "cat", "/version") == "2"
    tried = [event for event in agent.events() if line in event["message"]]
    assert 1 <= len(tried) <= 5, "each try is told, and tries back off"
    kinds = [event["kind"] for event in agent.events() if event["subject"].startswith(registry.address)]
    assert kinds == ["pulling", "pulled", "pulling", "pulled"]


def test_an_image_that_is_not_there_is_not_asked_for_again_and_again(
    agent: LiveAgent, registry: Registry, busybox_rootfs: Rootfs, tmp_path: Path
) -> None:
    run = 'command = "sleep 1000"\nnetworks = ["none"]\nstop_signal = "SIGKILL"\n'
    mine = f'[containers.web]\nimage = "{registry.address}/app"\n{run}'
    agent.write("shop.toml", mine)
    agent.wait_until(lambda status: "404: the registry does not have it" in json.dumps(status["apps"].get("shop")))
    agent.write("other.toml", f'[containers.web]\nimage = "busybox:1"\n{run}')
    agent.wait(lambda: any(each["pid"] for each in agent.instances("other/web")), "another app runs")
    assert len(registry.requests("/manifests/")) == 1, "passes come and go, the registry is asked when it is time"
    make_layout(tmp_path / "layout", [busybox_rootfs.tar.read_bytes()])
    registry.push(tmp_path / "layout", "app")
    agent.write("shop.toml", f"{mine}read_only = true\n")  # another commit is another try
    agent.wait_until(lambda status: bool(status["converged"]))


def test_two_containers_of_one_new_image_fetch_each_layer_once(
    agent: LiveAgent, registry: Registry, busybox_rootfs: Rootfs, tmp_path: Path
) -> None:
    make_layout(tmp_path / "layout", [busybox_rootfs.tar.read_bytes(), ONE, TWO])
    registry.push(tmp_path / "layout", "app")
    run = f'image = "{registry.address}/app"\ncommand = "sleep 1000"\nnetworks = ["none"]\nstop_signal = "SIGKILL"\n'
    for name in ("one", "two"):
        agent.write(f"{name}.toml", f"[containers.a]\n{run}[containers.b]\n{run}")
    agent.converge()
    assert [registry.fetched(layer) for layer in layers_of(tmp_path / "layout")] == [0, 1, 1]  # busybox is here
