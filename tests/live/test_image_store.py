"""The image store with real processes: kills, skopeo and podman as readers, a registry, running containers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ground import Rootfs, patient, wait_for
from holdfast.images.incoming.load import load_archive
from holdfast.images.kept.store import ImageStore
from holdfast.images.outgoing.write import FORMATS, save
from holdfast.runtime import cgroup
from layouts import Layout, make_layout
from live.agent import HOLDFAST, LiveAgent, Status
from live.faulty import Answer, FaultyRegistry
from live.registry import Registry
from tars import entry, tar_of

pytestmark = pytest.mark.live

LOAD = """
import sys
from holdfast.images.incoming.load import ImageStore, Path, load_archive

load_archive(ImageStore(Path(sys.argv[1])), Path(sys.argv[2]), "x:1")
"""
RUN = 'networks = ["none"]\nstop_signal = "SIGKILL"'
LOOP = "touch /made; rm /etc/passwd; while :; do echo tick >> /log; sleep 0.01; done"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def busybox(busybox_rootfs: Rootfs) -> bytes:
    return busybox_rootfs.tar.read_bytes()


def directories(root: Path) -> set[str]:
    """The directories of layers, or of what is to be one, that hold something."""
    found = set()
    for folder in (root / "partial", root / "layers/sha256"):
        with suppress(FileNotFoundError):  # it comes and goes
            found |= {path.name for path in folder.iterdir() if path.is_dir() and any(path.iterdir())}
    return found


def run(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def swept(store: ImageStore) -> bool:
    """Whether nothing half made is left, after one more sweep."""
    store.layers.sweep()
    return {path.name for path in store.partial.iterdir()} <= {"store.lock", "index.lock"}


def test_a_kill_at_any_moment_leaves_whole_layers_only(tmp_path: Path, layout: Layout) -> None:
    rest = random.Random(3)
    layers = [tar_of(*(entry(f"{name}/{n}", rest.randbytes(9000)) for n in range(200))) for name in "abc"]
    layout.tag(layout.image(layers), "1")
    root = tmp_path / "images"
    seen = set[int]()
    for number in count():
        if number >= 10 and len(seen) > 1:  # the moments were spread
            break
        load = [sys.executable, "-c", LOAD, str(root), str(layout.path)]
        before = directories(root)
        child = subprocess.Popen(load, stderr=subprocess.DEVNULL)
        wait_for(lambda: child.poll() is not None or directories(root) != before, "it unpacks")  # noqa: B023
        with suppress(subprocess.TimeoutExpired):
            child.wait(rest.random() * 0.3 if number % 2 else 0)  # any moment
        child.kill()
        child.wait()
        store = ImageStore(root)
        wait_for(lambda: swept(store), "what was cut short is swept")  # noqa: B023 (a dying worker may hold it for a moment)
        there = store.layers.all()
        seen.add(len(there))
        for diff_id in there:
            files = list(store.layers.folder(diff_id).rglob("*"))
            assert len(files) == store.layers.facts(diff_id).files == 201
            assert sum(path.stat().st_size for path in files if path.is_file()) == 200 * 9000
        for image in store.list(dangling=True):
            assert store.get(image.digest).names in ((), ("x:1",))
        if len(there) == 3:
            store.prune(all=True)
            store.delete_orphans(time.time() + 1)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_saved_is_read_by_skopeo_and_podman(tmp_path: Path, layout: Layout, format: Any) -> None:
    layers = [tar_of(entry("bin/a", b"a", uid=0, gid=0)), tar_of(entry("bin/.wh.a", uid=0, gid=0), entry("b", b"b"))]
    layout.tag(layout.image(layers, config={"Cmd": ["/b"]}), "1")
    store = ImageStore(tmp_path / "images")
    image = load_archive(store, layout.path, "shop/web:1")[0]
    with (tmp_path / "x.tar").open("wb") as out:
        save(store, ["shop/web:1"], out, format)
    source = f"{format}:{tmp_path}/x.tar"
    config = json.loads(run("skopeo", "inspect", "--config", "--raw", source))
    assert config["rootfs"]["diff_ids"] == list(image.diff_ids)
    with tempfile.TemporaryDirectory() as folder:  # podman takes short paths only
        place = ["--root", f"{folder}/root", "--runroot", f"{folder}/run", "--storage-driver", "vfs"]
        run("podman", *place, "load", "-q", "-i", f"{tmp_path}/x.tar")
        (loaded,) = json.loads(run("podman", *place, "images", "--format", "json"))
    assert f"sha256:{loaded['Id']}" == image.config_digest
    assert loaded["Names"] == ["docker.io/shop/web:1"]


def test_images_come_and_go_by_commands_with_an_agent_and_without(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes, tmp_path: Path
) -> None:
    agent.cli("image", "remove", "busybox:1")
    layout.tag(layout.image([busybox, {"version": b"1"}]), "1")
    digest = registry.push(layout.path, "app:1", tag="1")
    ref = f"{registry.address}/app:1"
    copy = f"{registry.address}/copy:1"
    assert agent.cli("image", "pull", "-q", ref).stdout == f"{ref}  {digest}\n"
    agent.cli("image", "tag", ref, copy)
    (found,) = json.loads(agent.cli("image", "inspect", copy).stdout)
    assert (found["Digest"], len(found["RootFS"]["Layers"]), found["UsedBy"]) == (digest, 2, [])
    assert found["RepoDigests"] == [f"{registry.address}/app@{digest}"]
    assert len(agent.cli("image", "history", found["Id"][7:19]).stdout.splitlines()) == 3
    pushed = agent.cli("image", "push", "-q", copy).stdout.split()[1]
    assert json.loads(run("skopeo", "inspect", "--tls-verify=false", f"docker://{copy}"))["Digest"] == pushed
    agent.cli("image", "save", "-o", str(tmp_path / "x.tar"), ref)
    agent.cli("image", "export", "-o", str(tmp_path / "root.tar"), ref)
    with tarfile.open(tmp_path / "root.tar") as tar:
        assert {"bin/busybox", "version"} <= set(tar.getnames())
    agent.cli("image", "remove", ref, copy)
    assert agent.cli("image", "load", str(tmp_path / "x.tar")).stdout.startswith(ref)
    first = agent.cli("image", "prune", "--all", "--force").stdout.splitlines()[0]
    assert first.startswith("removed sha256:") and first.endswith(f"  {ref}")
    gone = agent.cli("image", "pull", f"{registry.address}/app:9", check=False)
    assert gone.returncode == 64 and "app:9" in gone.stderr and len(gone.stderr.splitlines()) == 1
    agent.stop()
    assert agent.cli("image", "pull", copy).stdout == f"{copy}  {pushed}\n"
    (agent.host.root / "logs/gone").mkdir(parents=True)
    (agent.host.root / "logs/gone/web.log").write_bytes(bytes(100_000))
    kinds = {each["kind"]: each for each in json.loads(agent.cli("system", "df", "--json").stdout)["kinds"]}
    assert (kinds["layers"]["count"], kinds["images"]["reclaimable"]) == (2, found["Size"])
    assert kinds["logs"]["reclaimable"] >= 100_000
    freed = json.loads(agent.cli("system", "prune", "--all", "--force", "--json").stdout)
    assert (len(freed["images"]), freed["kinds"]["images"]) == (1, found["Size"])
    assert freed["freed"] >= found["Size"] + 100_000
    assert not list((agent.host.root / "logs").glob("gone*"))
    assert not list((agent.host.root / "images/layers/sha256").iterdir())


def test_who_stops_watching_a_pull_leaves_it_to_the_agent_and_prune_takes_what_it_leaves(
    agent: LiveAgent, tmp_path: Path
) -> None:
    make_layout(tmp_path / "layout", [{"one": os.urandom(20_000)}, {"two": os.urandom(900_000)}])
    registry = FaultyRegistry(tmp_path / "layout")
    there = Layout(tmp_path / "layout")
    digest = there.json(there.find("latest")["digest"])["layers"][1]["digest"]
    slow = there.read(digest)
    registry.answer(digest, Answer(body=slow[:500_000], length=len(slow), hang=True))
    ref = f"{registry.address}/app"
    pull = ["env", "--default-signal=INT", HOLDFAST, "image", "pull", ref]
    with ExitStack() as stack:
        stack.callback(registry.close)
        one, two = (
            stack.enter_context(
                subprocess.Popen(
                    pull, env={**os.environ, "HOLDFAST_CONFIG": str(agent.config)}, stderr=subprocess.PIPE, text=True
                )
            )
            for _ in range(2)
        )
        agent.wait_until(lambda status: any(each["done"] for each in status["transfers"]))
        wait_for(lambda: connections(agent.host.run_root / "agent.sock") == 2, "both are under way")
        assert [each["ref"] for each in agent.status()["transfers"]] == [ref]
        one.send_signal(signal.SIGINT)
        said = one.communicate(timeout=patient(20))[1].splitlines()
        assert (one.returncode, said[-1]) == (
            130,
            f"holdfast: pull '{ref}': the agent goes on pulling it (see 'holdfast status')",
        )
        registry.released.set()  # now it breaks off
        lines = two.communicate(timeout=patient(60))[1].splitlines()
    assert two.returncode == 75 and len(lines) == len(set(lines))
    agent.wait(
        lambda: [each["kind"] for each in agent.events() if each["subject"] == ref].count("failed") == 2, "told"
    )
    assert "removed 1 layer that no image needs\n" in agent.cli("image", "prune", "--force").stdout
    gone = next(each for each in reversed(agent.events()) if each["kind"] == "removed")
    assert gone["message"] == "1 layer of interrupted pulls, by hand"


def connections(socket: Path) -> int:
    """How many clients a Unix socket has accepted (proc(5): flags, state and path of each in /proc/net/unix)."""
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return sum(len(words) == 8 and words[5] == "03" and words[7] == str(socket) for words in lines)


def running(agent: LiveAgent) -> Path:
    """Run a container that writes all the time; returns its writable layer."""
    agent.write(
        "shop.toml", f'[containers.web]\nimage = "busybox:1"\n{RUN}\ncommand = ["sh", "-c", {json.dumps(LOOP)}]\n'
    )
    agent.converge()
    (upper,) = (agent.host.root / "instances").glob("*/upper")
    wait_for(lambda: (upper / "log").exists(), "it writes")
    return upper


def freezer(agent: LiveAgent) -> str:
    instance = agent.instances("shop/web")[0]["id"]
    place = cgroup.folder("freezer", f"{agent.host.cgroup}/{instance}")
    name = "cgroup.freeze" if cgroup.version() == 2 else "freezer.state"
    return {"1": "FROZEN", "0": "THAWED"}.get(state := (place / name).read_text().strip(), state)


def test_a_running_container_becomes_an_image_and_an_archive(agent: LiveAgent, tmp_path: Path) -> None:
    upper = running(agent)
    agent.cli("commit", "shop/web", "busybox:2", "-m", "why", "-a", "me", "-c", 'CMD ["cat", "/made"]')
    (found,) = json.loads(agent.cli("image", "inspect", "busybox:2").stdout)
    (base,) = json.loads(agent.cli("image", "inspect", "busybox:1").stdout)
    assert found["RootFS"]["Layers"][:-1] == base["RootFS"]["Layers"]
    assert (found["Config"]["Cmd"], found["Author"], found["Comment"]) == (["cat", "/made"], "me", "why")
    assert "why" in agent.cli("image", "history", "busybox:2").stdout.splitlines()[1]
    agent.cli("export", "shop/web", "-o", str(tmp_path / "root.tar"))
    with tarfile.open(tmp_path / "root.tar") as tar:
        names = set(tar.getnames())
    assert {"made", "log", "bin/busybox"} <= names and "etc/passwd" not in names
    written = (upper / "log").stat().st_size
    wait_for(lambda: (upper / "log").stat().st_size > written, "it goes on")
    agent.write("shop.toml", f'[containers.web]\nimage = "busybox:2"\n{RUN}\ncommand = "sleep 1000"\n')
    agent.write("bare.toml", f'[containers.bare]\nrootfs = "{agent.rootfs.path}"\n{RUN}\ncommand = "sleep 1000"\n')
    agent.converge()
    refused = agent.cli("commit", "bare", "x:1", check=False)
    assert refused.returncode == 64 and "a directory of this host" in refused.stderr
    agent.cli("export", "bare", "-o", str(tmp_path / "bare.tar"))
    with tarfile.open(tmp_path / "bare.tar") as tar:
        assert "bin/busybox" in tar.getnames()
    assert agent.exec("shop/web", "sh", "-c", "ls -d /made /etc/passwd 2>/dev/null || true").split() == ["/made"]


def test_a_container_that_stands_still_when_its_agent_is_killed_goes_on_with_the_next_one(agent: LiveAgent) -> None:
    running(agent)
    config = {**os.environ, "HOLDFAST_CONFIG": str(agent.config)}
    ours, theirs = os.pipe()  # that nobody reads from
    export = subprocess.Popen([HOLDFAST, "export", "shop/web"], env=config, stdout=theirs, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: freezer(agent) == "FROZEN", "it stands still")
        agent.kill()
    finally:
        export.send_signal(signal.SIGKILL)
        export.wait(patient(20))
        os.close(ours)
        os.close(theirs)
    agent.start()
    wait_for(lambda: freezer(agent) == "THAWED", "it goes on")


def test_a_full_disk_costs_unused_images_and_never_those_that_run_or_may_come_back(
    agent: LiveAgent, registry: Registry, tmp_path: Path
) -> None:
    for number in range(1, 5):
        make_layout(tmp_path / "layout", [agent.rootfs.tar.read_bytes(), {f"v{number}": b""}], tag=str(number))
        registry.push(tmp_path / "layout", f"app:{number}", tag=str(number))
        agent.cli("image", "pull", f"{registry.address}/app:{number}")
    app = f"{registry.address}/app"
    agent.cli("image", "remove", "busybox:1")
    for number in (1, 2):
        agent.write("shop.toml", f'[containers.web]\nimage = "{app}:{number}"\n{RUN}\ncommand = "sleep 1000"\n')
        agent.converge()
    refused = agent.cli("image", "remove", f"{app}:1", check=False)  # the generation before ran it
    assert "in use by shop/web" in refused.stderr
    agent.stop()
    images = ImageStore(agent.host.root / "images")
    for blob in (images.root / "blobs/sha256").iterdir():
        os.utime(blob, (1, 1))
    agent.configure(more="images.high_watermark = 0.001\nimages.low_watermark = 0.001")
    agent.start()
    agent.wait(lambda: len(images.digests()) == 2, "unused images are gone")
    agent.wait(
        lambda: [kind for kind, _ in told(agent)] == ["removed", "full"], "both are told, once all files are gone"
    )
    removed = told(agent)[0][1]
    assert len(removed["digests"]) == 2 and removed["freed"] > 0
    assert [image.names for image in images.list(dangling=True)] == [(f"{app}:1",), (f"{app}:2",)]
    assert agent.exec("shop/web", "ls", "/v2") == "/v2\n"


def told(agent: LiveAgent) -> list[tuple[str, Status]]:
    """The events of the image store, by kind."""
    return [(event["kind"], event) for event in agent.events() if event["subject"] == "images"]
