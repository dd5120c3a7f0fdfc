"""Makes OCI layouts from dictionaries, byte-exact, and puts them into registries over plain HTTP requests.

No tool stands between a test and what it writes: an index may be nested or empty, a size may lie.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tarfile import TarInfo
from typing import Any

from tars import entry, tar_of

Content = bytes | str | TarInfo | None  # a file, a symbolic link to, an entry as it is, a directory
Layer = Mapping[str, Content] | bytes  # bytes: a plain tar
Descriptor = dict[str, Any]

OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
MANIFEST, INDEX, CONFIG = f"{OCI}manifest.v1+json", f"{OCI}index.v1+json", f"{OCI}config.v1+json"
LAYERS = {"gzip": f"{OCI}layer.v1.tar+gzip", "zstd": f"{OCI}layer.v1.tar+zstd", "": f"{OCI}layer.v1.tar"}
DOCKER_MANIFEST = f"{DOCKER}distribution.manifest.v2+json"
DOCKER_LIST = f"{DOCKER}distribution.manifest.list.v2+json"
DOCKER_CONFIG = f"{DOCKER}container.image.v1+json"
DOCKER_LAYER = f"{DOCKER}image.rootfs.diff.tar.gzip"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layer_tar(layer: Layer) -> bytes:
    """The plain tar of a layer. Files may be executed; parents are not made by themselves."""
    if isinstance(layer, bytes):
        return layer
    return tar_of(*(_entry(name, content) for name, content in layer.items()))


def _entry(name: str, content: Content) -> tuple[TarInfo, bytes]:
    match content:
        case TarInfo():
            content.name = name
            return content, b"\0" * content.size
        case bytes():
            return entry(name, content, mode=0o755)
        case str():
            return entry(name, kind="link", linkname=content)
        case None:
            return entry(name, kind="dir")


def compress(tar: bytes, compression: str) -> bytes:
    """The same bytes for the same content, whenever they are made."""
    if compression == "gzip":
        return gzip.compress(tar, compresslevel=1, mtime=0)
    if compression == "zstd":
        import zstandard

        return zstandard.compress(tar, level=1)
    return tar


class Layout:
    """An OCI layout directory that is written blob by blob."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs = path / "blobs/sha256"
        self.blobs.mkdir(parents=True, exist_ok=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        if not (path / "index.json").exists():
            self._write([])

    def blob(self, data: bytes, **descriptor: Any) -> Descriptor:
        """Store bytes; the descriptor of them, with what else is given."""
        digest = digest_of(data)
        (self.blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"digest": digest, "size": len(data), **descriptor}

    def read(self, digest: str) -> bytes:
        return (self.blobs / digest.removeprefix("sha256:")).read_bytes()

    def json(self, digest: str) -> Any:
        return json.loads(self.read(digest))

    def image(
        self,
        layers: Sequence[Layer],
        *,
        config: Mapping[str, Any] | None = None,
        architecture: str = "",
        variant: str = "",
        system: str = "linux",
        compression: str = "gzip",
        docker: bool = False,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> Descriptor:
        """An image with its configuration and layers; the descriptor has its platform. docker: as schema 2."""
        from holdfast.images.formats.manifests import architecture as this_host

        tars = [layer_tar(layer) for layer in layers]
        platform = {"os": system, "architecture": architecture or this_host()} | (
            {"variant": variant} if variant else {}
        )
        document = {
            **platform,
            "created": "2026-01-02T03:04:05Z",
            "config": {"Cmd": ["/bin/sh"]} if config is None else dict(config),
            "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
            "history": list(history),
        }
        kinds = (DOCKER_MANIFEST, DOCKER_CONFIG, DOCKER_LAYER) if docker else (MANIFEST, CONFIG, LAYERS[compression])
        manifest = {
            "schemaVersion": 2,
            "mediaType": kinds[0],
            "config": self.blob(json.dumps(document).encode(), mediaType=kinds[1]),
            "layers": [self.blob(compress(tar, compression), mediaType=kinds[2]) for tar in tars],
        }
        return self.blob(json.dumps(manifest).encode(), mediaType=kinds[0], platform=platform)

    def index(self, manifests: Sequence[Descriptor], *, docker: bool = False) -> Descriptor:
        """An index (manifest list) of what is here already."""
        kind = DOCKER_LIST if docker else INDEX
        document = {"schemaVersion": 2, "mediaType": kind, "manifests": list(manifests)}
        return self.blob(json.dumps(document).encode(), mediaType=kind)

    def tag(self, descriptor: Descriptor, name: str = "latest") -> str:
        """Have a name lead to it; returns the digest."""
        there = [each for each in self.json_index() if (each.get("annotations") or {}).get(REF_NAME) != name]
        self._write([*there, {**descriptor, "annotations": {REF_NAME: name}}])
        return str(descriptor["digest"])

    def json_index(self) -> list[Descriptor]:
        return list(json.loads((self.path / "index.json").read_text())["manifests"])

    def find(self, name: str = "latest") -> Descriptor:
        """What a name leads to."""
        return next(each for each in self.json_index() if (each.get("annotations") or {}).get(REF_NAME) == name)

    def _write(self, manifests: list[Descriptor]) -> None:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))


REF_NAME = "org.opencontainers.image.ref.name"


def make_layout(path: Path, layers: Sequence[Layer], *, tag: str = "latest", **image: Any) -> str:
    """Add an image to the layout at path (made if missing) under a tag; returns its manifest's digest.

    image: as `Layout.image` takes it: config, architecture, variant, compression ("gzip", "zstd", ""), docker.
    """
    layout = Layout(path)
    return layout.tag(layout.image(layers, **image), tag)


class Remote:
    """A registry's HTTP API, as far as putting images there takes it (OCI distribution spec 1.1).

    address: HOST:PORT. ca: of a registry with TLS. login: user and password.
    """

    def __init__(self, address: str, *, ca: Path | None = None, login: tuple[str, str] | None = None) -> None:
        self.base = f"{'https' if ca else 'http'}://{address}"
        self._handlers: list[Any] = [urllib.request.ProxyHandler({})]
        if ca:
            self._handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(ca))))
        self._headers = {}
        if login:
            self._headers["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()

    def ask(self, method: str, url: str, data: bytes | None = None, **headers: str) -> tuple[int, dict[str, str]]:
        """Status and headers (lower case) of the answer; raises AssertionError for a server's error."""
        url = url if "://" in url else self.base + url
        wanted = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(url, data, {**self._headers, **wanted}, method=method)
        try:
            with urllib.request.build_opener(*self._handlers).open(request, timeout=20) as answer:
                answer.read()
                return answer.status, {name.lower(): value for name, value in answer.headers.items()}
        except urllib.error.HTTPError as error:
            with error:
                assert error.code == 404, f"{method} {url}: {error.code} {error.read()[:500]!r}"
                return error.code, {}

    def put_blob(self, repository: str, data: bytes) -> None:
        digest = digest_of(data)
        if self.ask("HEAD", f"/v2/{repository}/blobs/{digest}")[0] == 200:
            return
        _, headers = self.ask("POST", f"/v2/{repository}/blobs/uploads/", b"")
        place = headers["location"]
        url = f"{place}{'&' if '?' in place else '?'}digest={digest}"
        self.ask("PUT", url, data, Content_Type="application/octet-stream")

    def put(self, layout: Layout, repository: str, tag: str, descriptor: Descriptor) -> str:
        """Put an image or index with all that hangs on it; returns its digest."""
        for child in _children(layout, descriptor):
            if "manifest" in child["mediaType"] or "index" in child["mediaType"]:
                self.put(layout, repository, child["digest"], child)
            else:
                self.put_blob(repository, layout.read(child["digest"]))
        data = layout.read(descriptor["digest"])
        self.ask("PUT", f"/v2/{repository}/manifests/{tag}", data, Content_Type=descriptor["mediaType"])
        return str(descriptor["digest"])


def _children(layout: Layout, descriptor: Descriptor) -> Iterator[Descriptor]:
    document = layout.json(descriptor["digest"])
    yield from document.get("manifests", ())
    if "config" in document:
        yield document["config"]
    yield from document.get("layers", ())


def push(
    path: Path,
    target: str,
    *,
    tag: str = "latest",
    ca: Path | None = None,
    login: tuple[str, str] | None = None,
) -> str:
    """Put what a layout has under a tag to `[docker://]HOST:PORT/REPOSITORY[:TAG]`; returns the digest there."""
    host, _, rest = target.removeprefix("docker://").partition("/")
    repository, _, name = rest.partition(":")
    layout = Layout(path)
    return Remote(host, ca=ca, login=login).put(layout, repository, name or "latest", layout.find(tag))


def files_below(folder: Path) -> list[str]:
    """Every file below a folder that is not there to be locked."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )
