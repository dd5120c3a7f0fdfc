"""The file of a bundle: what is written is read again, and what is damaged or hostile is one clear error."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import NotFound, WrongState
from holdfast.images.builds.gather import Unread, Wanted, wanted_images
from holdfast.images.formats.archives import open_archive
from holdfast.images.formats.bundle import (
    Gathered,
    StateTree,
    open_bundle,
    pack_files,
    unpack_files,
    write_bundle,
)
from holdfast.images.formats.layout import digest_of
from holdfast.spec import NodeFacts
from layouts import Layout
from tars import entry, tar_of

FILES = {"shop.toml": b"[app]\n", "conf/run.sh": b"#!/bin/sh\n", "conf/ä \udcff": b""}
TREE = StateTree(FILES, frozenset({"conf/run.sh"}), "abc123", "A. Person <a@example.org>", 1_000_000_000.0)
PLATFORM = "linux/amd64"
BASE = {"bin": None, "bin/sh": b"#!" * 3000}


def gathered(layout: Layout, reference: str, top: dict[str, Any]) -> Gathered:
    """What `gather` would bring of an image of a layout."""
    document = layout.json(top["digest"])
    chosen = document["manifests"][-1]["digest"] if "manifests" in document else top["digest"]
    manifest = layout.json(chosen)
    return Gathered(
        reference,
        reference,
        layout.read(top["digest"]),
        layout.read(chosen),
        layout.read(manifest["config"]["digest"]),
        tuple((layer["digest"], layer["size"]) for layer in manifest["layers"]),
    )


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def images(layout: Layout) -> list[Gathered]:
    """A plain image, one of schema 2 that shares a layer with it, and one of an index."""
    plain = layout.image([BASE, {"a": b"a"}], architecture="amd64")
    docker = layout.image([BASE, {"b": b"b"}], architecture="amd64", docker=True)
    many = layout.index([layout.image([], architecture="arm64"), layout.image([BASE], architecture="amd64")])
    return [gathered(layout, f"r.test/{name}:1", top) for name, top in (("c", many), ("a", plain), ("b", docker))]


@pytest.fixture
def bundle(tmp_path: Path, layout: Layout, images: list[Gathered]) -> Path:
    path = tmp_path / "node.bundle"
    write_bundle(path, TREE, images, layout.blobs, PLATFORM)
    return path


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(member, (tar.extractfile(member) or io.BytesIO()).read()) for member in tar]


def change_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the bundle again with another index.json."""
    found = members(path)
    with tarfile.open(path, "w") as tar:
        for member, data in found:
            if member.name == "index.json":
                index = json.loads(data)
                change(index)
                data = json.dumps(index).encode()
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def with_state(path: Path, tar: bytes) -> None:
    """Write the bundle again with another state in it, all digests right."""
    found = {member.name: data for member, data in members(path)}
    index = json.loads(found["index.json"])
    manifest = json.loads(found["blobs/" + index["manifests"][0]["digest"].replace(":", "/")])
    manifest["layers"][0].update(digest=digest_of(tar), size=len(tar))
    document = json.dumps(manifest).encode()
    index["manifests"][0].update(digest=digest_of(document), size=len(document))
    found["index.json"] = json.dumps(index).encode()
    for blob in (tar, document):
        found["blobs/" + digest_of(blob).replace(":", "/")] = blob
    path.write_bytes(tar_of(*(entry(name, data) for name, data in found.items())))


def refusal(path: Path) -> str:
    """Why a bundle is not taken: one line, with its path in it."""
    with pytest.raises(WrongState) as caught, open_bundle(path):
        pass
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


def test_what_is_written_is_read_again(bundle: Path, images: list[Gathered]) -> None:
    with open_bundle(bundle) as found:
        assert found.tree == TREE
        assert found.platform == PLATFORM
        assert [each.reference for each in found.images] == ["r.test/a:1", "r.test/b:1", "r.test/c:1"]
        by_reference = {each.reference: each for each in images}
        for each in found.images:
            source = by_reference[each.reference]
            assert (each.top, each.manifest, each.config) == (source.top, source.manifest, source.config)
            assert [(layer.blob.digest, layer.blob.size) for layer in each.layers] == list(source.layers)
        assert len(found.layers()) == 3
        for layer in found.layers():
            with found.open_layer(layer.blob.digest) as stream:
                assert digest_of(stream.read()) == layer.blob.digest


def test_the_same_content_makes_the_same_bytes(
    bundle: Path, layout: Layout, images: list[Gathered], tmp_path: Path
) -> None:
    backwards = replace(TREE, files=dict(reversed(FILES.items())))
    write_bundle(tmp_path / "again", backwards, images[::-1], layout.blobs, PLATFORM)
    assert (tmp_path / "again").read_bytes() == bundle.read_bytes()


def test_a_layer_that_is_not_what_its_digest_says_leaves_no_file(
    layout: Layout, images: list[Gathered], tmp_path: Path
) -> None:
    (layout.blobs / images[1].layers[1][0].removeprefix("sha256:")).write_bytes(b"other")
    with pytest.raises(WrongState, match="bundle layer 'sha256:"):
        write_bundle(tmp_path / "x", TREE, images, layout.blobs, PLATFORM)
    assert [each.name for each in tmp_path.iterdir()] == ["layout"]


def test_a_bundle_cut_short_anywhere_is_refused(bundle: Path, tmp_path: Path) -> None:
    whole = bundle.read_bytes()
    last = [member for member, _ in members(bundle)][-1]
    cut = tmp_path / "cut.bundle"
    for size in {0, 1, 511, 512, 1000, *range(1024, last.offset_data + last.size, 512 * 7), last.offset_data + 1}:
        cut.write_bytes(whole[:size])
        refusal(cut)


def test_a_flipped_bit_in_any_document_is_noticed(bundle: Path) -> None:
    whole = bytearray(bundle.read_bytes())
    with open_bundle(bundle) as found:
        layers = {layer.blob.digest.removeprefix("sha256:") for layer in found.layers()}
    for member, _ in members(bundle):
        if member.name.startswith("blobs") and member.name.rpartition("/")[2] not in layers and member.size > 2:
            whole[member.offset_data + member.size // 2] ^= 1
            bundle.write_bytes(whole)
            assert "is damaged" in refusal(bundle)
            whole[member.offset_data + member.size // 2] ^= 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda index: index["annotations"].update({"vnd.holdfast.bundle.version": "2"}), "is of version 2"),
        (lambda index: index["annotations"].clear(), "holds images only"),
        (lambda index: index["annotations"].update({"vnd.holdfast.bundle.platform": "linux/arm64"}), "linux/amd64"),
        (lambda index: index["manifests"].pop(0), "holds 0 states"),
        (lambda index: index["manifests"].append(index["manifests"][0]), "holds 2 states"),
        (lambda index: index["manifests"][1]["annotations"].pop("vnd.holdfast.bundle.top"), "damaged: KeyError"),
        (
            lambda index: index["manifests"][1]["annotations"].update({"vnd.holdfast.bundle.top": "sha256:../../x"}),
            "not a digest",
        ),
        (
            lambda index: index["manifests"][1]["annotations"].update(
                {"vnd.holdfast.bundle.top": index["manifests"][3]["annotations"]["vnd.holdfast.bundle.top"]}
            ),
            "does not lead to its manifest",
        ),
        (lambda index: index["manifests"].append(7), "damaged"),
        (
            lambda index: index["manifests"][1]["annotations"].update({"io.containerd.image.name": "\x1b[2J"}),
            "image name '\\x1b[2J'",
        ),
        (
            lambda index: index["annotations"].update({"vnd.holdfast.bundle.platform": "linux/\x1b[2J"}),
            "it is for 'linux/\\x1b[2J'",
        ),
        (lambda index: index.update(manifests={}), "holds 0 states"),
    ],
)
def test_an_index_that_lies_is_refused(bundle: Path, change: Callable[[dict[str, Any]], None], told: str) -> None:
    change_index(bundle, change)
    assert told in refusal(bundle)


@pytest.mark.parametrize(
    "hostile",
    [
        entry("../evil"),
        entry("/etc/evil"),
        entry("a/../../evil"),
        entry("a//b"),
        entry("./a"),
        entry(".git/hooks/post-checkout", b"#!/bin/sh"),
        entry("x" * 256),
        entry("/".join("d" * 101)),
        entry("link", kind="link", linkname="/etc"),
        entry("hard", kind="hard", linkname="shop.toml"),
        entry("null", kind="char", devmajor=1, devminor=3),
        entry("fifo", kind="fifo"),
        entry("shop.toml/inner"),
        entry("shop.toml", b"twice"),
    ],
    ids=lambda hostile: hostile[0].name[:20],
)
def test_a_state_with_anything_but_files_inside_of_it_is_refused(bundle: Path, hostile: Any) -> None:
    with_state(bundle, tar_of(entry("shop.toml", b"[app]\n"), hostile))
    assert "state file" in refusal(bundle)


def test_a_state_that_claims_to_be_huge_is_refused_without_reading_it(bundle: Path) -> None:
    huge, _ = entry("huge")
    huge.size = 1 << 40
    with_state(bundle, huge.tobuf() + b"\0" * 1024)
    assert "too much in the state" in refusal(bundle)


def test_what_is_no_bundle_at_all_is_refused(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x1f\x8b" + bytes(2000))
    assert "no tar archive" in refusal(path)
    path.write_bytes(tar_of(entry("index.json", kind="link", linkname="/etc/shadow")))
    assert "no plain file" in refusal(path)
    path.write_bytes(tar_of(entry("index.json", b"[]"), entry("index.json", b"{}")))
    assert "twice" in refusal(path)
    path.write_bytes(tar_of(entry("index.json", (layout.path / "index.json").read_bytes())))
    assert "holds images only" in refusal(path)
    with pytest.raises(NotFound, match="no such file"), open_bundle(tmp_path / "missing"):
        pass


def test_no_bundle_steers_the_terminal_of_whoever_reads_it(tmp_path: Path, layout: Layout) -> None:
    write_bundle(tmp_path / "x", replace(TREE, author="\x1b[2J", revision="a\nb"), [], layout.blobs, PLATFORM)
    with open_bundle(tmp_path / "x") as found:
        assert found.tree.author == "\N{REPLACEMENT CHARACTER}[2J"
        assert found.tree.revision == "a\N{REPLACEMENT CHARACTER}b"


def test_packed_files_have_no_times_and_owners() -> None:
    with tarfile.open(fileobj=io.BytesIO(pack_files(TREE))) as tar:
        found = [(member.name, member.mode, member.uid, member.mtime, member.uname) for member in tar]
    assert [each[0] for each in found] == sorted(FILES)
    assert {each[2:] for each in found} == {(0, 0, "")}
    assert unpack_files(pack_files(TREE)) == (FILES, TREE.executable)


def test_image_load_leaves_bundles_to_bundle_load(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongState, match="holdfast bundle load"), open_archive(bundle, tmp_path, "amd64"):
        pass


SHOP = b"""
[containers.web]
image = "${vars.registry}/web:1"
[containers.db]
rootfs = "/srv/db"
command = "x"
"""
MAIL = b"""
[app]
when.nodes = ["other"]
[containers.in]
image = "mail:1"
[containers.out]
image = "r.test/web:1"
"""
TREE_FILES = {"vars.toml": b'registry = "r.test"', "shop.toml": SHOP, "mail.toml": MAIL}


def test_every_image_is_wanted_once_with_the_places_that_name_it() -> None:
    found, _ = wanted_images(TREE_FILES, NodeFacts(name="node"), executable=frozenset(), everywhere=True)
    assert found == [Wanted("mail:1", ("mail.toml:5",)), Wanted("r.test/web:1", ("mail.toml:7", "shop.toml:3"))]


def test_only_what_a_node_runs_is_wanted_for_that_node() -> None:
    found, _ = wanted_images(TREE_FILES, NodeFacts(name="node"), executable=frozenset(), everywhere=False)
    assert found == [Wanted("r.test/web:1", ("shop.toml:3",))]


def test_a_variable_without_a_value_is_no_image_of_any_name() -> None:
    with pytest.raises(Unread) as caught:
        wanted_images({"shop.toml": SHOP}, NodeFacts(name="node"), executable=frozenset(), everywhere=True)
    assert [problem.line for problem in caught.value.problems] == [3]


def test_images_that_are_built_come_before_those_that_may_be_their_tags() -> None:
    files = {
        "shop.toml": b'[containers.a]\nimage = "web:1"\n[containers.b]\nimage = "images.web"\n'
        b'[images.web]\ncontext = "./web"\ntags = ["web:1"]\n',
        "web/Dockerfile": b"FROM scratch\nCOPY Dockerfile /\n",
    }
    found, spec = wanted_images(files, NodeFacts(name="node"), executable=frozenset(), everywhere=True)
    assert [each.reference for each in found] == ["images.shop/web", "web:1"]
    assert set(spec.apps["shop"].images) == {"shop/web"}
