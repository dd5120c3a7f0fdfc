"""What tests of image builds share: a builder of their own, and the files of an app that is built."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.config import BuildSettings, ImageSettings
from holdfast.drivers import Host
from holdfast.images.builds.build import Builder
from holdfast.images.builds.buildah import Buildah
from holdfast.images.builds.outside import Outside
from holdfast.images.incoming.pull import Puller
from holdfast.images.kept.image import Image
from holdfast.images.kept.store import ImageStore
from holdfast.spec import NodeFacts, Spec, load
from live.agent import LiveAgent

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
        self.builder = Builder(self.store, host, self.tell, self.outside, BuildSettings(concurrency=2))

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
