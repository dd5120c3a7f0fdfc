"""[images.*] built by the real buildah, on images made of busybox."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from ground import Rootfs, patient, wait_for
from holdfast.config import BuildSettings, ImageSettings
from holdfast.drivers import Host
from holdfast.errors import HoldfastError, TryAgain, UnfitHost, WrongState
from holdfast.images.builds import buildlog
from holdfast.images.formats.manifests import architecture
from holdfast.images.incoming.load import import_rootfs
from holdfast.images.incoming.pull import Puller
from holdfast.images.kept.image import Image
from layouts import make_layout
from live.registry import Registry
from live.workshop import BUSYBOX, STATE, Workshop, busybox, content, read, shop

pytestmark = pytest.mark.live


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
    named = rf"^build 'images.shop/web': pull '{registry.address}/nothing:1': .*404"
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
        wait_for(lambda: bool(workshop.builder._ended._waiters), "the second waits for its turn")  # type: ignore[attr-defined]
        assert [each["image"] for each in workshop.builder.look()] == ["images.shop/web"]
        assert workshop.buildah._process is not None
        workshop.buildah._process.terminate()
        with pytest.raises(WrongState):
            slow.result(patient(20))
        assert quick.result(patient(60)).layers
    told = [(kind, subject) for kind, subject, message in workshop.told if not message.startswith("built in")]
    assert told == [("build", "image shop/web"), ("failed", "image shop/web"), ("build", "image other/quick")]
