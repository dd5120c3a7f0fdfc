"""Which image a commit gets: when a registry is asked, what a moved tag changes, and what it does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ground import Rootfs
from holdfast.config import ImageSettings
from holdfast.errors import HoldfastError, WrongState
from holdfast.files import open_source
from holdfast.images.builds.outside import Outside
from holdfast.images.incoming.load import load_archive
from holdfast.images.incoming.pull import Puller
from holdfast.images.kept.image import Image
from holdfast.images.kept.store import ImageStore
from holdfast.images.outgoing.write import save
from layouts import Layout
from live.agent import LiveAgent
from live.faulty import Answer, FaultyRegistry
from live.registry import Registry

pytestmark = pytest.mark.live

RUN = 'command = "sleep 1000"\nnetworks = ["none"]\nstop_signal = "SIGKILL"'


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def busybox(busybox_rootfs: Rootfs) -> bytes:
    return busybox_rootfs.tar.read_bytes()


def publish(registry: Registry, layout: Layout, busybox: bytes, tag: str, version: str) -> str:
    """Put an image that says its version under /version to the registry as app:tag; returns its digest."""
    layout.tag(layout.image([busybox, {"version": version.encode()}]), tag)
    return registry.push(layout.path, f"app:{tag}", tag=tag)


def state(registry: Registry, *lines: str, tag: str = "1") -> str:
    return "\n".join(("[containers.web]", f'image = "{registry.address}/app:{tag}"', RUN, *lines))


def staged(agent: LiveAgent) -> str:
    """The digest that the newest generation names for shop/web."""
    return str(agent.status()["apps"]["shop"]["containers"]["web"]["digest"])


def version(agent: LiveAgent) -> str:
    return agent.exec("shop/web", "cat", "/version")


def test_a_tag_is_a_digest_from_the_moment_it_is_staged(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes
) -> None:
    first = publish(registry, layout, busybox, "1", "one")
    agent.write("shop.toml", state(registry))
    agent.converge()
    assert (staged(agent), version(agent)) == (first, "one")
    publish(registry, layout, busybox, "1", "two")
    agent.write("shop.toml", state(registry, 'environment = { A = "1" }'))
    agent.converge()
    agent.cli("restart", "shop/web")
    agent.converge()
    assert (staged(agent), version(agent)) == (first, "one")


def test_always_asks_whenever_the_app_is_staged(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes
) -> None:
    publish(registry, layout, busybox, "1", "one")
    agent.write("shop.toml", state(registry, 'pull = "always"'))
    agent.converge()
    second = publish(registry, layout, busybox, "1", "two")
    agent.restart()
    agent.converge()
    assert version(agent) == "one"  # nothing was staged
    agent.write("shop.toml", state(registry, 'pull = "always"', "read_only = true"))
    agent.converge()
    assert (staged(agent), version(agent)) == (second, "two")


def test_one_reference_is_one_digest_in_an_app_however_eagerly_it_is_asked_for(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes
) -> None:
    publish(registry, layout, busybox, "1", "one")
    agent.cli("image", "pull", f"{registry.address}/app:1")
    second = publish(registry, layout, busybox, "1", "two")
    eager = state(registry, 'pull = "always"').replace("containers.web", "containers.job")
    agent.write("shop.toml", f"{state(registry)}\n{eager}")
    containers = agent.converge()["apps"]["shop"]["containers"]
    assert {name: each["digest"] for name, each in containers.items()} == {"web": second, "job": second}


def test_newer_takes_what_is_here_while_the_registry_is_away(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes
) -> None:
    first = publish(registry, layout, busybox, "1", "one")
    agent.write("shop.toml", state(registry, 'pull = "newer"'))
    agent.converge()
    registry.stop()
    agent.write("shop.toml", state(registry, 'pull = "newer"', "read_only = true"))
    agent.converge()
    assert staged(agent) == first
    (told,) = [event for event in agent.events() if event["kind"] == "pull" and "will do" in event["message"]]
    assert (told["subject"], told["app"]) == (f"{registry.address}/app:1", "")
    registry.start()
    second = publish(registry, layout, busybox, "1", "two")
    agent.write("shop.toml", state(registry, 'pull = "newer"'))
    agent.converge()
    assert staged(agent) == second


def test_never_asks_no_registry(agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes) -> None:
    publish(registry, layout, busybox, "1", "one")
    before = len(registry.requests())
    agent.write("shop.toml", state(registry, 'pull = "never"'))
    status = agent.wait_until(lambda status: status["apps"].get("shop", {}).get("state") == "failed")
    assert "pull is never" in status["apps"]["shop"]["reason"]
    assert len(registry.requests()) == before
    agent.cli("image", "pull", f"{registry.address}/app:1")
    agent.converge()
    assert version(agent) == "one"


def test_an_agent_that_is_offline_asks_nobody(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes
) -> None:
    publish(registry, layout, busybox, "1", "one")
    agent.configure(more="images.offline = true")
    agent.restart()
    before = len(registry.requests())
    agent.write("shop.toml", state(registry, 'update_image = "apply"'))
    status = agent.wait_until(lambda status: status["apps"].get("shop", {}).get("state") == "failed")
    assert "offline" in status["apps"]["shop"]["reason"]
    assert len(registry.requests()) == before


def test_a_moved_tag_is_applied_where_the_state_says_so(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes
) -> None:
    update = 'update_image = { policy = "apply", interval = "1s" }'
    publish(registry, layout, busybox, "1", "one")
    agent.write("shop.toml", state(registry, update))
    agent.converge()
    assert agent.cli("image", "outdated").returncode == 0
    second = publish(registry, layout, busybox, "1", "two")
    agent.wait_until(lambda status: status["apps"]["shop"]["containers"]["web"]["digest"] == second)
    agent.converge()
    assert version(agent) == "two"
    (told,) = [event for event in agent.events() if event["kind"] == "outdated"]
    assert second in told["message"]
    agent.write("shop.toml", state(registry, update, 'labels = { a = "1" }'))
    agent.converge()
    assert (staged(agent), version(agent)) == (second, "two")  # another commit does not take it back
    registry.stop()  # what is asked in vain is told once, and disturbs nothing
    pid = agent.pid("shop/web")
    agent.wait(lambda: any("newer image" in event["message"] for event in agent.events()), "the failure is told")
    assert agent.pid("shop/web") == pid
    assert agent.status()["converged"]


def test_a_newer_version_is_told_where_only_notice_is_asked_for(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes
) -> None:
    update = 'update_image = { policy = "notify", interval = "1s", tag_pattern = "1.*" }'
    first = publish(registry, layout, busybox, "1.0.9", "one")
    newest = publish(registry, layout, busybox, "1.0.10", "1.0.10")
    for tag in ("2.0.0", "latest", "1.0.2"):
        publish(registry, layout, busybox, tag, tag)
    agent.write("shop.toml", state(registry, update, tag="1.0.9"))
    agent.converge()
    status = agent.wait_until(lambda status: bool(status["apps"]["shop"]["containers"]["web"]["newer"]))
    assert status["apps"]["shop"]["containers"]["web"]["newer"].startswith(f"{registry.address}/app:1.0.10@sha256:")
    assert status["converged"] and staged(agent) == first
    asked = agent.cli("image", "outdated", check=False)
    assert asked.returncode == 2
    assert f"{registry.address}/app:1.0.10" in asked.stdout
    assert "newer image: " in agent.cli("status").stdout
    agent.write("shop.toml", state(registry, update.replace("notify", "apply"), tag="1.0.9"))
    agent.wait_until(lambda status: status["apps"]["shop"]["containers"]["web"]["digest"] == newest)
    agent.converge()
    assert version(agent) == "1.0.10"
    (instance,) = agent.instances("shop/web")
    assert instance["image"].startswith(f"{registry.address}/app:1.0.10@")
    assert f"{registry.address}/app:1.0.10" in agent.cli("image", "list").stdout


def test_apply_ends_at_once_where_only_a_commit_helps(agent: LiveAgent, registry: Registry) -> None:
    agent.write("shop.toml", state(registry, tag="gone"))
    done = agent.cli("apply", "--timeout", "50", check=False, timeout=30)
    assert done.returncode == 65
    assert "the registry does not have it" in done.stderr
    assert agent.cli("plan", check=False).returncode == 2
    agent.stop()
    assert agent.cli("apply", "--timeout", "50", check=False, timeout=30).returncode == 65


def test_plan_says_what_is_pulled_or_built_and_how_much_has_to_come(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes, free_port: Callable[[], int]
) -> None:
    publish(registry, layout, busybox, "1", "one")
    publish(registry, layout, busybox, "2", "two")
    first, second = (layout.json(layout.find(tag)["digest"])["layers"] for tag in "12")
    mute = FaultyRegistry()
    mute.answer("", Answer(mute=True))
    texts = {
        "shop": state(registry),
        "quiet": f'[containers.web]\nimage = "{mute.address}/app:1"\n{RUN}',
        "gone": f'[containers.web]\nimage = "127.0.0.1:{free_port()}/app:1"\n{RUN}',
        "made": f'[images.web]\ncontext = "./web"\n[containers.web]\nimage = "images.web"\n{RUN}',
        "packed": f'[images.web]\ncontext = "./packed"\n[containers.web]\nimage = "images.web"\n{RUN}',
        "never": state(registry, 'pull = "never"', tag="2"),
    }
    try:
        agent.stop()  # so that it does not pull them meanwhile
        (agent.state / "web").mkdir()
        (agent.state / "packed").mkdir()
        agent.write("packed/Dockerfile", "FROM docker-archive:/srv/app.tar\nRUN true\n")
        agent.write("web/Dockerfile", f"FROM {registry.address}/app:1\nRUN true\n")
        for app, text in texts.items():
            agent.write(f"{app}.toml", text)
        found = json.loads(agent.cli("plan", "--json", check=False).stdout)["images"]
    finally:
        mute.close()
    size, ref = sum(layer["size"] for layer in first), f"{registry.address}/app:1"
    coming = {"image": ref, "verb": "pull", "size": size, "error": ""}
    assert found["shop"] == [coming]
    assert found["made"] == [coming, {"image": "images.made/web", "verb": "build", "size": None, "error": ""}]
    assert [each["image"] for each in found["packed"]] == ["images.packed/web"], "an archive is not pulled"
    assert (found["quiet"][0]["size"], found["gone"][0]["size"]) == (None, None)
    assert "connection refused" in found["gone"][0]["error"] and found["quiet"][0]["error"]
    assert found["never"][0]["error"] == "it is not here, and pull is never"

    for app in set(texts) - {"shop"}:
        agent.remove(f"{app}.toml")
    assert f"pull {ref}" in agent.cli("plan", check=False).stdout
    agent.start()
    agent.converge()
    asked = len(registry.requests())
    agent.write("shop.toml", state(registry, "read_only = true"))
    agent.stop()
    agent.write("other.toml", state(registry))
    assert not json.loads(agent.cli("plan", "--json", check=False).stdout)["images"]
    assert len(registry.requests()) == asked, "what is here is not asked about"
    agent.write("other.toml", state(registry, tag="2"))
    (need,) = json.loads(agent.cli("plan", "--json", check=False).stdout)["images"]["other"]
    assert need["size"] == sum(layer["size"] for layer in second[1:]), "the layer that is here does not come again"


@pytest.mark.parametrize("with_agent", [True, False])
def test_apply_gives_up_a_registry_that_does_not_answer_and_the_agent_goes_on(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes, with_agent: bool
) -> None:
    publish(registry, layout, busybox, "1", "one")
    registry.stop()
    agent.write("shop.toml", state(registry))
    if not with_agent:
        agent.stop()
    done = agent.cli("apply", "--connect-timeout", "1s", check=False, timeout=40)  # its own timeout is 5 minutes
    assert done.returncode == 75, done.stderr
    assert "connection refused" in done.stderr
    registry.start()
    if with_agent:
        agent.wait_until(lambda status: bool(status["converged"]))
    else:
        agent.cli("apply", "--connect-timeout", "30s")


@pytest.mark.parametrize("with_agent", [True, False])
def test_a_registry_that_says_nothing_ends_an_apply_after_connect_timeout(agent: LiveAgent, with_agent: bool) -> None:
    mute = FaultyRegistry()
    try:
        mute.answer("", Answer(mute=True))
        agent.configure(more='images.connect_timeout = "1s"')
        agent.write("shop.toml", f'[containers.web]\nimage = "{mute.address}/app:1"\n{RUN}')
        agent.stop()
        if with_agent:
            agent.start()
        done = agent.cli("apply", check=False, timeout=40)
        assert done.returncode == 75, done.stderr
        assert f"image '{mute.address}/app:1': the registry has not answered for" in done.stderr
        if with_agent:
            words = "the registry has not answered for"
            agent.wait(lambda: words in agent.cli("status").stdout, "status says so while it is asked again")
    finally:
        mute.close()


def test_an_apply_waits_for_no_registry_where_what_is_here_will_do(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes
) -> None:
    publish(registry, layout, busybox, "1", "one")
    agent.write("shop.toml", state(registry))
    agent.converge()
    registry.stop()
    agent.write("shop.toml", state(registry, 'pull = "newer"', 'environment = { A = "1" }'))
    agent.cli("apply", "--connect-timeout", "1ms")
    assert not agent.status()["unanswered"]


def test_a_prune_takes_nothing_of_an_app_that_is_being_staged(
    agent: LiveAgent, registry: Registry, layout: Layout, busybox: bytes
) -> None:
    digest = publish(registry, layout, busybox, "1", "one")
    layout.tag(layout.image([busybox, {"version": b"two"}]), "latest")
    slow = FaultyRegistry(layout.path)
    try:
        slow.answer("manifests", Answer(503, mute=True))
        other = f'[containers.other]\nimage = "{slow.address}/app:latest"\n{RUN}\n'
        agent.write("shop.toml", other + state(registry))
        agent.sync()
        agent.wait(lambda: digest in agent.cli("image", "list", "--json").stdout, "one of the two images is here")
        for kind in ("image", "system"):
            done = agent.cli(kind, "prune", "--all", "--force", check=False)
            assert done.returncode == 75 and "an image is being pulled" in done.stderr, done.stdout + done.stderr
        assert digest in agent.cli("image", "list", "--json").stdout
        slow.mend()
        slow.released.set()
        agent.converge()
    finally:
        slow.close()
    own = layout.json(layout.find("1")["digest"])["layers"][1]["digest"]
    assert registry.fetched(own) == 1, "what was here stayed"
    agent.cli("image", "prune", "--all", "--force")
    assert digest in agent.cli("image", "list", "--json").stdout, "it is in use"


def test_an_archive_of_the_host_is_an_image(agent: LiveAgent, layout: Layout, busybox: bytes) -> None:
    first = layout.image([busybox, {"version": b"one"}])
    layout.tag(first, "1")
    agent.write("shop.toml", f'[containers.web]\nimage = "oci:{layout.path}:1"\n{RUN}')
    agent.converge()
    assert (staged(agent), version(agent)) == (first["digest"], "one")
    second = layout.image([busybox, {"version": b"two"}])
    layout.tag(second, "1")
    agent.write("shop.toml", f'[containers.web]\nimage = "oci:{layout.path}:1"\nread_only = true\n{RUN}')
    agent.converge()
    assert (staged(agent), version(agent)) == (second["digest"], "two")


@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive"])
def test_policy_json_is_asked_about_archives_as_about_registries(
    form: str, tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.image([{"version": b"one"}]), "latest")
    place = tmp_path / ("layout" if form == "oci" else "image.tar")
    if form != "oci":
        words = ["skopeo", "--insecure-policy", "copy", f"oci:{layout.path}:latest", f"{form}:{place}:app:1"]
        subprocess.run(words, check=True, capture_output=True)
    policy = tmp_path / "policy.json"
    reference = f"{form}:{place}"
    for default, transports, allowed in (
        ("reject", {}, False),
        ("reject", {form: {"": [{"type": "insecureAcceptAnything"}]}}, True),
        ("insecureAcceptAnything", {form: {"": [{"type": "reject"}]}}, False),
        ("insecureAcceptAnything", {}, True),
    ):
        policy.write_text(json.dumps({"default": [{"type": default}], "transports": transports}))
        puller = new_puller(ImageSettings(policy=policy, min_free=0))
        for load in (puller.load, partial(Outside(puller.store, puller).image, pull="missing"), load_file(puller)):
            if allowed:
                assert load(reference).read_file("/version") == b"one"
            else:
                with pytest.raises(WrongState, match=r"^load '.*policy.json does not allow it"):
                    load(reference)


def load_file(puller: Puller) -> Callable[[str], Image]:
    """`holdfast image load PATH`."""

    def load(reference: str) -> Image:
        (image,) = puller.load_all(Path(reference.partition(":")[2]))
        return image

    return load


@pytest.mark.parametrize("form", ["oci", "docker-archive"])
def test_every_image_of_a_file_is_loaded_that_policy_json_admits(
    form: str, tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    layout = Layout(tmp_path / "app")
    for version in ("one", "two"):
        layout.tag(layout.image([{"version": version.encode()}]), version)
    place = layout.path
    if form == "docker-archive":
        store, place = ImageStore(tmp_path / "first"), tmp_path / "app.tar"
        load_archive(store, layout.path)
        with place.open("wb") as out:
            save(store, ["app:one", "app:two"], out, "docker-archive")
    policy = tmp_path / "policy.json"
    transports = {form: {"": [{"type": "insecureAcceptAnything"}]}}
    policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": transports}))
    puller = new_puller(ImageSettings(policy=policy, min_free=0))
    assert [image.read_file("/version") for image in puller.load_all(place)] == [b"one", b"two"]
    assert sorted(puller.store.names()) == ["docker.io/library/app:one", "docker.io/library/app:two"]


@pytest.mark.parametrize("default", ["reject", "insecureAcceptAnything"])
def test_an_archive_is_read_where_it_was_checked_also_when_a_link_has_taken_its_place(
    default: str, tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    inside, outside = Layout(tmp_path / "inside"), Layout(tmp_path / "outside")
    inside.tag(inside.image([{"version": b"inside"}]), "1")
    outside.tag(outside.image([{"version": b"outside"}]), "1")
    policy = tmp_path / "policy.json"
    transports = {"oci": {"": [{"type": "insecureAcceptAnything"}]}}
    policy.write_text(json.dumps({"default": [{"type": default}], "transports": transports}))
    puller = new_puller(ImageSettings(policy=policy, min_free=0))
    handle = open_source(str(inside.path), [str(inside.path)])
    inside.path.rename(tmp_path / "moved")
    inside.path.symlink_to(outside.path)
    assert puller.load(f"oci:{inside.path}:1", handle).read_file("/version") == b"inside"
    assert puller.load(f"oci:{inside.path}:1").read_file("/version") == b"outside"
    with pytest.raises(HoldfastError, match=re.escape(str(inside.path))):
        puller.load(f"oci:{inside.path}:none", handle)
    os.close(handle)
