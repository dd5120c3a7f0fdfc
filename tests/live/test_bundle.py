"""A node that reaches no registry: a bundle is made where there is one, carried over, and held to from then on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ground import Rootfs, patient
from holdfast.drivers import Host
from layouts import Layout
from live import forkserver
from live.agent import LiveAgent
from live.registry import Registry

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

RUN = 'command = "sleep 1000"\nnetworks = ["none"]\nstop_signal = "SIGKILL"'


def holdfast(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program on a host that has no agent, no agent.toml and no image store."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOLDFAST")}
    return forkserver.run([*map(str, args)], environment, patient(60))


@pytest.fixture
def carried(registry: Registry, busybox_rootfs: Rootfs, tmp_path: Path) -> Path:
    """A bundle of two apps whose images share a layer: a tag, one of schema 2, and a digest of an index.

    The registry is gone, and so is the tree that the bundle was made of.
    """
    layout, tree = Layout(tmp_path / "layout"), tmp_path / "tree"
    base = busybox_rootfs.tar.read_bytes()
    other = layout.image([{"bin/sh": b"no program of this host"}], architecture="s390x")
    pinned = layout.index([other, layout.image([base, {"version": b"pinned"}])])
    layout.tag(layout.image([base, {"version": b"tagged"}]), "tagged")
    layout.tag(layout.image([base, {"version": b"docker"}], docker=True), "docker")
    layout.tag(pinned, "pinned")
    for tag in ("tagged", "docker", "pinned"):
        registry.push(layout.path, "app", tag=tag)
        registry.push(layout.path, f"team/{tag}:1", tag=tag)
    (tree / "conf").mkdir(parents=True)
    (tree / "vars.toml").write_text(f'registry = "{registry.address}"\n')
    (tree / "conf/motd").write_text("hello\n")
    (tree / "shop.toml").write_text(
        f'[containers.web]\nimage = "${{vars.registry}}/team/tagged:1"\n{RUN}\nvolumes = ["./conf/motd:/motd"]\n'
        f'[containers.db]\nimage = "${{vars.registry}}/team/docker:1"\n{RUN}\n'
    )
    (tree / "mail.toml").write_text(
        f'[containers.in]\nimage = "${{vars.registry}}/team/pinned@{pinned["digest"]}"\npull = "newer"\n{RUN}\n'
        f'[containers.out]\nimage = "${{vars.registry}}/team/tagged:1"\npull = "always"\n{RUN}\n'
    )
    bundle = tmp_path / "node.bundle"
    done = holdfast("bundle", "create", tree, "-o", bundle)
    assert done.returncode == 0, done.stderr
    assert "4 state files, 3 images" in done.stdout
    shared = layout.json(layout.find("tagged")["digest"])["layers"][0]["digest"]
    assert registry.fetched(shared) == 1
    for name in ("tagged:1", "docker:1", f"pinned@{pinned['digest']}"):
        source = f"oci-archive:{bundle}:{registry.address}/team/{name}"
        subprocess.run(["skopeo", "inspect", source], check=True, capture_output=True, timeout=patient(60))
    registry.stop()
    for path in (*layout.blobs.iterdir(), *tree.glob("*.toml")):
        path.unlink()
    return bundle


@pytest.fixture
def bare_agent(new_agent: Callable[[Host], LiveAgent], site: Host) -> LiveAgent:
    """An agent that does not run yet and has neither images nor state."""
    return new_agent(site)


def versions(agent: LiveAgent) -> dict[str, str]:
    targets = ("shop/web", "shop/db", "mail/in", "mail/out")
    return {target: agent.exec(target, "cat", "/version") for target in targets}


def test_a_node_without_a_network_converges_from_a_bundle_and_holds_it(bare_agent: LiveAgent, carried: Path) -> None:
    agent = bare_agent
    done = agent.cli("bundle", "load", str(carried))
    assert "no agent runs" in done.stdout
    agent.start()
    agent.converge()
    expected = {"shop/web": "tagged", "shop/db": "docker", "mail/in": "pinned", "mail/out": "tagged"}
    assert versions(agent) == expected
    assert agent.exec("shop/web", "cat", "/motd") == "hello\n"
    pid = agent.pid("mail/in")
    agent.restart()
    agent.converge()
    assert agent.pid("mail/in") == pid
    agent.cli("restart", "mail/in")
    agent.wait_until(lambda status: bool(status["converged"]))
    assert versions(agent) == expected


def test_a_second_load_changes_nothing_and_a_damaged_bundle_neither(bare_agent: LiveAgent, carried: Path) -> None:
    agent = bare_agent
    agent.write("old.toml", f'[containers.old]\nrootfs = "{agent.rootfs.path}"\n{RUN}\n')
    agent.start()
    agent.converge()
    damaged = carried.with_name("damaged.bundle")
    whole = bytearray(carried.read_bytes())
    whole[whole.rindex(b"\x1f\x8b\x08") + 20] ^= 0xFF  # within the last layer
    damaged.write_bytes(whole)
    done = agent.cli("bundle", "load", str(damaged), check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (65, 1), done.stderr
    assert "damaged.bundle" in done.stderr and "layer 'sha256:" in done.stderr
    assert agent.cli("image", "list", "--json").stdout.strip() == "[]"
    assert agent.pid("old/old")

    agent.cli("bundle", "load", str(carried), "--wait")
    status = agent.status()
    assert status["converged"] and set(status["apps"]) == {"shop", "mail"}
    assert (agent.state.parent / "state.previous/old.toml").exists()
    before = (agent.state.stat().st_ino, agent.pid("shop/web"), (agent.host.root / "images/index.json").stat().st_ino)
    again = agent.cli("bundle", "load", str(carried), "--wait")
    assert again.stdout.count("(here already)") == 3 and "has this state already" in again.stdout
    after = (agent.state.stat().st_ino, agent.pid("shop/web"), (agent.host.root / "images/index.json").stat().st_ino)
    assert after == before


def test_what_only_this_host_has_is_in_its_bundles_and_runs_elsewhere(
    agent: LiveAgent, new_site: Callable[[], Host], new_agent: Callable[[Host], LiveAgent], tmp_path: Path
) -> None:
    tree, bundle = tmp_path / "tree", tmp_path / "node.bundle"
    tree.mkdir()
    (tree / "shop.toml").write_text(f'[containers.web]\nimage = "busybox:1"\n{RUN}\n')
    made = agent.cli("bundle", "create", str(tree), "-o", str(bundle))
    assert "busybox:1  from the store of this host" in made.stderr
    other = new_agent(new_site())
    other.start()
    other.cli("bundle", "load", str(bundle), "--wait")
    assert "nobody" in other.exec("shop/web", "cat", "/etc/passwd")


def test_a_state_from_git_is_not_replaced_unless_somebody_says_where(bare_agent: LiveAgent, carried: Path) -> None:
    agent = bare_agent
    agent.configure(state='{ git = "/nowhere/state.git" }')
    done = agent.cli("bundle", "load", str(carried), check=False)
    assert done.returncode == 64 and "'/nowhere/state.git'" in done.stderr and "--images-only" in done.stderr
    agent.cli("bundle", "load", str(carried), "--images-only")
    agent.cli("bundle", "load", str(carried), "--state", str(agent.home / "elsewhere"))
    assert sorted(path.name for path in (agent.home / "elsewhere").iterdir()) == [
        "conf", "mail.toml", "shop.toml", "vars.toml",
    ]  # fmt: skip
    assert not list(agent.state.iterdir())


def test_everything_that_keeps_a_bundle_from_being_made_is_said_at_once_and_nothing_is_left(
    registry: Registry, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    images = {name: f"{registry.address}/{name}:1" for name in ("one", "two")}
    text = "".join(f'[containers.{name}]\nimage = "{image}"\n{RUN}\n' for name, image in images.items())
    (tree / "shop.toml").write_text(text)
    done = holdfast("bundle", "create", tree, "-o", tmp_path / "x.bundle")
    lines = done.stderr.splitlines()
    assert done.returncode == 64 and len(lines) == 2, done.stderr
    assert lines[0].startswith(f"holdfast: {tree}/shop.toml:2: ") and images["one"] in lines[0] and "404" in lines[0]
    assert lines[1].startswith(f"holdfast: {tree}/shop.toml:7: ") and images["two"] in lines[1]
    (tree / "shop.toml").write_text(text.replace(":1", ":${vars.version}"))
    done = holdfast("bundle", "create", tree, "-o", tmp_path / "x.bundle")
    assert done.returncode == 65 and done.stderr.count("'${vars.version}' has no value") == 2, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if "registry" not in path.name) == ["tree"]


def test_what_the_state_builds_is_in_the_bundle_and_nothing_is_built_elsewhere(
    bare_agent: LiveAgent, busybox_rootfs: Rootfs, tmp_path: Path
) -> None:
    tree, bundle = tmp_path / "tree", tmp_path / "node.bundle"
    (tree / "web").mkdir(parents=True)
    (tree / "web/busybox").write_bytes((busybox_rootfs.path / "bin/busybox").read_bytes())
    (tree / "web/busybox").chmod(0o755)
    (tree / "web/Dockerfile").write_text("FROM scratch\nCOPY busybox /bin/sleep\nCOPY busybox /bin/cat\n")
    (tree / "shop.toml").write_text(
        f'[images.web]\ncontext = "./web"\ntags = ["nowhere.test/web:1"]\npush = true\n'
        f'[containers.web]\nimage = "images.web"\n{RUN}\n[containers.tagged]\nimage = "nowhere.test/web:1"\n{RUN}\n'
    )
    bare_agent.configure(more='[policy]\nforbid = ["host-network"]\n')
    done = holdfast("bundle", "create", tree, "-o", bundle, "--config", bare_agent.config)
    assert done.returncode == 69 and "the host's network, which the rule 'host-network'" in done.stderr, done.stderr
    bare_agent.configure()
    done = holdfast("bundle", "create", tree, "-o", bundle, "--config", bare_agent.config)
    assert done.returncode == 0, done.stderr
    assert "STEP" in done.stderr
    assert not bare_agent.host.root.joinpath("images").exists()  # a host that is no node keeps nothing of it
    bare_agent.start()
    bare_agent.cli("bundle", "load", str(bundle), "--wait")
    assert {bare_agent.pid(f"shop/{name}") for name in ("web", "tagged")}
    assert not [event for event in bare_agent.events() if event["kind"] == "build"]
