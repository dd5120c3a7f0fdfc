"""[images.*] built by the real buildah, on images made of busybox."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from footprint import leftovers
from ground import Rootfs
from holdfast.config import ImageSettings
from holdfast.drivers import Host
from holdfast.errors import HoldfastError, TryAgain, UnfitHost, WrongState
from holdfast.images import buildah
from holdfast.images.build import Builder
from holdfast.images.image import Image, architecture
from holdfast.images.pull import Puller
from holdfast.images.store import ImageStore
from holdfast.runtime.binaries import find_runtime
from holdfast.spec import NodeFacts, Spec, load
from layouts import make_layout
from live.agent import HOLDFAST, LiveAgent
from live.debian import debian_tar
from live.registry import Registry

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
        self.store = ImageStore(host.root / "images", settings)
        self.pushed: list[tuple[str, str]] = []
        self.builder = Builder(self.store, settings, host, find_runtime().path, self.tell, self.push)

    def push(self, image: Image, name: str) -> None:
        self.pushed.append((image.digest, name))

    def tell(self, kind: str, subject: str, message: str, **_: object) -> None:
        self.told.append((kind, subject, message))

    def steps(self, name: str = "shop/web") -> list[str]:
        """What buildah said that it does for an image."""
        return [message for _, subject, message in self.told if subject == f"image {name}" and "STEP" in message]

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


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


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

    workshop.builder.buildah.wipe()  # what the cache has lost is taken from the store, and not built again
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
    base = workshop.store.import_rootfs(busybox_rootfs.tar, "ground:1", ["ENV A=b"])
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
        BUSYBOX + f"RUN {noise}; printf '\\033[31mred\\033[0m\\r\\n'; echo the compiler is angry >&2; exit 3\n"
    )
    with pytest.raises(WrongState) as caught:
        workshop.build(files)
    log = workshop.host.root / "builds/logs/shop/web.log"
    assert str(caught.value).startswith("build 'images.shop/web': RUN i=0; while")
    assert str(caught.value).endswith(f"…: exit status 3: the compiler is angry (all of it is in {log})")
    assert "\n" not in str(caught.value)
    assert (caught.value.retry, caught.value.wait) == (True, 60)
    assert log.read_text().count("\nline ") == 300
    assert "\nred\n" in log.read_text()
    assert len(workshop.told) < 100, "a chatty build does not drown the events"
    with pytest.raises(WrongState):
        workshop.build(files)
    assert log.with_name("web.log.1").read_text().count("\nline ") == 300


def test_what_an_earlier_step_complained_of_is_no_reason(workshop: Workshop) -> None:
    with pytest.raises(WrongState, match=r": RUN exit 3: exit status 3 \(all"):
        workshop.build(shop(BUSYBOX + "RUN echo careful >&2\nRUN exit 3\n"))


def test_what_lacks_in_the_context_is_named(workshop: Workshop) -> None:
    with pytest.raises(WrongState, match=r": COPY key /: 'key' is not in the context \(or .dockerignore"):
        workshop.build(shop("FROM scratch\nCOPY key /\n", key="x", **{".dockerignore": "key\n"}))


def test_nothing_is_built_where_too_little_is_free(site: Host) -> None:
    workshop = Workshop(site, ImageSettings(min_free=1 << 62))
    with pytest.raises(UnfitHost, match=r"^build 'images.shop/web': not enough space in '/.*min_free"):
        workshop.build(shop(BUSYBOX))
    assert workshop.told == []


def test_a_runtime_that_refuses_is_named_with_its_reason(workshop: Workshop) -> None:
    runtime = workshop.host.root / "moody"
    runtime.write_text("#!/bin/sh\necho no cgroup today >&2\nexit 1\n")
    runtime.chmod(0o755)
    workshop.builder.buildah.runtime = runtime
    with pytest.raises(WrongState, match=r"RUN .*: exit status 1: moody: no cgroup today"):
        workshop.build(shop(BUSYBOX))


def test_an_image_that_no_registry_has_is_told_by_its_name(workshop: Workshop, registry: Registry) -> None:
    named = rf"^build 'images.shop/web': FROM {registry.address}/nothing:1: .*404.* \(all of it is in /"
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
    with workshop.builder.buildah.alone():
        iid = tmp_path / "iid"
        shutil.copytree(tmp_path / "web", workshop.builder.buildah.work / "web")
        workshop.builder.buildah.build(["--iidfile", str(iid), str(workshop.builder.buildah.work / "web")], print)
        layer = workshop.builder.buildah.storage / "overlay"
        theirs = {str(p.relative_to(top)) for top in layer.glob("*/diff/all") for p in top.rglob("*") if p.is_file()}
    image = workshop.build({"shop.toml": STATE, **{f"web/{path}": text for path, text in files.items()}})
    top = image.layers[-1] / "all"
    assert {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()} == theirs


def test_what_is_pushed_is_in_the_registry_by_every_tag(
    workshop: Workshop, registry: Registry, new_puller: Callable[..., Puller]
) -> None:
    tags = f'tags = ["{registry.address}/shop/web:1", "{registry.address}/shop/web:2"]\npush = true\n'
    workshop.builder.push = Puller(workshop.store, ImageSettings()).push
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
    workshop.builder.push = Puller(workshop.store, ImageSettings()).push
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
    assert workshop.builder.buildah.names()
    workshop.store.remove(image.digest)
    workshop.builder.sweep()
    assert not workshop.builder.buildah.storage.exists()


def test_a_cache_that_grew_too_large_goes_and_the_next_build_starts_afresh(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buildah, "CACHE_LIMIT", 1000)
    dockerfile = BUSYBOX + "RUN cat /proc/sys/kernel/random/uuid > /once\nCOPY a /a\n"
    before = workshop.build(shop(dockerfile, a="1"))
    assert workshop.builder.buildah.size() == 0
    after = workshop.build(shop(dockerfile, a="2"))
    assert content(before, "/once") != content(after, "/once")


def test_what_lies_in_the_cache_after_a_crash_of_the_host_is_not_trusted(workshop: Workshop) -> None:
    dockerfile = BUSYBOX + "RUN cat /proc/sys/kernel/random/uuid > /once\nCOPY a /a\n"
    before = workshop.build(shop(dockerfile, a="1"))
    (workshop.host.root / "builds/open").write_text("another boot")
    after = workshop.build(shop(dockerfile, a="2"))
    assert content(before, "/once") != content(after, "/once")


def test_closing_ends_a_build_at_once(workshop: Workshop) -> None:
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(workshop.build, shop(BUSYBOX + "RUN echo begun; sleep 1000\n"))
        wait_until(lambda: any("begun" in message for *_, message in workshop.told), "the step runs")
        workshop.builder.close()
        with pytest.raises(TryAgain, match="stopping"):
            building.result(10)


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
    agent.converge()
    assert agent.exec("shop/web", "cat", "/version") == "one\n"
    messages = [event["message"] for event in agent.events() if event["subject"] == "image shop/web"]
    assert any("STEP 5/6: RUN echo one" in message for message in messages)
    assert "the version is made" in messages
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


def test_a_build_that_is_killed_with_its_agent_leaves_nothing(agent: LiveAgent) -> None:
    commit(agent, shop(BUSYBOX + "RUN echo begun; sleep 1000\n", slow="x"))
    agent.sync()
    agent.wait(lambda: any("begun" in event["message"] for event in agent.events()), "the step runs")
    wait_until(lambda: any("sleep 1000" in line for line in leftovers(agent.host)), "the step runs")
    agent.kill()
    held = ("process", "mount", "netns")
    wait_until(lambda: not any(line.startswith(held) for line in leftovers(agent.host)), "all is over")
    commit(agent, {"web/Dockerfile": DOCKERFILE, "web/serve": SERVE})
    agent.start()
    agent.converge()
    assert agent.exec("shop/web", "cat", "/version") == "one\n"
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{agent.host.name}-build"))


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
