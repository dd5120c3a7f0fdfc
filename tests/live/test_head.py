"""Newer images are asked for with HEAD, once for all containers, and no more often than the registry wants."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ground import Rootfs
from holdfast.config import ImageSettings
from holdfast.errors import TryAgain
from holdfast.images.pull import Puller
from layouts import Layout
from live.agent import LiveAgent
from live.registry import NewRegistry, Registry

pytestmark = pytest.mark.live

DIGEST = f"sha256:{'a' * 64}"


class Counter(ThreadingHTTPServer):
    """A registry with one image for who has a token, and what it was asked. answer: status and headers instead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.answer: tuple[int, dict[str, str]] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Counter

    def do_HEAD(self) -> None:
        self.server.asked.append((self.command, self.path))
        if self.server.answer:
            self.say(*self.server.answer)
        elif self.headers.get("Authorization") != "Bearer good":
            challenge = (
                f'Bearer realm="http://{self.server.address}/token",service="here",scope="repository:app:pull"'
            )
            self.say(401, {"WWW-Authenticate": challenge})
        else:
            self.say(200, {"Docker-Content-Digest": DIGEST})

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path))
        login = self.headers.get("Authorization") == f"Basic {b64encode(b'ada:secret').decode()}"
        self.say(200 if login else 401, {}, json.dumps({"token": "good"}).encode())

    def say(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def counter() -> Iterator[Counter]:
    with Counter() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def authfile(folder: Path, address: str, login: str) -> Path:
    path = folder / "auth.json"
    path.write_text(json.dumps({"auths": {address: {"auth": b64encode(login.encode()).decode()}}}))
    return path


def test_a_registry_is_asked_with_a_token_that_a_login_gets(
    counter: Counter, tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    auth = authfile(tmp_path, counter.address, "ada:secret")
    assert new_puller(ImageSettings(authfile=auth)).head(f"{counter.address}/app:1") == DIGEST
    token = "/token?service=here&scope=repository%3Aapp%3Apull"
    assert counter.asked == [("HEAD", "/v2/app/manifests/1"), ("GET", token), ("HEAD", "/v2/app/manifests/1")]
    wrong = authfile(tmp_path, counter.address, "ada:wrong")
    assert new_puller(ImageSettings(authfile=wrong)).head(f"{counter.address}/app:1") == ""


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {"Retry-After": "1000"}, 1000),
        (429, {}, 60),
        (200, {"Docker-Content-Digest": DIGEST, "RateLimit-Remaining": "0;w=21600"}, 21600),
    ],
)
def test_a_registry_that_has_had_enough_is_left_alone(
    counter: Counter, status: int, headers: dict[str, str], wait: int, new_puller: Callable[..., Puller]
) -> None:
    puller = new_puller()
    counter.answer = (status, headers)
    if status == 200:
        assert puller.head(f"{counter.address}/app:1") == DIGEST
    for name in ("app:1", "other:2"):
        with pytest.raises(TryAgain, match="it wants to be left alone") as caught:
            puller.head(f"{counter.address}/{name}")
        assert wait - 30 < caught.value.wait <= wait
    assert len(counter.asked) == 1


@pytest.mark.parametrize("login", [None, ("ada", "secret")])
def test_a_real_registry_tells_with_head_what_a_tag_leads_to(
    login: tuple[str, str] | None, tmp_path: Path, new_registry: NewRegistry, new_puller: Callable[..., Puller]
) -> None:
    registry = new_registry(login=login)
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.image([{"a": b"1"}]), "1")
    digest = registry.push(layout.path, "deep/app:1", tag="1")
    auth = authfile(tmp_path, registry.address, ":".join(login)) if login else None
    puller = new_puller(ImageSettings(authfile=auth))
    assert puller.head(f"{registry.address}/deep/app:1") == digest
    assert puller.head(f"{registry.address}/deep/none:1") == ""
    assert not [each for each in registry.requests("manifests/1") if each.method == "GET"]


def test_a_mirror_of_registries_conf_is_asked_first(
    tmp_path: Path, registry: Registry, new_puller: Callable[..., Puller]
) -> None:
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.image([{"a": b"1"}]), "1")
    digest = registry.push(layout.path, "mirrored/team/app:1", tag="1")
    conf = tmp_path / "registries.conf"
    conf.write_text(
        '[[registry]]\nprefix = "r.invalid"\nlocation = "r.invalid"\n[[registry.mirror]]\n'
        f'location = "{registry.address}/mirrored"\ninsecure = true\n'
    )
    assert new_puller(ImageSettings(registries_conf=conf)).head("r.invalid/team/app:1") == digest


@pytest.mark.timeout(300)
def test_containers_of_one_image_ask_once_and_with_head(
    agent: LiveAgent, registry: Registry, tmp_path: Path, busybox_rootfs: Rootfs
) -> None:
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.image([busybox_rootfs.tar.read_bytes()]), "1")
    registry.push(layout.path, "app:1", tag="1")
    update = 'update_image = { policy = "apply", interval = "1s" }'
    more = 'command = "sleep 1000"\nnetworks = ["none"]\nstop_signal = "SIGKILL"'
    names = [f"c{number}" for number in range(5)]
    agent.write(
        "shop.toml",
        "\n".join(f'[containers.{name}]\nimage = "{registry.address}/app:1"\n{more}\n{update}' for name in names),
    )
    agent.converge(120)

    def asked(method: str) -> int:
        return len([each for each in registry.requests("manifests/") if each.method == method])

    before, heads, began = asked("GET"), asked("HEAD"), time.monotonic()
    agent.wait(lambda: asked("HEAD") >= heads + 4, "it is asked", 60)
    assert asked("HEAD") - heads <= time.monotonic() - began + 2, "once a second, and not for each container"
    assert asked("GET") == before
    layout.tag(layout.image([busybox_rootfs.tar.read_bytes(), {"new": b"1"}]), "1")
    registry.push(layout.path, "app:1", tag="1")
    listed = ("exec", "shop/c4", "ls", "/")
    agent.wait(lambda: "new" in agent.cli(*listed, check=False).stdout.split(), "the newer image runs", 120)
    settled = asked("GET")
    heads = asked("HEAD")
    agent.wait(lambda: asked("HEAD") >= heads + 2, "it is asked on", 60)
    assert asked("GET") == settled
