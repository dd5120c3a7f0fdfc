"""What a node decides about images: which one is taken, what is asked of a registry, and what is remembered.

No registry answers here: whatever would have to ask one fails, and so shows that it asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ground import find_port
from holdfast.config import ImageSettings
from holdfast.errors import HoldfastError, NotFound, TryAgain, WrongCall, WrongState
from holdfast.images.formats.bundle import Gathered, StateTree, write_bundle
from holdfast.images.formats.manifests import architecture
from holdfast.images.incoming.load import import_rootfs
from holdfast.images.kept.image import Image
from holdfast.node.bundle import load_bundle
from holdfast.node.context import Context
from holdfast.node.images import ImageAnswers
from holdfast.node.needs import images_needed
from holdfast.node.newer import Held, ask, note, outdated
from holdfast.node.stage import resolve_image
from holdfast.observed import Generation, NewerImage
from holdfast.plan.actions import Plan, StageGeneration
from holdfast.spec.model import App, Container, UpdateImage
from image_node import image_node
from layouts import Layout
from tars import entry, tar_of

ROOTFS = tar_of(entry("bin/sh", b"shell", mode=0o755))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Context]:
    with image_node(tmp_path) as context:
        yield context


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a registry that does not answer."""
    with ExitStack() as stack:
        yield f"127.0.0.1:{find_port(stack)}"


def put(context: Context, name: str, content: bytes = b"") -> Image:
    """Have an image in the store that a person imported."""
    path = context.host.root / "rootfs.tar"
    path.write_bytes(tar_of(entry("v", content)))
    return import_rootfs(context.images, path, name)


def kinds(context: Context) -> list[tuple[str, str]]:
    return [(event["kind"], event["subject"]) for event in context.store.events()]


@pytest.mark.parametrize("pull", ["missing", "never"])
def test_what_is_here_is_taken_without_asking(node: Context, silent: str, pull: str) -> None:
    image = put(node, f"{silent}/app:1")
    assert resolve_image(node, Container(image=f"{silent}/app:1", pull=pull)) == image.digest


def test_always_asks_also_for_what_is_here(node: Context, silent: str) -> None:
    put(node, f"{silent}/app:1")
    with pytest.raises(HoldfastError, match=r"connection refused|no such program"):
        resolve_image(node, Container(image=f"{silent}/app:1", pull="always"))


def test_newer_takes_what_is_here_while_the_registry_is_away_and_tells_it(node: Context, silent: str) -> None:
    image = put(node, f"{silent}/app:1")
    assert resolve_image(node, Container(image=f"{silent}/app:1", pull="newer")) == image.digest
    assert kinds(node) == [("pull", f"{silent}/app:1")]


def test_what_is_not_here_and_not_to_be_pulled_says_why(node: Context) -> None:
    with pytest.raises(TryAgain, match="is not here, and pull is never"):
        resolve_image(node, Container(image="app:1", pull="never"))
    node.images.settings = node.puller.skopeo.settings = ImageSettings(offline=True)
    with pytest.raises(TryAgain, match="is not here, and this node is offline"):
        resolve_image(node, Container(image="app:1"))


def test_what_a_digest_pins_is_never_asked_for_again(node: Context, silent: str) -> None:
    image = put(node, "app:1")
    pinned = f"{silent}/app@{image.digest}"
    assert resolve_image(node, Container(image=pinned, pull="always")) == image.digest


def test_a_directory_is_its_own_image_and_has_to_be_there(node: Context, tmp_path: Path) -> None:
    assert resolve_image(node, Container(rootfs=str(tmp_path))) == f"rootfs:{tmp_path}"
    with pytest.raises(TryAgain, match="is not a directory of this host"):
        resolve_image(node, Container(rootfs=str(tmp_path / "gone")))


def test_an_image_of_an_archive_is_read_each_time(node: Context, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "shop")
    reference = f"oci:{layout.path}:1"
    found = []
    for content in (b"one", b"two"):
        layout.tag(layout.image([tar_of(entry("v", content))]), "1")
        found.append(resolve_image(node, Container(image=reference)))
    assert len(set(found)) == 2
    with pytest.raises(TryAgain, match="no such file or directory"):
        resolve_image(node, Container(image=f"oci:{tmp_path}/gone:1"))


def bundle_of(tmp_path: Path, *names: str, layers: list[bytes]) -> Path:
    """A bundle with an image under each of these names."""
    layout = Layout(tmp_path / "bundled")
    descriptor = layout.image(layers)
    manifest = layout.json(descriptor["digest"])
    document = layout.read(descriptor["digest"])
    config = layout.read(manifest["config"]["digest"])
    parts = tuple((layer["digest"], layer["size"]) for layer in manifest["layers"])
    images = [Gathered(name, name, document, document, config, parts) for name in names]
    path = tmp_path / "node.bundle"
    write_bundle(path, StateTree({"shop.toml": b""}), images, layout.blobs, f"linux/{architecture()}")
    return path


def test_a_bundle_brings_its_images_and_says_which_are_new(node: Context, silent: str, tmp_path: Path) -> None:
    names = (f"{silent}/app:1", f"{silent}/other:1")
    path = bundle_of(tmp_path, *names, layers=[ROOTFS])
    first, again = load_bundle(node, path), load_bundle(node, path)
    assert [(each["ref"], each["new"]) for each in first] == [(name, True) for name in names]
    assert [each["new"] for each in again] == [False, False]
    assert {each.source for each in node.images.names().values()} == {"bundle"}
    assert kinds(node) == [("images", "node")]
    image = Container(image=names[0], pull="always")  # a bundle is there for want of a registry
    assert resolve_image(node, image) == first[0]["digest"]


def test_a_damaged_bundle_changes_no_name(node: Context, tmp_path: Path) -> None:
    image = put(node, "app:1")
    path = bundle_of(tmp_path, "docker.io/library/app:1", layers=[tar_of(entry("v", b"x" * 5000))])
    data = bytearray(path.read_bytes())
    at = data.index(b"\x1f\x8b") + 30  # in the middle of the one layer
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(WrongState, match=r"load bundle '.*node\.bundle': unpack layer"):
        load_bundle(node, path)
    assert node.images.resolve("app:1") == image


def staging(**containers: Container) -> list[Plan]:
    app = App(name="shop", path="shop.toml", containers=containers)
    return [Plan(actions=(StageGeneration(app="shop", reason="", spec=app),))]


def test_a_plan_needs_what_is_not_here_and_says_what_keeps_it_away(node: Context, silent: str) -> None:
    put(node, "here:1")
    wanted = staging(
        a=Container(image="here:1"),
        b=Container(image="gone:1", pull="never"),
        c=Container(image=f"{silent}/app:1"),
        d=Container(image="oci:/srv/x:1"),
    )
    (never, away) = images_needed(node, wanted, {})["shop"]
    assert never == {"image": "gone:1", "verb": "pull", "size": None, "error": "it is not here, and pull is never"}
    assert (away["image"], away["size"]) == (f"{silent}/app:1", None)
    assert away["error"]
    node.images.settings = node.puller.skopeo.settings = ImageSettings(offline=True)
    assert [each["error"] for each in images_needed(node, wanted, {})["shop"]] == [
        "it is not here, and this node is offline"
    ] * 2
    assert images_needed(node, staging(a=Container(image="here:1")), {}) == {}


def test_a_newer_image_is_told_of_once_and_remembered(node: Context) -> None:
    want = Container(image="r.test/app:1", update_image=UpdateImage(policy="apply"))
    held = Held("shop/web", want, "sha256:" + "1" * 64)
    found = NewerImage("r.test/app:1", "r.test/app:2@sha256:" + "2" * 64, "sha256:" + "2" * 64, 1.0)
    assert note(node, held, found) is True
    assert note(node, held, found) is False
    assert node.store.history().newer["shop/web"] == found
    assert kinds(node) == [("outdated", "shop/web")]


def test_that_nothing_is_newer_is_remembered_and_not_told(node: Context) -> None:
    held = Held("shop/web", Container(image="r.test/app:1"), "sha256:" + "1" * 64)
    same = NewerImage("r.test/app:1", f"r.test/app:1@{held.digest}", held.digest, 1.0)
    assert note(node, held, same) is False
    assert node.store.history().newer["shop/web"] == same
    assert kinds(node) == []


def test_a_registry_that_can_not_tell_is_an_answer_and_what_none_can_have_is_left_out(
    node: Context, silent: str
) -> None:
    imported = put(node, "mine:1")
    app = App(
        name="shop",
        path="shop.toml",
        containers={
            "away": Container(image=f"{silent}/app:1"),
            "imported": Container(image="mine:1"),
            "directory": Container(rootfs="/srv"),
            "pinned": Container(image=f"{silent}/app@{imported.digest}"),
        },
    )
    node.store.put_generation(
        Generation(
            app=app, number=1, state="good", revision="a", images=dict.fromkeys(app.containers, imported.digest)
        )
    )
    answers = {each["target"]: each for each in outdated(node)}
    assert set(answers) == {"shop/away", "shop/pinned"}
    assert answers["shop/away"]["error"] and not answers["shop/pinned"]["error"]
    with pytest.raises(HoldfastError):
        ask(node, Held("shop/away", app.containers["away"], ""))


def test_what_no_registry_has_is_not_asked_for(node: Context) -> None:
    image = put(node, "app")
    for ref, expected in {
        "images.web": "is built, not pulled",
        image.digest: "names no registry, and the image is here already",
        image.config_digest: "is here already",
        f"sha256:{'0' * 64}": "names no registry [(]expected NAME@sha256:0",
    }.items():
        with pytest.raises(WrongCall, match=expected):
            list(ImageAnswers(node).pull_image(ref))
    assert kinds(node) == []


def test_what_is_not_here_is_not_pushed(node: Context) -> None:
    with pytest.raises(NotFound, match="no such image here"):
        list(ImageAnswers(node).push_image("app:1"))
