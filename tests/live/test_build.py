"""[images.*] built by the real buildah, on images made of busybox."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from ground import Rootfs
from holdfast.config import ImageSettings
from holdfast.drivers import Host
from holdfast.errors import HoldfastError, TryAgain, UnfitHost, WrongState
from holdfast.images.build import Builder
from holdfast.images.image import Image
from holdfast.images.lookup import find
from holdfast.images.store import ImageStore
from holdfast.runtime.binaries import find_runtime
from holdfast.spec import NodeFacts, Spec, load

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

    def __init__(self, host: Host, settings: ImageSettings = ImageSettings(), **more: object) -> None:
        self.host = host
        self.told: list[tuple[str, str, str]] = []
        self.store = ImageStore(host.root / "images", settings)
        self.builder = Builder(
            self.store, settings, host.root, host.run_root, self.tell,
            name=host.name, runtime=str(find_runtime().path), **more,
        )  # type: ignore[arg-type]  # fmt: skip

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
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    web = {f"web/{name}": text for name, text in {"busybox": busybox, **files}.items()}
    return {"shop.toml": state, "web/Dockerfile": dockerfile, **web}


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
