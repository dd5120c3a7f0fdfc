"""Newer images are asked for with HEAD, once for all containers, and no more often than the registry wants."""

from __future__ import annotations

import json
import select
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ground import Rootfs
from holdfast.config import ImageSettings
from holdfast.errors import TryAgain
from holdfast.images.incoming.pull import Puller
from layouts import Layout
from live.agent import LiveAgent
from live.registry import Authority, NewRegistry, Registry

pytestmark = pytest.mark.live

DIGEST = f"sha256:{'a' * 64}"


class Counter(ThreadingHTTPServer):
    """A registry with one image for who has a token, and what it was asked.

    answer: status and headers instead, of what the path begins with. name: under which it is known.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.answer: tuple[int, dict[str, str]] | None = None
        self.answers_for = "/"
        self.scheme, self.name = "http", "127.0.0.1"

    @property
    def address(self) -> str:
        return f"{self.name}:{self.server_port}"

    def speak_tls(self, authority: Authority, name: str = "127.0.0.1", *, expects: bool = False) -> None:
        """Go on with a certificate for a name. expects: one of the authority's from whoever asks, too."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue(name))
        if expects:
            context.load_verify_locations(authority.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.scheme, self.name = "https", name


class Proxy(ThreadingHTTPServer):
    """A proxy that leads to one place, whatever is asked for, and what it was asked for with which login."""

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.port, self.asked = port, list[tuple[str, str]]()


class Tunnel(BaseHTTPRequestHandler):
    server: Proxy

    def do_CONNECT(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Proxy-Authorization", "")))
        with socket.create_connection(("127.0.0.1", self.server.port)) as far:
            self.send_response(200)
            self.end_headers()
            ends = {self.connection: far, far: self.connection}
            while True:
                for end in select.select(list(ends), (), ())[0]:
                    if not (data := end.recv(65536)):
                        return
                    ends[end].sendall(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Handler(BaseHTTPRequestHandler):
    server: Counter

    def do_HEAD(self) -> None:
        self.server.asked.append((self.command, self.path))
        if self.server.answer and self.path.startswith(self.server.answers_for):
            self.say(*self.server.answer)
        elif self.headers.get("Authorization") != "Bearer good":
            realm = f"{self.server.scheme}://{self.server.address}/token"
            challenge = f'Bearer realm="{realm}",service="here",scope="repository:app:pull"'
            self.say(401, {"WWW-Authenticate": challenge})
        else:
            self.say(200, {"Docker-Content-Digest": DIGEST})

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path))
        if self.server.answer and self.path.startswith(self.server.answers_for):
            self.say(*self.server.answer)
            return
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


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without anything in it, so that nothing of this host's own certificates and logins counts."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def certs(home: Path, address: str, **files: Path) -> Path:
    """Put files where containers-certs.d(5) has those of a registry."""
    folder = home / ".config/containers/certs.d" / address
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        (folder / name.replace("_", ".")).write_bytes(source.read_bytes())
    return folder


def strict(folder: Path, *addresses: str) -> Path:
    """A registries.conf by which registries of this host need a certificate, as those of others do."""
    conf = folder / "strict.conf"
    conf.write_text("".join(f'[[registry]]\nlocation = "{each}"\n' for each in addresses))
    return conf


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
        with pytest.raises(TryAgain, match="it asks to wait") as caught:
            puller.head(f"{counter.address}/{name}")
        assert wait - 30 < caught.value.wait <= wait
    assert len(counter.asked) == 1


def test_a_registry_that_is_busy_in_any_way_is_left_alone_over_tls(
    counter: Counter, authority: Authority, home: Path, tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    counter.speak_tls(authority)
    certs(home, counter.address, ca_crt=authority.ca)
    auth = authfile(tmp_path, counter.address, "ada:secret")
    settings = ImageSettings(authfile=auth, registries_conf=strict(tmp_path, counter.address))
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=500), usegmt=True)
    for path, status, headers, wait in (
        ("/v2/", 429, {"Retry-After": "1000"}, 1000),
        ("/v2/", 503, {"Retry-After": later}, 500),
        ("/v2/", 429, {"RateLimit": '"pulls";r=0;t=90'}, 90),
        ("/token", 429, {"Retry-After": "700"}, 700),
        ("/token", 503, {"Retry-After": "70"}, 70),
    ):
        counter.answer, counter.answers_for = (status, headers), path
        puller = new_puller(settings)
        for _ in range(2):
            with pytest.raises(TryAgain, match="it asks to wait") as caught:
                puller.head(f"{counter.address}/app:1")
            assert wait - 30 < caught.value.wait <= wait, (path, status, headers)
        assert len(counter.asked) == (1 if path == "/v2/" else 2)
        counter.asked.clear()
    counter.answer = (200, {"Docker-Content-Digest": DIGEST, "RateLimit-Remaining": "0", "RateLimit-Reset": "300"})
    counter.answers_for = "/v2/"
    puller = new_puller(settings)
    assert puller.head(f"{counter.address}/app:1") == DIGEST
    with pytest.raises(TryAgain, match="it asks to wait"):
        puller.head(f"{counter.address}/app:1")
    counter.answer = None
    assert new_puller(settings).head(f"{counter.address}/app:1") == DIGEST


def test_a_mirror_that_is_busy_is_passed_by(
    counter: Counter, registry: Registry, tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.image([{"a": b"1"}]), "1")
    digest = registry.push(layout.path, "team/app:1", tag="1")
    conf = tmp_path / "registries.conf"
    conf.write_text(
        f'[[registry]]\nprefix = "r.invalid"\nlocation = "{registry.address}"\ninsecure = true\n'
        f'[[registry.mirror]]\nlocation = "{counter.address}"\ninsecure = true\n'
    )
    puller = new_puller(ImageSettings(registries_conf=conf))
    counter.answer = (429, {"Retry-After": "1000"})
    assert [puller.head("r.invalid/team/app:1") for _ in range(2)] == [digest, digest]
    assert len(counter.asked) == 1
    registry.stop()
    with pytest.raises(TryAgain, match="it asks to wait"):
        puller.head("r.invalid/team/app:1")


def test_a_registry_is_trusted_only_with_a_certificate_of_an_authority_that_is_known_for_it(
    authority: Authority, home: Path, tmp_path: Path, new_registry: NewRegistry, new_puller: Callable[..., Puller]
) -> None:
    proper = new_registry(authority=authority, login=("ada", "secret"))
    expired = new_registry(authority=authority, expired=True)
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.image([{"a": b"1"}]), "1")
    digest = proper.push(layout.path, "app:1", tag="1")
    name = f"localhost:{proper.address.rpartition(':')[2]}"  # which the certificate is not for
    auth = authfile(tmp_path, proper.address, "ada:secret")
    conf = strict(tmp_path, proper.address, expired.address, name)
    puller = new_puller(ImageSettings(authfile=auth, registries_conf=conf))
    assert puller.head(f"{proper.address}/app:1") == "", "nobody knows the authority"
    for address in (proper.address, expired.address, name):
        certs(home, address, ca_crt=authority.ca)
    asked = len(proper.requests("manifests/1"))
    assert puller.head(f"{proper.address}/app:1") == digest
    assert [each.status for each in proper.requests("manifests/1")[asked:]] == [401, 200]
    assert [puller.head(f"{each}/app:1") for each in (expired.address, name)] == ["", ""]
    assert len(proper.requests("manifests/1")) == asked + 2
    certs(home, proper.address, bad_crt=auth)
    assert puller.head(f"{proper.address}/app:1") == "", "what is no certificate is for skopeo to explain"


def test_a_registry_that_wants_to_know_who_asks_is_shown_a_certificate(
    counter: Counter, authority: Authority, home: Path, tmp_path: Path, new_puller: Callable[..., Puller]
) -> None:
    counter.speak_tls(authority, expects=True)
    auth = authfile(tmp_path, counter.address, "ada:secret")
    settings = ImageSettings(authfile=auth, registries_conf=strict(tmp_path, counter.address))
    certs(home, counter.address, ca_crt=authority.ca)
    assert new_puller(settings).head(f"{counter.address}/app:1") == ""
    assert counter.asked == []
    certificate, key = authority.issue("ada")
    certs(home, counter.address, client_cert=certificate, client_key=key)
    assert new_puller(settings).head(f"{counter.address}/app:1") == DIGEST


def test_a_registry_behind_a_proxy_is_asked_through_it(
    counter: Counter,
    authority: Authority,
    home: Path,
    tmp_path: Path,
    new_puller: Callable[..., Puller],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter.speak_tls(authority, "r.invalid")
    certs(home, counter.address, ca_crt=authority.ca)
    auth = authfile(tmp_path, counter.address, "ada:secret")
    puller = new_puller(ImageSettings(authfile=auth))
    assert puller.head(f"{counter.address}/app:1") == "", "nobody is called so"
    with Proxy(counter.server_port) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://eve:p%40ss@127.0.0.1:{proxy.server_port}")
        assert puller.head(f"{counter.address}/app:1") == DIGEST
        login = f"Basic {b64encode(b'eve:p@ss').decode()}"
        assert proxy.asked == [(counter.address, login)] * 3
        monkeypatch.setenv("no_proxy", "r.invalid")
        assert puller.head(f"{counter.address}/app:1") == ""
        assert len(proxy.asked) == 3
        proxy.shutdown()


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
