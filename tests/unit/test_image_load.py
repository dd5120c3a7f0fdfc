"""Loading: what archives, layouts and tars of root file systems become in the store, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import NotFound, WrongCall, WrongState
from holdfast.images.formats.manifests import architecture
from holdfast.images.incoming.load import import_rootfs, load_archive
from holdfast.images.kept.store import ImageStore
from layouts import Layout, digest_of, files_below
from tars import ROOTFS, entry, tar_of

CHANGES = ['CMD ["/bin/sh", "-l"]', "ENV A=1", "USER nobody"]


def docker_archive(path: Path, *, tags: list[str] | None = None) -> Path:
    """As `docker save` wrote it: layer directories, one of them a link to an equal layer."""
    config = {"architecture": architecture(), "os": "linux", "rootfs": {"diff_ids": [digest_of(ROOTFS)] * 2}}
    text = json.dumps(config).encode()
    manifest = [{"Config": "c.json", "RepoTags": tags or ["shop/web:2"], "Layers": ["1/layer.tar", "2/layer.tar"]}]
    path.write_bytes(
        tar_of(
            entry("1/layer.tar", ROOTFS),
            entry("2/layer.tar", kind="link", linkname="../1/layer.tar"),
            entry("c.json", text),
            entry("manifest.json", json.dumps(manifest).encode()),
        )
    )
    return path


def test_an_imported_root_file_system_is_an_image(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "app:1", CHANGES)
    assert image.config == {"Cmd": ["/bin/sh", "-l"], "Env": ["A=1"], "User": "nobody"}
    assert (image.names, image.size, image.architecture) == (("app:1",), len(ROOTFS), architecture())
    assert image.created == 1_000_000_000
    assert image.layers == (store.root / "layers/sha256" / hashlib.sha256(ROOTFS).hexdigest(),)
    assert image == store.resolve("docker.io/library/app:1") == store.get(image.digest) == store.resolve(image.digest)
    assert store.list() == [image]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_compression_does_not_change_the_image(
    store: ImageStore, tmp_path: Path, rootfs: Path, compress: Any
) -> None:
    expected = import_rootfs(store, rootfs, "plain").digest
    (tmp_path / "other").write_bytes(compress(ROOTFS))
    assert import_rootfs(store, tmp_path / "other", "other").digest == expected
    assert store.get(expected).names == ("other:latest", "plain:latest")


def test_an_oci_layout_keeps_its_digest(store: ImageStore, layout: Layout) -> None:
    upper = tar_of(entry("etc/.wh.passwd"), entry("top", b"1"))
    descriptor = layout.image([ROOTFS, upper])
    layout.tag(descriptor, "1.0")
    (image,) = load_archive(store, layout.path)
    assert image.digest == descriptor["digest"]
    assert image.names == ("shop:1.0",)
    assert [layer.name for layer in image.layers] == [hashlib.sha256(layer).hexdigest() for layer in (ROOTFS, upper)]
    assert image.read_file("/top") == b"1"
    assert image.lookup("/etc/passwd") is None
    assert round(image.created) == 1767323045


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_archives_are_loaded_compressed_or_not(
    store: ImageStore, layout: Layout, tmp_path: Path, compress: Any
) -> None:
    descriptor = layout.image([ROOTFS])
    layout.tag(descriptor, "registry.example:5000/a/b:1")
    archive = tmp_path / "oci.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout.path, arcname=".")
    archive.write_bytes(compress(archive.read_bytes()))
    docker = docker_archive(tmp_path / "docker.tar")
    docker.write_bytes(compress(docker.read_bytes()))
    assert [image.digest for image in load_archive(store, archive)] == [descriptor["digest"]]
    (image,) = load_archive(store, docker)
    assert image.names == ("shop/web:2",)
    assert len(image.layers) == 2
    assert store.resolve("registry.example:5000/a/b:1").layers[0] == image.layers[0]
    assert load_archive(store, docker, "other:3")[0].names == ("other:3", "shop/web:2")


def test_of_an_index_the_image_for_this_host_is_taken(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    ours, theirs = layout.image([ROOTFS]), layout.image([ROOTFS], architecture="vax")
    layout.tag(layout.index([theirs, ours]), "docker.io/library/both:1")
    (image,) = load_archive(store, layout.path)
    assert (image.digest, image.names) == (ours["digest"], ("both:1",))
    other = Layout(tmp_path / "other")
    other.tag(other.image([ROOTFS], architecture="vax"))
    with pytest.raises(WrongState, match=r"no image for linux/.*it has: linux/vax"):
        load_archive(store, other.path)


def test_another_architecture_is_refused(store: ImageStore, layout: Layout) -> None:
    descriptor = layout.image([ROOTFS], architecture="vax")
    del descriptor["platform"]
    layout.tag(descriptor, "x:1")
    with pytest.raises(WrongState, match=rf"is for linux/vax \(expected linux/{architecture()}\)"):
        load_archive(store, layout.path)
    assert store.list() == []


def test_a_layer_that_is_not_what_its_configuration_says_is_refused(store: ImageStore, layout: Layout) -> None:
    descriptor = layout.image([ROOTFS])
    manifest = layout.json(descriptor["digest"])
    config = layout.json(manifest["config"]["digest"])
    config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    manifest["config"] = layout.blob(json.dumps(config).encode())
    layout.tag(layout.blob(json.dumps(manifest).encode()), "x:1")
    with pytest.raises(WrongState, match=r"load '.*shop': unpack layer '.*0000"):
        load_archive(store, layout.path)
    assert files_below(store.root) == []


@pytest.mark.parametrize("part", ["manifest", "configuration"])
def test_a_damaged_document_is_noticed_and_leaves_nothing(store: ImageStore, layout: Layout, part: str) -> None:
    descriptor = layout.image([ROOTFS])
    layout.tag(descriptor, "x:1")
    digest = descriptor["digest"] if part == "manifest" else layout.json(descriptor["digest"])["config"]["digest"]
    (layout.blobs / digest.removeprefix("sha256:")).write_bytes(b"{}")
    with pytest.raises(WrongState, match=f"blob '{digest}' is damaged"):
        load_archive(store, layout.path)
    assert files_below(store.root) == []


def test_what_is_cut_short_or_no_archive_at_all_is_refused(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "cut.gz").write_bytes(gzip.compress(ROOTFS)[:100])
    with pytest.raises(WrongState):
        import_rootfs(store, tmp_path / "cut.gz", "z")
    with pytest.raises(WrongState, match="decompress: "):
        load_archive(store, tmp_path / "cut.gz")
    docker = docker_archive(tmp_path / "docker.tar")
    docker.write_bytes(docker.read_bytes()[:3000])
    with pytest.raises(WrongState, match=r"load '.*docker\.tar'"):
        load_archive(store, docker)
    for name, content in (("text", b"hello" * 1000), ("tar", ROOTFS)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WrongState, match=r"no tar archive|neither an OCI layout nor"):
            load_archive(store, tmp_path / name)
    layout.tag(layout.image([ROOTFS]), "x:1")
    (layout.path / "index.json").unlink()
    with pytest.raises(WrongState, match=r"'index\.json' is not in it"):
        load_archive(store, layout.path)
    assert files_below(store.root) == []


def test_a_member_that_is_stored_with_holes_is_refused(store: ImageStore, tmp_path: Path) -> None:
    member, _ = entry("manifest.json", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": "4096"})
    (tmp_path / "x.tar").write_bytes(tar_of((member, b"")))
    with pytest.raises(WrongState, match=r"'manifest\.json' is no plain file"):
        load_archive(store, tmp_path / "x.tar")


def test_a_missing_file_and_a_missing_name_are_wrong_calls(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        import_rootfs(store, tmp_path / "no", "x")
    with pytest.raises(NotFound, match="no such file"):
        load_archive(store, tmp_path / "no")
    layout.tag(layout.image([ROOTFS]), "")
    with pytest.raises(WrongCall, match="has no name"):
        load_archive(store, layout.path)
