"""Registries that are down, slow, hostile or broken: one clear line each, its class, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from holdfast.drivers import Host
from holdfast.errors import HoldfastError, NotFound, Throttled, TryAgain, UnfitHost, Unreachable, WrongState
from holdfast.images.incoming.pull import Puller
from holdfast.node.images import ImageAnswers
from image_node import image_node
from layouts import INDEX, MANIFEST, Layout, digest_of, make_layout
from live.conftest import QUICK
from live.faulty import Answer, FaultyRegistry, error
from live.processes import children, command_line
from live.registry import Authority, Registry, make_island

pytestmark = pytest.mark.live

HASTY = QUICK.model_copy(update={"stall_timeout": 3.0})
LAYERS = [{"one": os.urandom(20_000)}, {"two": os.urandom(30_000)}]


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyRegistry]:
    """Serves an image of two layers as `app`, properly until it is told otherwise."""
    make_layout(tmp_path / "layout", LAYERS)
    registry = FaultyRegistry(tmp_path / "layout")
    yield registry
    registry.close()


@pytest.fixture
def puller(new_puller: Callable[..., Puller]) -> Puller:
    """A puller that gives up soon, with an empty store."""
    return new_puller(HASTY)


def skopeos() -> list[bytes]:
    """skopeo's processes that this one has started and that still run."""
    return [line for line in map(command_line, children(os.getpid())) if b"skopeo" in line]


def fails(puller: Puller, ref: str, kind: type[HoldfastError], words: str, wait: float = 0.0) -> HoldfastError:
    """A pull fails with one line that has the reference, the words and no chain of Go's, and leaves nothing."""
    with pytest.raises(HoldfastError) as caught:
        puller.pull(ref)
    problem = caught.value
    text = str(problem)
    assert words in text
    assert text.startswith(f"pull '{ref}': ")
    assert "\n" not in text and len(text) < 500
    assert not re.search(r"level=|time=|Error parsing|dial tcp|Get \\?\"", text), text
    assert type(problem) is kind
    assert problem.retry and problem.wait == wait
    assert {path.suffix for path in puller.store.partial.iterdir()} <= {".lock"}
    assert puller.store.list(dangling=True) == []
    assert not skopeos()
    return problem


@dataclass(frozen=True)
class Case:
    """path: of the requests that get the answer."""

    path: str
    answer: Answer
    kind: type[HoldfastError]
    words: str
    wait: float = 0.0


UNAUTHORIZED = Answer(
    401, error("UNAUTHORIZED", "authentication required"), {"WWW-Authenticate": 'Basic realm="test"'}
)
PAGE = Answer(200, b"<!DOCTYPE html><html>Please log in</html>", {"Content-Type": "text/html"})
BUSY = Answer(429, error("TOOMANYREQUESTS", "slow down"), {"Retry-After": "30"})
BLOBS = r"/blobs/"
LAYER = "/blobs/" + digest_of(b"")  # stands for the second layer's

CASES = {
    "401": Case("", UNAUTHORIZED, UnfitHost, "(401: `skopeo login`", 60),
    "401 for the image alone": Case("manifests", UNAUTHORIZED, UnfitHost, "(401: `skopeo login`", 60),
    "403": Case("manifests", Answer(403, error("DENIED", "access denied")), UnfitHost, "(403)", 60),
    "404": Case("manifests", Answer(404, error("MANIFEST_UNKNOWN", "x")), NotFound, "(404: ", 60),
    "404 without words": Case("manifests", Answer(404, b"gone"), NotFound, "(404: ", 60),
    "429": Case("manifests", BUSY, Throttled, "(429)", 30),
    "429 without a time": Case("manifests", replace(BUSY, headers={}), Throttled, "(429)", 60),
    "429 for a blob": Case(BLOBS, BUSY, Throttled, "(429)", 60),
    "500": Case("manifests", Answer(500, b"oh"), TryAgain, "500 Internal Server Error"),
    "503": Case("manifests", Answer(503, PAGE.body), TryAgain, "503 Service Unavailable"),
    "500 for a blob": Case(BLOBS, Answer(500, b"oh"), TryAgain, "500"),
    "404 for a blob": Case(BLOBS, Answer(404, error("BLOB_UNKNOWN", "x")), NotFound, "(404: ", 60),
    "403 for a blob": Case(BLOBS, Answer(403, b"<Error>Denied</Error>"), UnfitHost, "(403)", 60),
    "a page for the manifest": Case("manifests", PAGE, WrongState, "sent a web page (expected a manifest)", 300),
    "a page for everything": Case("", PAGE, WrongState, "sent a web page", 300),
    "an error page": Case("manifests", replace(PAGE, status=404), NotFound, "(404: ", 60),
    "a page for a blob": Case(BLOBS, PAGE, WrongState, "", 300),
    "silence": Case("manifests", Answer(mute=True), Unreachable, "does not answer"),
    "a hang": Case("manifests", Answer(length=100, hang=True), Unreachable, "does not answer"),
    "a hang at the door": Case("/v2/$", Answer(mute=True), Unreachable, "does not answer"),
    "a hang for a blob": Case(BLOBS, Answer(length=30_000, hang=True), Unreachable, "does not answer"),
    "a redirect to a dead host": Case(
        BLOBS, Answer(307, headers={"Location": "http://127.0.0.1:1/blob"}), Unreachable, "connection refused"
    ),
    "a redirect to an unknown host": Case(
        BLOBS,
        Answer(307, headers={"Location": "http://no.such.host.invalid/blob"}),
        Unreachable,
        "lookup no.such.host.invalid",
    ),
    "redirects for ever": Case(
        BLOBS, Answer(307, headers={"Location": "/v2/app/blobs/x"}), TryAgain, "redirects", 60
    ),
    "not JSON": Case("manifests", Answer(200, b"\x00\x01"), WrongState, "nothing that is JSON", 300),
    "no manifest": Case("manifests", Answer(200, b"[]"), WrongState, "JSON that is no manifest", 300),
    "an empty manifest": Case("manifests", Answer(200, b"{}"), WrongState, "it is no image", 300),
}


@pytest.mark.parametrize("name", CASES)
def test_a_registry_that_fails_gets_one_clear_line(name: str, faulty: FaultyRegistry, puller: Puller) -> None:
    case = CASES[name]
    faulty.answer(case.path, case.answer)
    fails(puller, f"{faulty.address}/app", case.kind, case.words, case.wait)


def schema1(layout: Layout) -> bytes:
    return json.dumps({"schemaVersion": 1, "name": "app", "tag": "latest", "fsLayers": [], "history": []}).encode()


def index_of(*platforms: str) -> Callable[[Layout], bytes]:
    def make(layout: Layout) -> bytes:
        entries = []
        for platform in platforms:
            system, machine = platform.split("/")
            entries.append(
                {"mediaType": MANIFEST, "digest": digest_of(b""), "size": 1,
                 "platform": {"os": system, "architecture": machine}}
            )  # fmt: skip
        return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()

    return make


def altered(**changes: object) -> Callable[[Layout], bytes]:
    def make(layout: Layout) -> bytes:
        return json.dumps({**layout.json(layout.find()["digest"]), **changes}).encode()

    return make


def first_layer(**changes: object) -> Callable[[Layout], bytes]:
    def make(layout: Layout) -> bytes:
        document = layout.json(layout.find()["digest"])
        document["layers"][0].update(changes)
        return json.dumps(document).encode()

    return make


def other_machine(layout: Layout) -> bytes:
    return layout.read(layout.image(LAYERS, architecture="s390x")["digest"])


def one_diff_id_less(layout: Layout) -> bytes:
    document = layout.json(layout.find()["digest"])
    config = layout.json(document["config"]["digest"])
    config["rootfs"]["diff_ids"].pop()
    return json.dumps({**document, "config": layout.blob(json.dumps(config).encode())}).encode()


def wrong_diff_id(layout: Layout) -> bytes:
    document = layout.json(layout.find()["digest"])
    config = layout.json(document["config"]["digest"])
    config["rootfs"]["diff_ids"][0] = digest_of(b"something else")
    return json.dumps({**document, "config": layout.blob(json.dumps(config).encode())}).encode()


def another_config_size(layout: Layout) -> bytes:
    document = layout.json(layout.find()["digest"])
    return json.dumps({**document, "config": {**document["config"], "size": 3}}).encode()


HELM = {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": digest_of(b""), "size": 1}

MANIFESTS: dict[str, tuple[Callable[[Layout], bytes], str]] = {
    "schema 1": (schema1, "its manifest is of schema 1"),
    "an empty index": (index_of(), "its index is empty"),
    "an index of others": (index_of("linux/s390x", "windows/amd64"), "(it has linux/s390x, windows/amd64)"),
    "an index of attestations": (index_of("unknown/unknown"), "(it has none at all)"),
    "another machine's image": (other_machine, "the image is for linux/s390x"),
    "an artifact": (altered(config=HELM), "an artifact (application/vnd.cncf.helm.config.v1+json)"),
    "a negative size": (first_layer(size=-1), "'-1' is no size"),
    "a size that lies": (first_layer(size=17), "expected 17 bytes in blob"),
    "a size of its configuration that lies": (another_config_size, "expected 3 bytes in blob"),
    "a digest of another kind": (first_layer(digest="sha1:da39"), "its manifest names 'sha1:da39'"),
    "no layers": (altered(layers=None), "it has no layers"),
    "one diff id too few": (one_diff_id_less, "it has 2 layers, and 1 diff ids for them"),
    "another layer's diff id": (wrong_diff_id, "diff id"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_image_that_is_none_for_this_host_is_refused(name: str, faulty: FaultyRegistry, puller: Puller) -> None:
    make, words = MANIFESTS[name]
    assert faulty.layout
    faulty.answer("/manifests/", Answer(200, make(faulty.layout), {"Content-Type": MANIFEST}))
    ref = f"{faulty.address}/app"
    problem = None
    with pytest.raises(HoldfastError):
        remote = puller.resolve(ref)
        digest = remote.digest
        faulty.answer(digest, Answer(200, remote.manifest, {"Content-Type": MANIFEST}))
        puller.pull(ref, remote)
    problem = fails(puller, ref, WrongState, words, 300)
    assert problem.exit_code == 65


def layer_digest(faulty: FaultyRegistry) -> str:
    assert faulty.layout
    return str(faulty.layout.json(faulty.layout.find()["digest"])["layers"][1]["digest"])


def test_a_layer_that_breaks_off_is_fetched_again_and_then_given_up(faulty: FaultyRegistry, puller: Puller) -> None:
    assert faulty.layout
    digest = layer_digest(faulty)
    body = faulty.layout.read(digest)
    ref = f"{faulty.address}/app"
    faulty.answer(digest, Answer(200, body[:1000], length=len(body)))
    fails(puller, ref, TryAgain, "")
    assert faulty.asked(digest) == 3
    faulty.mend()
    faulty.answer(digest, Answer(200, body[:1000], length=len(body), times=1))
    assert len(puller.pull(ref).layers) == 2
    assert faulty.asked(digest) == 5
    other = [path for path in faulty.paths if "/blobs/" in path and digest not in path]
    assert len(other) == len(set(other)) + 1, "only the configuration is fetched twice"


def test_a_layer_that_stops_coming_is_asked_for_again_and_then_given_up(
    faulty: FaultyRegistry, new_puller: Callable[..., Puller]
) -> None:
    assert faulty.layout
    digest = layer_digest(faulty)
    body = faulty.layout.read(digest)
    faulty.answer(digest, Answer(200, body[:1000], length=len(body), hang=True))
    puller = new_puller(QUICK.model_copy(update={"stall_timeout": 1.5}))
    fails(puller, f"{faulty.address}/app", TryAgain, "1.5 s")
    assert faulty.asked(digest) == 3


def test_a_layer_with_another_content_is_refused(faulty: FaultyRegistry, puller: Puller) -> None:
    assert faulty.layout
    digest = layer_digest(faulty)
    body = faulty.layout.read(digest)
    faulty.answer(digest, Answer(200, body[:-4] + b"\x00\x01\x02\x03"))
    fails(puller, f"{faulty.address}/app", WrongState, "", 300)
    assert faulty.asked(digest) == 1, "what is damaged is not asked for again at once"


def test_a_manifest_of_another_digest_is_refused(faulty: FaultyRegistry, puller: Puller) -> None:
    ref = f"{faulty.address}/app@{digest_of(b'another')}"
    assert faulty.layout
    body = faulty.layout.read(faulty.layout.find()["digest"])
    faulty.answer("/manifests/", Answer(200, body, {"Content-Type": MANIFEST}))
    fails(puller, ref, WrongState, "", 300)


def test_blobs_are_followed_to_where_a_redirect_leads(faulty: FaultyRegistry, puller: Puller, tmp_path: Path) -> None:
    elsewhere = FaultyRegistry(tmp_path / "layout")
    try:
        for layer in faulty.layout.json(faulty.layout.find()["digest"])["layers"]:  # type: ignore[union-attr]
            place = f"http://{elsewhere.address}/bucket/{layer['digest']}"
            faulty.answer(f"blobs/{layer['digest']}", Answer(307, headers={"Location": place}))
        assert len(puller.pull(f"{faulty.address}/app").layers) == 2
        assert elsewhere.asked("/bucket/") == 2
    finally:
        elsewhere.close()


def test_a_slow_registry_is_waited_for_as_long_as_bytes_come(faulty: FaultyRegistry, puller: Puller) -> None:
    assert faulty.layout
    digest = layer_digest(faulty)
    faulty.answer(digest, Answer(200, faulty.layout.read(digest), drip=200))
    assert len(puller.pull(f"{faulty.address}/app").layers) == 2


def test_a_registry_that_is_down_and_a_name_that_is_none_are_told_apart(
    puller: Puller, free_port: Callable[[], int]
) -> None:
    fails(puller, f"127.0.0.1:{free_port()}/app", Unreachable, "connect: connection refused")
    fails(puller, "no.such.registry.invalid/app:1", Unreachable, "lookup no.such.registry.invalid")


def test_an_offline_node_asks_no_registry(faulty: FaultyRegistry, new_puller: Callable[..., Puller]) -> None:
    puller = new_puller(QUICK.model_copy(update={"offline": True}))
    fails(puller, f"{faulty.address}/app", UnfitHost, "this node is offline")
    assert not faulty.paths


def test_without_skopeo_its_package_is_named(
    faulty: FaultyRegistry, puller: Puller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnfitHost, match="expected the package skopeo"):
        puller.pull(f"{faulty.address}/app")


def login_file(path: Path, address: str, login: str) -> Path:
    import base64

    auth = base64.b64encode(login.encode()).decode()
    path.write_text(json.dumps({"auths": {address: {"auth": auth}}}))
    return path


def test_certificates_and_passwords_are_checked(
    site: Host, tmp_path: Path, new_registry: Callable[..., Registry], new_puller: Callable[..., Puller],
    monkeypatch: pytest.MonkeyPatch, mounts_alone: None,
) -> None:  # fmt: skip
    """A registry at an address that is not loopback's, where Docker and we insist on TLS."""
    net = site.pool.split("/")[0].rpartition(".")[0]
    with ExitStack() as stack:
        island = make_island(stack, site.name, f"{net}.1", f"{net}.2")
        authority = Authority(tmp_path / "ca")
        there = {"host": island.address, "namespace": island.namespace}
        proper = new_registry(**there, authority=authority, login=("user", "secret"))
        expired = new_registry(**there, authority=authority, expired=True)
        plain = new_registry(**there)
        make_layout(tmp_path / "layout", LAYERS)
        proper.push(tmp_path / "layout", "app")
        ref = f"{proper.address}/app"
        fails(new_puller(), ref, UnfitHost, "certificate signed by unknown authority", 60)
        fails(new_puller(), f"{plain.address}/app", UnfitHost, "server gave HTTP response to HTTPS client", 60)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        fails(new_puller(), f"{expired.address}/app", UnfitHost, "certificate has expired", 60)
        fails(new_puller(), ref, UnfitHost, "(401: `skopeo login`", 60)
        wrong = login_file(tmp_path / "wrong.json", proper.address, "user:guess")
        fails(new_puller(QUICK.model_copy(update={"authfile": wrong})), ref, UnfitHost, "(401: `skopeo login`", 60)
        right = login_file(tmp_path / "right.json", proper.address, "user:secret")
        assert len(new_puller(QUICK.model_copy(update={"authfile": right})).pull(ref).layers) == 2
        (tmp_path / ".docker").mkdir()
        right.rename(tmp_path / ".docker/config.json")  # one of the places where all containers tools look
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert len(new_puller(root=tmp_path / "other").pull(ref).layers) == 2
        for each in (proper, expired, plain):
            each.close()


@pytest.fixture
def small_disk(tmp_path: Path, mounts_alone: None) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_known_before_the_first_byte(
    registry: Registry, small_disk: Path, tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    make_layout(tmp_path / "layout", [{"large": os.urandom(3 << 20)}])
    registry.push(tmp_path / "layout", "app")
    before = len(registry.requests("/blobs/"))
    fails(new_puller(root=small_disk), f"{registry.address}/app", UnfitHost, "9MiB needed", 60)
    assert len(registry.requests("/blobs/")) <= before + 1, "only the configuration"


def test_a_disk_that_fills_up_under_way_is_said_and_left_clean(
    registry: Registry, small_disk: Path, tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    make_layout(tmp_path / "layout", [{f"zeros-{number}": b"\1" * (1 << 20) for number in range(8)}])
    registry.push(tmp_path / "layout", "app")
    fails(new_puller(root=small_disk), f"{registry.address}/app", UnfitHost, "o space left", 60)


def test_a_pull_by_hand_is_shown_while_it_waits_and_told_of_when_it_fails(
    faulty: FaultyRegistry, tmp_path: Path
) -> None:
    ref = f"{faulty.address}/app"
    faulty.answer("manifests", Answer(mute=True))
    with image_node(tmp_path, QUICK.model_copy(update={"stall_timeout": 2.0})) as context:
        steps = ImageAnswers(context).pull_image(ref)
        shown = next(step["transfers"] for step in steps if step["transfers"])
        assert [(each["ref"], each["state"]) for each in shown] == [(ref, "resolving")]
        with pytest.raises(Unreachable) as raised:
            list(steps)
        told = [(event["kind"], event["subject"], event["message"]) for event in context.store.events()]
    assert told == [("failed", ref, str(raised.value))]


def test_a_name_without_a_tag_says_which_one_was_asked_for(faulty: FaultyRegistry, puller: Puller) -> None:
    faulty.answer("manifests", Answer(404, error("MANIFEST_UNKNOWN", "x")))
    absent = "(404: the registry does not have it)"
    for name, end in {
        "app": f"{absent} as ':latest', for no tag is written (expected {faulty.address}/app:TAG)",
        "app:latest": absent,
        f"app@sha256:{'0' * 64}": absent,
    }.items():
        with pytest.raises(NotFound) as raised:
            puller.resolve(f"{faulty.address}/{name}")
        assert str(raised.value).endswith(end)
        assert raised.value.wait == 60.0
