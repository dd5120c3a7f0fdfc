"""A real registry for one test: Debian's docker-registry as a process, with a folder and a port of its own."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import layouts
from ground import patient, wait_for

PROGRAM = "/usr/bin/docker-registry"
REQUEST = re.compile(r'"([A-Z]+) (\S+) HTTP/[0-9.]+" (\d+)')


@dataclass(frozen=True, slots=True)
class Request:
    """One request that the registry answered, as its access log has it."""

    method: str
    path: str
    status: int


class Authority:
    """A certificate authority in a folder, and certificates by it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca, self._key = folder / "ca.crt", folder / "ca.key"
        folder.mkdir(parents=True, exist_ok=True)
        _openssl(
            "req", "-x509", *NEW_KEY, "-keyout", str(self._key), "-out", str(self.ca), "-days", "30",
            "-subj", "/CN=holdfast test authority",
        )  # fmt: skip

    def issue(self, address: str, *, expired: bool = False) -> tuple[Path, Path]:
        """A certificate and its key for an IP address, or a name."""
        certificate, key, request = (self.folder / f"{address}.{kind}" for kind in ("crt", "key", "csr"))
        extra = self.folder / f"{address}.ext"
        extra.write_text(f"subjectAltName={'DNS' if re.search('[a-z]', address) else 'IP'}:{address}\n")
        _openssl("req", *NEW_KEY, "-keyout", str(key), "-out", str(request), "-subj", f"/CN={address}")
        times = ["-startdate", "20200101000000Z", "-enddate", "20200201000000Z"] if expired else ["-days", "30"]
        config = self.folder / "ca.cnf"
        config.write_text(
            f"[ca]\ndefault_ca=x\n[x]\nnew_certs_dir={self.folder}\ndatabase={self.folder}/index.txt\n"
            f"rand_serial=yes\ndefault_md=sha256\npolicy=any\n[any]\ncommonName=supplied\n"
        )
        (self.folder / "index.txt").write_text("")
        _openssl(
            "ca", "-batch", "-notext", "-config", str(config), "-cert", str(self.ca), "-keyfile", str(self._key),
            "-in", str(request), "-out", str(certificate), "-extfile", str(extra), *times,
        )  # fmt: skip
        return certificate, key


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Registry:
    """A docker-registry process; its content survives `stop` and `start`.

    address: HOST:PORT. ca: of its certificate, None without TLS. login: user and password that it asks for.
    namespace: the network namespace that it listens in, at host.
    """

    def __init__(
        self,
        folder: Path,
        port: int,
        *,
        host: str = "127.0.0.1",
        authority: Authority | None = None,
        expired: bool = False,
        login: tuple[str, str] | None = None,
        namespace: str = "",
    ) -> None:
        self.folder = folder
        self.address = f"{host}:{port}"
        self.ca = authority.ca if authority else None
        self.login = login
        self._namespace = namespace
        self._expired = expired
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yml").write_text(self._config(authority, host, expired=expired))
        self.start()

    def start(self) -> None:
        """Start the process and wait until it answers."""
        words = ["ip", "netns", "exec", self._namespace] if self._namespace else []
        with (self.folder / "registry.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*words, PROGRAM, "serve", str(self.folder / "config.yml")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
            )  # fmt: skip
        process = self.process

        def answers() -> bool:
            assert process.poll() is None, f"no registry:\n{self.log()}"
            return self._answers()

        wait_for(answers, "the registry answers", state=self.log)

    def stop(self) -> None:
        """End the process; the port is closed afterwards."""
        if self.process is not None:
            self._settle()
            self.process.kill()
            self.process.wait(patient(10))
            self.process = None

    close = stop

    def push(self, layout: Path, name: str, *, tag: str = "latest") -> str:
        """Put what a layout has under tag to NAME[:TAG] of this registry; returns the digest."""
        return layouts.push(layout, f"{self.address}/{name}", tag=tag, ca=self.ca, login=self.login)

    def requests(self, pattern: str = "") -> list[Request]:
        """What it was asked so far (method, path, status), oldest first, where the path matches pattern.

        What the test itself put there is among it.
        """
        self._settle()
        found = REQUEST.findall(self.log())
        every = (Request(method, path, int(status)) for method, path, status in found)
        return [request for request in every if re.search(pattern, request.path)]

    def fetched(self, digest: str) -> int:
        """How often a blob was asked for."""
        return len([each for each in self.requests(f"/blobs/{digest}") if each.method == "GET"])

    def log(self) -> str:
        return (self.folder / "registry.log").read_text(errors="replace")

    def blob(self, digest: str) -> Path:
        """Where it keeps a blob: to damage it, or to take it away."""
        hexes = digest.removeprefix("sha256:")
        return self.folder / "data/docker/registry/v2/blobs/sha256" / hexes[:2] / hexes / "data"

    def _settle(self) -> None:
        """Wait until all that was answered is in the access log, too: the registry logs a request after its answer.

        As long as it works at something, one of its threads runs, or is about to.
        """

        def rests() -> bool:
            with suppress(OSError):  # a thread has ended meanwhile
                seen = self._threads()
                return seen == self._threads() and all(state == "S" for state, _ in seen.values())
            return False

        if self.process is not None and self.process.poll() is None:
            wait_for(rests, "the registry has logged what it answered")

    def _threads(self) -> dict[str, tuple[str, str]]:
        """Each thread's state, and how long and how often it ran (proc(5))."""
        assert self.process is not None
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            found[task.name] = (state, (task / "schedstat").read_text())
        return found

    def _answers(self) -> bool:
        try:
            self._probe()
        except AssertionError:  # 401: it wants a password, and so it answers
            return True
        except OSError:
            return False
        return True

    def _probe(self) -> None:
        if self._expired:
            host, _, port = self.address.partition(":")
            socket.create_connection((host, int(port)), 1).close()
            return
        layouts.Remote(self.address, ca=self.ca, login=self.login).ask("GET", "/v2/")

    def _config(self, authority: Authority | None, host: str, *, expired: bool) -> str:
        lines = [
            "version: 0.1",
            "log: {level: error, accesslog: {disabled: false}}",
            f"storage: {{filesystem: {{rootdirectory: {self.folder}/data}}, delete: {{enabled: true}}}}",
            "http:",
            f"  addr: {self.address}",
            "  secret: test",
        ]
        if authority:
            certificate, key = authority.issue(host, expired=expired)
            lines += ["  tls:", f"    certificate: {certificate}", f"    key: {key}"]
        if self.login:
            passwords = self.folder / "htpasswd"
            done = subprocess.run(["htpasswd", "-Bbn", *self.login], check=True, capture_output=True)
            passwords.write_bytes(done.stdout)
            lines += ["auth:", f"  htpasswd: {{realm: test, path: {passwords}}}"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Island:
    """A network namespace that this host reaches at an address which is not loopback's."""

    namespace: str
    address: str


def make_island(stack: ExitStack, name: str, here: str, there: str) -> Island:
    """A namespace of that name on a wire: this host has `here` on it, the namespace `there` (IPv4, /30)."""
    wire, far = f"{name}w0", f"{name}w1"
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    _ip("link", "add", wire, "type", "veth", "peer", "name", far, "netns", name)
    stack.callback(_ip, "link", "del", wire)
    _ip("addr", "add", f"{here}/30", "dev", wire)
    _ip("link", "set", wire, "up")
    _ip("-n", name, "addr", "add", f"{there}/30", "dev", far)
    _ip("-n", name, "link", "set", far, "up")
    _ip("-n", name, "link", "set", "lo", "up")
    return Island(name, there)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=patient(20))


def _openssl(*words: str) -> None:
    done = subprocess.run(["openssl", *words], check=False, capture_output=True, text=True, timeout=patient(30))
    assert done.returncode == 0, f"openssl {' '.join(words)}: {done.stderr}"


NewRegistry = Callable[..., Registry]
