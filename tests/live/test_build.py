"""[images.*] built by the real buildah, on images made of busybox."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from footprint import leftovers
from ground import Rootfs, patient, wait_for
from holdfast.config import BuildSettings, ImageSettings
from holdfast.drivers import Host
from holdfast.errors import HoldfastError, TryAgain, UnfitHost, WrongState
from holdfast.images.builds import buildlog, fence, hazards
from holdfast.images.builds.build import Builder
from holdfast.images.builds.buildah import Buildah, check_plain
from holdfast.images.builds.hazards import buildah_version, is_safe
from holdfast.images.builds.outside import Outside
from holdfast.images.formats.manifests import architecture
from holdfast.images.incoming.load import import_rootfs, load_archive
from holdfast.images.incoming.pull import Puller
from holdfast.images.kept.image import Image
from holdfast.images.kept.store import ImageStore
from holdfast.runtime import cgroup, delegation
from holdfast.spec import NodeFacts, Spec, load
from layouts import Layout, make_layout
from live.agent import HOLDFAST, LiveAgent
from live.debian import debian_tar
from live.processes import command_line, command_lines
from live.registry import Registry, make_island

pytestmark = pytest.mark.live

BUSYBOX = """\
FROM scratch AS tools
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "/bin"]
"""
STATE = """
[images.web]
context = "./web"
[containers.web]
image = "images.web"
"""


class Workshop:
    """A builder on a site, and what it told."""

    def __init__(self, host: Host, settings: ImageSettings = ImageSettings()) -> None:
        self.host = host
        self.told: list[tuple[str, str, str]] = []
        self.outputs: list[list[str]] = []
        self.store = ImageStore(host.root / "images", settings)
        self.outside = Outside(self.store, Puller(self.store, settings))
        self.builder = Builder(self.store, settings, host, self.tell, self.outside, BuildSettings(concurrency=2))

    @property
    def buildah(self) -> Buildah:
        """Who builds for the app `shop`."""
        return self.builder.buildah("shop")

    def tell(self, kind: str, subject: str, message: str, *, output: Sequence[str] = (), **_: object) -> None:
        self.told.append((kind, subject, message))
        self.outputs += [list(output)] if output else []

    def steps(self, name: str = "shop/web") -> list[str]:
        """What buildah said that it does for an image."""
        return [line for line in self.log(name).splitlines() if "STEP" in line]

    def log(self, name: str = "shop/web") -> str:
        """All that the last build of an image said."""
        path = self.host.root / f"builds/logs/{name}.log"
        return path.read_text() if path.exists() else ""

    def build(self, files: Mapping[str, str | bytes], name: str = "shop/web") -> Image:
        spec = read(files)
        return self.builder.build(name, spec.apps[name.partition("/")[0]].images, spec.blobs)


def read(files: Mapping[str, str | bytes]) -> Spec:
    """The state that these files ask for; those that begin like a script are programs."""
    raw = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
    programs = frozenset(path for path, content in raw.items() if content[:2] in (b"#!", b"\x7fE"))
    spec = load(raw, NodeFacts("node"), executable=programs)
    assert not spec.problems, [str(problem) for problem in spec.problems]
    return spec


def shop(dockerfile: str, state: str = STATE, **files: str | bytes) -> dict[str, str | bytes]:
    """The files of an app whose context is web/, with busybox in it."""
    web = {f"web/{name}": text for name, text in {"busybox": busybox(), **files}.items()}
    return {"shop.toml": state, "web/Dockerfile": dockerfile, **web}


def busybox() -> bytes:
    return Path(shutil.which("busybox") or "").read_bytes()


def content(image: Image, path: str) -> str | None:
    found = image.read_file(path)
    return None if found is None else found.decode()


@pytest.fixture
def workshop(site: Host) -> Workshop:
    return Workshop(site)


def test_an_image_is_built_as_its_dockerfile_says(workshop: Workshop) -> None:
    image = workshop.build(
        shop(
            BUSYBOX + "ARG GREETING=none\nFROM tools AS web\nARG GREETING\nCOPY . /srv/\n"
            'RUN /srv/start.sh "$GREETING" > /said && id -u >> /said\nENV A=b\nCMD ["/srv/start.sh"]\n'
            "FROM tools\nRUN false\n",
            STATE.replace(
                "[containers", 'target = "web"\nargs = { GREETING = "hello" }\nlabels = ["a=b"]\n[containers'
            ),
            **{
                "start.sh": "#!/bin/sh\necho said $1\n",
                "secret.key": "x",
                ".dockerignore": "*.key\nbusy*\n!busybox\n",
            },
        )
    )
    assert content(image, "/said") == "said hello\n0\n"
    assert content(image, "/srv/secret.key") is None
    assert (image.lookup("/srv/start.sh") or 0) & 0o777 == 0o755
    assert (image.lookup("/srv/Dockerfile") or 0) & 0o777 == 0o644
    assert image.config["Cmd"] == ["/srv/start.sh"]
    assert image.config["Labels"]["a"] == "b"
    assert "A=b" in image.config["Env"]
    assert any("COPY . /srv/" in step for step in workshop.steps())
    log = (workshop.host.root / "builds/logs/shop/web.log").read_text()
    assert "/srv/start.sh" in log


def test_what_is_there_by_its_key_is_never_built_again(workshop: Workshop) -> None:
    files = shop(BUSYBOX + "RUN cat /proc/sys/kernel/random/uuid > /once\n")
    image = workshop.build(files)
    again = Workshop(workshop.host)
    assert again.build({**files, "other.toml": "", "elsewhere/x": "y"}).digest == image.digest
    assert again.told == []


def test_steps_that_stay_the_same_come_from_the_cache(workshop: Workshop) -> None:
    dockerfile = BUSYBOX + "RUN cat /proc/sys/kernel/random/uuid > /once\nCOPY a /a\n"
    before = workshop.build(shop(dockerfile, a="1"))
    after = Workshop(workshop.host).build(shop(dockerfile, a="2"))
    assert content(before, "/once") == content(after, "/once")
    assert (content(before, "/a"), content(after, "/a")) == ("1", "2")
    assert before.layers[:-1] == after.layers[:-1]
    afresh = shop(dockerfile, STATE.replace("[containers", "no_cache = true\n[containers"), a="3")
    assert content(workshop.build(afresh), "/once") != content(after, "/once")


def test_an_image_is_built_from_another_of_the_tree_that_comes_first(workshop: Workshop) -> None:
    files = {
        "tools.toml": '[images.base]\ncontext = "./base"\ntags = ["r.example/base:1"]\n',
        "base/Dockerfile": BUSYBOX + "RUN cat /proc/sys/kernel/random/uuid > /once\n",
        "base/busybox": shop("")["web/busybox"],
        "shop.toml": STATE + '[images.mine]\ncontext = "./mine"\n',
        "web/Dockerfile": "ARG BASE=images.tools/base\nFROM $BASE AS one\nRUN echo one > /one\n"
        "FROM images.mine\nCOPY --from=one /one /one\nCOPY --from=r.example/base:1 /once /twice\n",
        "mine/Dockerfile": "FROM r.example/base:1\nRUN echo mine > /mine\n",
    }
    image = workshop.build(files)
    base = workshop.store.resolve("r.example/base:1") if "r.example/base:1" in workshop.store.names() else None
    base = base or workshop.builder.find("tools/base", read(files).apps["shop"].images["tools/base"])
    assert base is not None
    assert (content(image, "/one"), content(image, "/mine")) == ("one\n", "mine\n")
    assert content(image, "/once") == content(image, "/twice") == content(base, "/once")
    assert image.layers[: len(base.layers)] == base.layers
    assert len(workshop.steps("tools/base")) == 4
    sizes = [workshop.store.layers.facts(diff_id).size for diff_id in image.diff_ids]
    assert [layer["size"] for layer in image.manifest["layers"]] == sizes
    told = [subject for _, subject, message in workshop.told if message.startswith("built in")]
    assert told == ["image tools/base", "image shop/mine", "image shop/web"]

    workshop.buildah.wipe()  # what the cache has lost is taken from the store, and not built again
    changed = workshop.build({**files, "web/new": ""})
    assert content(changed, "/once") == content(base, "/once")
    assert len(workshop.steps("tools/base")) == 4


def test_what_a_build_starts_from_is_fetched_once(workshop: Workshop, registry: Registry, tmp_path: Path) -> None:
    made = [{"bin": None, "bin/busybox": busybox(), "bin/sh": "busybox"}]
    make_layout(tmp_path / "layout", made, history=[{"created_by": "tar"}])
    registry.push(tmp_path / "layout", "base")
    dockerfile = "ARG WHERE\nFROM $WHERE/base\nRUN busybox cp /bin/busybox /copy\nCOPY a /a\n"
    state = STATE.replace("[containers", f'args = ["WHERE={registry.address}"]\n[containers')
    workshop.build(shop(dockerfile, state, a="1"))
    registry.stop()
    image = workshop.build(shop(dockerfile, state, a="2"))
    assert content(image, "/a") == "2"
    assert (image.lookup("/copy") or 0) & 0o777 == 0o755


def test_a_build_may_start_from_what_was_imported_here(workshop: Workshop, busybox_rootfs: Rootfs) -> None:
    base = import_rootfs(workshop.store, busybox_rootfs.tar, "ground:1", ["ENV A=b"])
    image = workshop.build(
        shop("FROM ground:1 AS one\nRUN echo more > /more\nFROM one\nCOPY --from=ground:1 /etc /x\n")
    )
    assert image.layers[0] == base.layers[0]
    assert "A=b" in image.config["Env"]
    assert content(image, "/more") == "more\n"
    assert content(image, "/x/passwd") == content(base, "/etc/passwd")
    assert workshop.steps()[0].endswith(": FROM ground:1 AS one")


def test_a_build_that_fails_says_why_in_one_line_and_keeps_all_of_it(workshop: Workshop) -> None:
    noise = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i; done"
    files = shop(
        BUSYBOX
        + f"RUN {noise}; printf '\\033[31mred\\033[0m\\r\\n'; echo the compiler is angry >&2; sleep 0.3; exit 3\n"
    )  # buildah's chroot isolation relays what a step says, and may drop what comes with the end of its process
    with pytest.raises(WrongState) as caught:
        workshop.build(files)
    log = workshop.host.root / "builds/logs/shop/web.log"
    assert str(caught.value).startswith("build 'images.shop/web': RUN i=0; while")
    assert str(caught.value).endswith(f"…: exit status 3: the compiler is angry (all of it is in {log})")
    assert "\n" not in str(caught.value)
    assert (caught.value.retry, caught.value.wait) == (True, 60)
    assert log.read_text().count("\nline ") == 300
    assert "\nred\n" in log.read_text()
    told = [(kind, message) for kind, _, message in workshop.told]
    assert told == [("build", "building from web (web/Dockerfile)"), ("failed", str(caught.value))]
    assert "the compiler is angry" in workshop.outputs[0]
    assert len(workshop.outputs[0]) == buildlog.LAST_LINES, "a chatty build does not drown the events"
    assert [each["error"] for each in workshop.builder.look()] == [str(caught.value)]
    workshop.builder.forget(["shop/web"])
    assert workshop.builder.look() == []
    with pytest.raises(WrongState):
        workshop.build(files)
    assert log.with_name("web.log.1").read_text().count("\nline ") == 300


def test_what_an_earlier_step_complained_of_is_no_reason(workshop: Workshop) -> None:
    with pytest.raises(WrongState, match=r": RUN exit 3: exit status 3 \(all"):
        workshop.build(shop(BUSYBOX + "RUN echo careful >&2\nRUN exit 3\n"))


def test_what_lacks_in_the_context_is_named(workshop: Workshop) -> None:
    with pytest.raises(WrongState, match=r": COPY key /: .*/key.*: no such file or directory \(all"):
        workshop.build(shop("FROM scratch\nCOPY key /\n", key="x", **{".dockerignore": "key\n"}))


def test_nothing_is_built_where_too_little_is_free(site: Host) -> None:
    workshop = Workshop(site, ImageSettings(min_free=1 << 62))
    with pytest.raises(UnfitHost, match=r"^build 'images.shop/web': not enough space in '/.*min_free"):
        workshop.build(shop(BUSYBOX))
    assert workshop.told == []


def test_an_image_that_no_registry_has_is_told_by_its_name(workshop: Workshop, registry: Registry) -> None:
    named = rf"^build 'images.shop/web': FROM {registry.address}/nothing:1: .*404"
    with pytest.raises(HoldfastError, match=named) as caught:
        workshop.build(shop(f"FROM {registry.address}/nothing:1\n"))
    assert caught.value.retry
    assert caught.value.wait >= 60
    assert "\n" not in str(caught.value)


def test_run_steps_reach_no_network_where_the_state_says_so(workshop: Workshop) -> None:
    state = STATE.replace("[containers", 'network = "none"\n[containers')
    image = workshop.build(shop(BUSYBOX + "RUN ls /sys/class/net > /links\n", state))
    assert content(image, "/links") == "lo\n"


@pytest.mark.parametrize(
    "ignore",
    [
        "*\n!src\nsrc/*.o\n",
        "**/*.o\n!src/keep.o\n",
        "# comment\n/docs/\n./a.txt\n*/b\n",
        "d*/**\n!docs/READ*\n.dockerignore\nDockerfile\n",
        "src/d?ep\n**/x[1-3]\n",
    ],
)
def test_an_ignorefile_leaves_out_what_buildah_itself_leaves_out(
    ignore: str, workshop: Workshop, tmp_path: Path
) -> None:
    paths = ["a.txt", "docs/README", "docs/b", "src/a.o", "src/keep.o", "src/deep/x1", "src/deep/x4", "src/b/c", "x2"]
    files = {**dict.fromkeys(paths, "x"), ".dockerignore": ignore, "Dockerfile": "FROM scratch\nCOPY . /all/\n"}
    for path, text in files.items():
        (tmp_path / "web" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "web" / path).write_text(text)
    with workshop.buildah.alone():
        iid = workshop.buildah.work / "iid"
        shutil.copytree(tmp_path / "web", workshop.buildah.work / "web")
        workshop.buildah.build(["--iidfile", str(iid), str(workshop.buildah.work / "web")], {}, "none", print)
        layer = workshop.buildah.storage / "overlay"
        theirs = {str(p.relative_to(top)) for top in layer.glob("*/diff/all") for p in top.rglob("*") if p.is_file()}
    image = workshop.build({"shop.toml": STATE, **{f"web/{path}": text for path, text in files.items()}})
    top = image.layers[-1] / "all"
    assert {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()} == theirs


def test_what_is_pushed_is_in_the_registry_by_every_tag(
    workshop: Workshop, registry: Registry, new_puller: Callable[..., Puller]
) -> None:
    tags = f'tags = ["{registry.address}/shop/web:1", "{registry.address}/shop/web:2"]\npush = true\n'
    files = shop(BUSYBOX + "RUN echo x > /x\n", STATE.replace("[containers", f"{tags}[containers"))
    image = workshop.build(files)
    puller = new_puller()
    for tag in "12":
        assert puller.pull(f"{registry.address}/shop/web:{tag}").config_digest == image.config_digest
    assert set(workshop.store.resolve(image.digest).names) >= {f"{registry.address}/shop/web:{tag}" for tag in "12"}
    asked = len(registry.requests())
    workshop.build(files)
    assert len(registry.requests()) == asked, "what is there is not pushed again"


def test_a_push_that_fails_is_tried_again_and_nothing_is_built_for_it(workshop: Workshop, registry: Registry) -> None:
    tags = f'tags = ["{registry.address}/web:1"]\npush = true\n'
    files = shop(BUSYBOX, STATE.replace("[containers", f"{tags}[containers"))
    registry.stop()
    with pytest.raises(TryAgain, match=r"^push '127"):
        workshop.build(files)
    steps = len(workshop.steps())
    registry.start()
    workshop.build(files)
    assert len(workshop.steps()) == steps
    assert [each for each in registry.requests("manifests/1") if each.method == "PUT"]


def test_an_image_for_several_platforms_is_pushed_as_one_index(workshop: Workshop, registry: Registry) -> None:
    """linux/386 runs on any amd64 kernel, without an emulator."""
    if architecture() != "amd64":
        pytest.skip("needs a host that runs two platforms")
    more = f'platforms = ["linux/amd64", "linux/386"]\ntags = ["{registry.address}/web:1"]\npush = true\n'
    files = shop("FROM scratch\nARG TARGETARCH\nCOPY . /\n", STATE.replace("[containers", f"{more}[containers"))
    image = workshop.build(files)
    assert image.architecture == "amd64"
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{registry.address}/web:1"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    assert [each["platform"]["architecture"] for each in json.loads(raw)["manifests"]] == ["amd64", "386"]


def test_the_cache_goes_with_the_last_image_that_was_built(workshop: Workshop) -> None:
    image = workshop.build(shop(BUSYBOX))
    workshop.builder.sweep()
    assert workshop.buildah.names()
    workshop.store.remove(image.digest)
    workshop.builder.sweep()
    assert not workshop.buildah.storage.exists()


def test_a_cache_that_grew_too_large_goes_and_the_next_build_starts_afresh(workshop: Workshop) -> None:
    workshop.builder.builds = BuildSettings(cache=1000)
    dockerfile = BUSYBOX + "RUN cat /proc/sys/kernel/random/uuid > /once\nCOPY a /a\n"
    before = workshop.build(shop(dockerfile, a="1"))
    assert workshop.buildah.size() == 0
    after = workshop.build(shop(dockerfile, a="2"))
    assert content(before, "/once") != content(after, "/once")


def test_what_lies_in_the_cache_after_a_crash_of_the_host_is_not_trusted(workshop: Workshop) -> None:
    dockerfile = BUSYBOX + "RUN cat /proc/sys/kernel/random/uuid > /once\nCOPY a /a\n"
    before = workshop.build(shop(dockerfile, a="1"))
    (workshop.host.root / "builds/apps/shop/open").write_text("another boot")
    after = workshop.build(shop(dockerfile, a="2"))
    assert content(before, "/once") != content(after, "/once")


def test_closing_ends_a_build_at_once(workshop: Workshop) -> None:
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(workshop.build, shop(BUSYBOX + "RUN echo begun; sleep 1000\n"))
        wait_for(lambda: "begun\n" in workshop.log(), "the step runs")
        workshop.builder.close()
        with pytest.raises(TryAgain, match="stopping"):
            building.result(patient(10))


def commit(agent: LiveAgent, files: Mapping[str, str | bytes]) -> None:
    """Put files into the agent's state, programs as such, each with one rename."""
    for path, text in sorted(files.items(), key=lambda each: each[0].endswith(".toml")):
        target = agent.state / path
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.swp")
        fresh.write_bytes(text.encode() if isinstance(text, str) else text)
        fresh.chmod(0o755 if fresh.read_bytes()[:2] in (b"#!", b"\x7fE") else 0o644)
        fresh.replace(target)


def failures(agent: LiveAgent) -> list[str]:
    return [event["message"] for event in agent.events() if event["kind"] == "failed"]


SERVE = '#!/bin/sh\ntrap "exit 0" TERM\ncat /version\nwhile :; do sleep 0.1; done\n'
DOCKERFILE = BUSYBOX + "COPY serve /serve\nRUN echo one > /version && echo the version is made\nCMD /serve\n"


def test_a_container_runs_what_is_built_until_the_context_changes(agent: LiveAgent) -> None:
    files = shop(DOCKERFILE, serve=SERVE)
    commit(agent, files)
    shown = agent.cli("apply", timeout=180).stderr
    assert "building images.shop/web  STEP" in shown and "building images.shop/web  ended after" in shown
    assert agent.exec("shop/web", "cat", "/version") == "one\n"
    messages = [event["message"] for event in agent.events() if event["subject"] == "image shop/web"]
    assert [message.partition(" ")[0] for message in messages] == ["building", "built"], "its output is in the log"
    assert "the version is made" in (agent.host.root / "builds/logs/shop/web.log").read_text()
    pid, built = agent.pid("shop/web"), len(messages)

    agent.restart()
    commit(agent, {"other.toml": "[volumes.data]\n", "web2/readme": "nothing of the context"})
    agent.converge()
    assert agent.pid("shop/web") == pid
    assert len([event for event in agent.events() if event["subject"] == "image shop/web"]) == built

    commit(agent, {"web/Dockerfile": DOCKERFILE.replace("echo one", "cat nothing")})
    agent.sync()
    agent.wait(lambda: bool(failures(agent)), "the build fails")
    assert agent.pid("shop/web") == pid, "what runs stays"
    assert "cat: can't open 'nothing'" in failures(agent)[0]
    assert failures(agent)[0].count("shop/web") == 2, "in the name, and in the path of the log"

    commit(agent, {"web/Dockerfile": DOCKERFILE.replace("echo one", "echo two")})
    agent.converge()
    assert agent.exec("shop/web", "cat", "/version") == "two\n"


def test_a_failed_build_is_told_at_once_while_the_rest_of_its_app_is_built(agent: LiveAgent) -> None:
    files = shop(BUSYBOX + "RUN echo so it is; exit 3\n")
    files["shop.toml"] = STATE + '[images.zoo]\ncontext = "./zoo"\n[containers.zoo]\nimage = "images.zoo"\n'
    commit(agent, {**files, "zoo/Dockerfile": BUSYBOX + "RUN sleep 1000\n", "zoo/busybox": busybox()})
    agent.sync()
    agent.wait(lambda: any("sleep 1000" in each["step"] for each in agent.status()["builds"]), "the second is built")
    (broken,) = (each for each in agent.status()["builds"] if each["error"])
    assert "RUN echo so it is; exit 3: exit status 3: so it is" in broken["error"]
    assert failures(agent) == [broken["error"]]
    assert "failed builds" in agent.cli("status").stdout
    assert "\n    so it is" in agent.cli("events").stdout
    commit(agent, {"web/Dockerfile": DOCKERFILE, "web/serve": SERVE, "shop.toml": STATE})
    agent.restart()
    agent.converge()
    assert not agent.status()["builds"]


def test_a_build_that_ends_with_its_agent_has_not_failed_and_is_begun_by_the_next(agent: LiveAgent) -> None:
    commit(agent, shop(BUSYBOX + "RUN echo begun; sleep 1000\n", slow="x"))
    for _ in range(2):
        agent.sync()
        agent.wait(lambda: any("RUN echo begun" in each["step"] for each in agent.status()["builds"]), "it is built")
        agent.restart()
    assert failures(agent) == []
    told = [event["message"] for event in agent.events() if event["kind"] == "interrupted"]
    assert told == ["StageGeneration was cut short; it is finished or undone now"] * 2
    assert agent.status()["apps"]["shop"]["state"] == "changing"
    agent.stop()  # a build that nobody waits for any more goes on


def test_a_build_that_is_killed_with_its_agent_leaves_nothing(agent: LiveAgent) -> None:
    commit(agent, shop(BUSYBOX + "RUN echo begun; sleep 1000\n", slow="x"))
    agent.sync()
    agent.wait(lambda: any("RUN echo begun" in each["step"] for each in agent.status()["builds"]), "the step runs")
    wait_for(lambda: any("sleep 1000" in line for line in leftovers(agent.host)), "the step runs")
    agent.kill()
    held = ("process", "mount", "netns")
    wait_for(lambda: not any(line.startswith(held) for line in leftovers(agent.host)), "all is over")
    commit(agent, {"web/Dockerfile": DOCKERFILE, "web/serve": SERVE})
    agent.start()
    agent.converge()
    assert agent.exec("shop/web", "cat", "/version") == "one\n"
    wait_for(lambda: not cgroup.folders(f"{agent.host.cgroup}-build"), "its cgroup goes")


def test_a_node_without_buildah_says_so(agent: LiveAgent, mounts_alone: None) -> None:
    commit(agent, shop(BUSYBOX))
    hide = 'mount --bind /dev/null "$0" && exec "$@"'
    agent.through = ("unshare", "--mount", "sh", "-c", hide, shutil.which("buildah") or "")
    agent.restart()
    agent.sync()
    agent.wait(lambda: any("the package buildah" in each for each in failures(agent)), "the app can't be staged")
    environment = {**os.environ, "HOLDFAST_CONFIG": str(agent.config)}
    for words, told in (
        (("check", str(agent.state)), "can't build images.shop/web"),
        (("doctor",), "needed for [images"),
    ):
        done = subprocess.run(
            [*agent.through, HOLDFAST, *words], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0 or words == ("doctor",)
        assert told in done.stdout + done.stderr


@pytest.mark.timeout(400)
def test_a_container_runs_what_is_built_on_a_real_debian(agent: LiveAgent) -> None:
    try:
        agent.image("debian:12", debian_tar())
    except LookupError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    libc = "/home/shop/libc"
    steps = f"useradd --create-home shop && dpkg-query --show libc6 > {libc} && chown shop: {libc}"
    dockerfile = f"FROM debian:12\nRUN {steps}\nUSER shop\nWORKDIR /home/shop\nCMD exec sleep 1000\n"
    commit(agent, {"shop.toml": STATE + 'stop_signal = "SIGKILL"\n', "web/Dockerfile": dockerfile})
    agent.converge(120)
    assert agent.exec("shop/web", "cat", "libc").startswith("libc6")
    assert agent.exec("shop/web", "stat", "--format", "%U %a", "libc", "/usr/bin/passwd").split() == [
        "shop",
        "644",
        "root",
        "4755",
    ]
    assert agent.exec("shop/web", "id", "--user", "--name") == "shop\n"


def behind_the_fence(workshop: Workshop, script: str, **options: Any) -> str:
    """What a shell says that broke out of its step: it is where buildah itself is."""
    with workshop.buildah.alone():
        return "\n".join(workshop.buildah._run(["sh", "-c", f"exec 2>&1; {script}; true"], **options))


def test_what_breaks_out_of_a_step_finds_nothing_of_the_host(workshop: Workshop, tmp_path: Path) -> None:
    secret = workshop.host.root / "secret"
    secret.write_text("host-secret")
    tmp_path.joinpath("open").write_text("for anyone")
    said = behind_the_fence(
        workshop,
        f"cat {secret} {tmp_path}/open /etc/shadow /etc/hostname; ls -d /home /var/lib /sys/fs/cgroup/*; "
        "for each in /proc/[0-9]*; do echo process; done; mount -t cgroup -o memory none /mnt; "
        "mknod /tmp/disk b 254 0; unshare --user true; echo x > /usr/bin/x; mount -o remount,rw /usr; "
        "umount /usr; ls /dev; cat /proc/self/uid_map; dmesg | head -1; nsenter -t 1 -a true && echo entered",
    )
    assert "host-secret" not in said
    assert "for anyone" not in said
    assert "root:" not in said
    assert said.count("process") < 8, "its own processes alone"
    listed = {line for line in said.splitlines() if re.fullmatch(r"\w+", line)} - {"process", "entered"}
    links = {"fd", "ptmx", "stderr", "stdin", "stdout"}
    assert listed <= links | {
        "fd",
        "full",
        "null",
        "ptmx",
        "pts",
        "random",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "tty",
        "urandom",
        "zero",
    }
    for refused in ("mknod: /tmp/disk", "unshare failed", "cannot create /usr/bin/x", "umount: /usr"):
        assert refused in said
    assert str(fence.FIRST_ID) in said
    assert not Path("/usr/bin/x").exists()


def test_root_behind_the_fence_is_nobody_who_owns_anything(workshop: Workshop) -> None:
    with workshop.buildah.alone():
        made = workshop.buildah.work / "made"
        workshop.buildah._run(["sh", "-c", f"touch {made}"])
        assert made.lstat().st_uid == fence.FIRST_ID


@pytest.mark.parametrize("planted", ["storage/overlay-images", "storage/overlay-images/images.json"])
def test_links_that_a_build_leaves_in_its_storage_are_not_followed(workshop: Workshop, planted: str) -> None:
    elsewhere = workshop.host.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "images.json").write_text('[{"id": "x", "names": ["stolen"]}]')
    target = elsewhere if planted.endswith("images") else elsewhere / "images.json"
    link = workshop.buildah.folder / planted
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    assert workshop.buildah.names() == {}


def test_what_is_no_file_is_not_read_out_of_a_build(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/x").symlink_to("/etc/shadow")
    with pytest.raises(WrongState, match=r"'x' is neither a file nor a folder"):
        check_plain(tmp_path)


def test_a_link_of_a_stage_is_mounted_by_no_build(workshop: Workshop) -> None:
    """CVE-2024-1753, as a buildah without its repair would do it: it reaches the fence, and nothing of the host."""
    secret = workshop.host.root / "secret"
    secret.mkdir()
    (secret / "key").write_text("host-secret")
    steal = f"RUN --mount=type=bind,from=stage,source=/link,target=/p,rw cat /p{secret}/key; "
    steal += f"echo x > /p{secret}/new; true\n"
    files = shop(BUSYBOX + "FROM tools AS stage\nRUN ln -s / /link\nFROM tools\n" + steal)
    if not is_safe(buildah_version(Path(shutil.which("buildah") or ""))):
        with pytest.raises(WrongState, match=r"line \d+: RUN --mount: source '/link' in 'stage': .*CVE-2024-1753"):
            workshop.build(files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hazards, "SAFE", (0, 0, 0))  # any buildah counts as one that has the repair
        with suppress(WrongState):
            workshop.build(files)
    assert not (secret / "new").exists()
    log = workshop.host.root / "builds/logs/shop/web.log"
    assert "STEP" in log.read_text()
    assert "host-secret" not in log.read_text()


def test_what_an_image_makes_of_each_dockerfile_is_checked_and_done(workshop: Workshop, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    files = [{"bin": None, "bin/busybox": busybox(), "bin/sh": "busybox"}]
    for name, trigger in (
        ("good", "RUN busybox touch /made"),
        ("bad", "RUN --mount=type=bind,from=good:1,source=../x,target=/p true"),
    ):
        layout.tag(layout.image(files, config={"OnBuild": [trigger]}, history=[{"created_by": "tar"}]), f"{name}:1")
    load_archive(workshop.store, layout.path)
    assert workshop.build(shop("FROM good:1\n")).lookup("/made") is not None
    with pytest.raises(WrongState, match=r"ONBUILD of 'bad:1': RUN --mount: source '\.\./x' leads out of its place"):
        workshop.build(shop("FROM bad:1\n"))


def test_the_id_of_a_cache_leads_nowhere_else(workshop: Workshop) -> None:
    """CVE-2024-9675."""
    step = "RUN --mount=type=cache,target=/c,id=../../../../../../escape echo x > /c/x\n"
    with pytest.raises(WrongState, match=r"line 4: RUN --mount: id '\.\./.*' leads out of its place"):
        workshop.build(shop(BUSYBOX + step))
    image = workshop.build(shop(BUSYBOX + step.replace("../", "") + "RUN echo done > /done\n"))
    assert content(image, "/done") == "done\n"


def test_no_argument_of_a_build_is_in_a_command_line(workshop: Workshop) -> None:
    state = STATE.replace("[containers", 'args = { TOKEN = "s3cret-of-build" }\n[containers')
    step = 'RUN echo begun; [ "$TOKEN" = s3cret-of-build ] && sleep 1000\n'
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(workshop.build, shop(BUSYBOX + "ARG TOKEN\n" + step, state))
        wait_for(lambda: "begun\n" in workshop.log(), "the step runs")
        seen = [line for line in command_lines() if b"s3cret-of-build\0" in line or b"=s3cret-of-build" in line]
        workshop.builder.close()
        with pytest.raises(TryAgain):
            building.result(patient(20))
    assert seen == []


VARIED = BUSYBOX + (
    "RUN cat /proc/sys/kernel/random/uuid > /once\nARG X=none\nENV SHOWN=$X\nLABEL told=$X\nWORKDIR /w-$X\n"
    "COPY a /to-$X\nUSER $X\nEXPOSE 80\n"
)


def test_a_changed_argument_never_gives_what_was_made_with_another(workshop: Workshop) -> None:
    def made(value: str, dockerfile: str = VARIED) -> tuple[Image, tuple[str, ...]]:
        args = f'args = {{ X = "{value}" }}\n[containers'
        image = workshop.build(shop(dockerfile, STATE.replace("[containers", args) if value else STATE, a="1"))
        config = image.config
        shown = next(each for each in config["Env"] if each.startswith("SHOWN="))
        return image, (shown, config["Labels"]["told"], config["WorkingDir"], config["User"])

    once = set()
    for value in ("one", "two", "one"):
        image, said = made(value)
        assert said == (f"SHOWN={value}", value, f"/w-{value}", value)
        assert content(image, f"/to-{value}") == "1"
        once.add(content(image, "/once"))
    assert len(once) == 1, "what no argument changes comes from the cache"
    for default in ("red", "blue"):
        assert made("", VARIED.replace("X=none", f"X={default}"))[1][0] == f"SHOWN={default}"


def test_an_image_that_several_apps_use_at_once_is_pushed_once(workshop: Workshop, registry: Registry) -> None:
    tags = f'tags = ["{registry.address}/web:1"]\npush = true\n'
    files = shop(BUSYBOX, STATE.replace("[containers", f"{tags}[containers"))
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: workshop.build(files).digest, range(4)))
    assert len(set(images)) == 1
    assert len([each for each in registry.requests("manifests/1$") if each.method == "PUT"]) == 1


def test_what_an_app_builds_waits_for_no_other_app(workshop: Workshop) -> None:
    other = {"other.toml": '[images.quick]\ncontext = "./quick"\n[containers.c]\nimage = "images.quick"\n'}
    files = {**other, "quick/Dockerfile": "FROM scratch\nCOPY Dockerfile /\n"}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(workshop.build, shop(BUSYBOX + "RUN echo begun; sleep 1000\n"))
        wait_for(lambda: "begun\n" in workshop.log(), "the step runs")
        workshop.build(files, "other/quick")
        workshop.store.prune()
        assert [workshop.builder.wipe(app) for app in ("other", "shop")] == [True, False], "prune waits for no build"
        assert not slow.done()
        assert [each["image"] for each in workshop.builder.look()] == ["images.shop/web"]
        workshop.builder.close()
        with pytest.raises(TryAgain):
            slow.result(patient(20))


def test_what_is_pruned_while_a_build_waits_is_fetched_once_more(
    workshop: Workshop, registry: Registry, tmp_path: Path
) -> None:
    make_layout(tmp_path / "layout", [{"there": b"1"}], history=[{"created_by": "tar"}])
    digest = registry.push(tmp_path / "layout", "base")
    state = STATE + '[images.next]\ncontext = "./next"\n'
    files = shop(BUSYBOX + "RUN echo begun; sleep 1000\n", state)
    files["next/Dockerfile"] = f"FROM {registry.address}/base@{digest}\nCOPY Dockerfile /\n"
    files["shop.toml"] = state + '[containers.next]\nimage = "images.next"\n'
    with ThreadPoolExecutor(2) as pool, closing(workshop.builder):
        slow = pool.submit(workshop.build, files)
        wait_for(lambda: "begun\n" in workshop.log(), "the step runs")
        following = pool.submit(workshop.build, files, "shop/next")
        wait_for(lambda: digest in workshop.store.digests(), "what it starts from is here")
        workshop.store.prune()
        assert digest not in workshop.store.digests()
        assert workshop.buildah._process is not None
        workshop.buildah._process.terminate()
        with pytest.raises(WrongState):
            slow.result(patient(20))
        assert following.result(patient(60)).lookup("/there") is not None


def test_no_more_builds_run_at_a_time_than_the_settings_say(workshop: Workshop) -> None:
    workshop.builder.builds = BuildSettings(concurrency=1)
    other = {"other.toml": '[images.quick]\ncontext = "./quick"\n[containers.c]\nimage = "images.quick"\n'}
    files = {**other, "quick/Dockerfile": "FROM scratch\nCOPY Dockerfile /\n"}
    with ThreadPoolExecutor(2) as pool, closing(workshop.builder):
        slow = pool.submit(workshop.build, shop(BUSYBOX + "RUN echo begun; sleep 1000\n"))
        wait_for(lambda: "begun\n" in workshop.log(), "the step runs")
        quick = pool.submit(workshop.build, files, "other/quick")
        wait_for(lambda: bool(workshop.builder._turn_ends._waiters), "the second waits for its turn")  # type: ignore[attr-defined]
        assert [each["image"] for each in workshop.builder.look()] == ["images.shop/web"]
        assert workshop.buildah._process is not None
        workshop.buildah._process.terminate()
        with pytest.raises(WrongState):
            slow.result(patient(20))
        assert quick.result(patient(60)).layers
    told = [(kind, subject) for kind, subject, message in workshop.told if not message.startswith("built in")]
    assert told == [("build", "image shop/web"), ("failed", "image shop/web"), ("build", "image other/quick")]


@pytest.mark.timeout(400)
def test_a_build_is_held_to_its_limits_and_says_which_it_ran_into(agent: LiveAgent) -> None:
    agent.configure(more='[builds]\nmemory = "256MiB"\npids = 64\n')
    agent.restart()
    swell = "RUN tail /dev/zero\n"
    commit(agent, shop(BUSYBOX + swell))
    agent.sync()
    agent.wait(lambda: bool(failures(agent)), "the build fails", 120)
    assert "more than the 256 MiB of memory that a build may use" in failures(agent)[0]
    bomb = "RUN f() { f & f; }; i=0; while [ $i -lt 200 ]; do i=$((i+1)); sleep 100 & done; wait\n"
    commit(agent, {"web/Dockerfile": BUSYBOX + bomb})
    agent.sync()
    agent.wait(lambda: "RUN f()" in failures(agent)[-1], "the build fails", 120)
    assert "more than the 64 processes of a build" in failures(agent)[-1]
    commit(agent, {"web/Dockerfile": DOCKERFILE, "web/serve": SERVE})
    agent.converge(120)


def test_a_build_has_a_cgroup_of_the_agents_that_keeps_devices_from_it_and_goes(agent: LiveAgent) -> None:
    above = f"{agent.host.cgroup}-build"
    agent.configure(more='[builds]\nmemory = "256MiB"\npids = 64\n')
    agent.restart()
    commit(agent, shop(BUSYBOX + "RUN sleep 1000\n"))
    agent.sync()
    wait_for(lambda: any(b"sleep\x001000" in command_line(pid) for pid in cgroup.pids(above)), "the step runs there")
    (name,) = cgroup.children(cgroup.folder("pids", above))
    held = cgroup.snapshot(f"{above}/{name}")
    assert held["pids.max"] == "64"
    assert held["memory.max" if cgroup.version() == 2 else "memory.limit_in_bytes"] == str(256 << 20)
    assert held.get("memory.swap.max", "0") == "0"
    assert held.get("memory.memsw.limit_in_bytes", str(256 << 20)) == str(256 << 20)
    words = "for each in null zero urandom kmsg loop-control; do (exec </dev/$each && echo $each); done 2>&1"
    inside = f"echo 0 > {cgroup.folder('devices', f'{above}/{name}/cgroup.procs')} && {words}"
    said = subprocess.run(
        ["sh", "-c", inside], check=False, capture_output=True, text=True, timeout=patient(60)
    ).stdout
    assert said.splitlines()[:3] == ["null", "zero", "urandom"]
    assert re.search(r"/dev/kmsg: Operation not permitted\n.*/dev/loop-control: Operation not permitted$", said), said
    for pid in cgroup.pids(above):
        if b"sleep" in command_line(pid):
            os.kill(pid, signal.SIGKILL)
    agent.wait(lambda: bool(failures(agent)), "the build fails")
    wait_for(lambda: not cgroup.folders(above), "its cgroup goes")
    assert delegation.keeps(agent.host)
    agent.stop()
    assert not delegation.used(agent.host)


def listens(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


@pytest.mark.timeout(400)
def test_a_build_has_a_network_of_its_own_that_leads_out(agent: LiveAgent, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("from far away\n")
    octet = agent.host.pool.split(".")[1]
    with ExitStack() as stack:
        island = make_island(stack, f"i{agent.host.name}", f"10.{octet}.255.1", f"10.{octet}.255.2")
        serve = ("ip", "netns", "exec", island.namespace, "busybox", "httpd", "-f", "-p", "80", "-h", str(tmp_path))
        server = subprocess.Popen(serve)
        stack.callback(server.wait)
        stack.callback(server.kill)
        wait_for(lambda: listens(island.address, 80), "the server listens")
        with socket.create_server(("127.0.0.1", 0)) as own:
            port = own.getsockname()[1]
            steps = f"RUN ip link > /links; wget -O /page http://{island.address}/index.html\n"
            steps += f"RUN ! nc -w 1 127.0.0.1 {port} </dev/null\n"
            commit(agent, shop(BUSYBOX + steps + "COPY serve /serve\nCMD /serve\n", serve=SERVE + "", version="x"))
            agent.converge(120)
    assert agent.exec("shop/web", "cat", "/page") == "from far away\n"
    links = agent.exec("shop/web", "cat", "/links")
    assert "eth0" in links
    assert f"{agent.host.name}-" not in links
    wait_for(lambda: not cgroup.folders(f"{agent.host.cgroup}-build"), "its cgroup goes")


def test_what_may_not_be_built_is_not_built(agent: LiveAgent) -> None:
    agent.configure(more='[policy]\nforbid = ["builds"]\n')
    agent.restart()
    commit(agent, shop(BUSYBOX))
    agent.sync()
    agent.wait(lambda: "forbidden by the rule 'builds'" in str(agent.status()), "it is told")
    assert not agent.host.root.joinpath("builds/logs").exists()
