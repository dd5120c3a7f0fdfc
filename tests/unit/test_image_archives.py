"""Archives and layouts that are written from the store: what goes in by one comes out the same by the other."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from holdfast.errors import NotFound, WrongState
from holdfast.images.incoming.load import import_rootfs, load_archive
from holdfast.images.kept.store import ImageStore
from holdfast.images.outgoing.write import FORMATS, Format, save, write_layout
from layouts import make_layout
from tars import entry, tar_of

LOWER = tar_of(
    entry("bin", kind="dir"),
    entry("bin/sh", b"shell" * 1000, mode=0o4755),
    entry("bin/ash", kind="hard", linkname="bin/sh"),
    entry("bin/bash", kind="link", linkname="sh"),
    entry("etc/passwd", b"root", pax_headers={"SCHILY.xattr.user.note": "x"}),
)
UPPER = tar_of(entry("etc/.wh.passwd"), entry("srv/.wh..wh..opq"), entry("pipe", kind="fifo"))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "images")
    make_layout(tmp_path / "shop", [LOWER, UPPER, LOWER], config={"Cmd": ["/bin/sh"]})
    load_archive(store, tmp_path / "shop", "shop/web:1")
    return store


def saved(store: ImageStore, path: Path, format: Format, *references: str) -> Path:
    with path.open("wb") as out:
        save(store, references, out, format)
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_saved_loads_into_an_empty_store_as_the_same_image(
    store: ImageStore, tmp_path: Path, format: Format
) -> None:
    image = store.resolve("shop/web:1")
    store.tag("shop/web:1", "other:2")
    archive = saved(store, tmp_path / "x.tar", format, "shop/web:1", "other:2")
    loaded = load_archive(ImageStore(tmp_path / "empty"), archive)
    assert {each.config_digest for each in loaded} == {image.config_digest}
    assert {each.diff_ids for each in loaded} == {image.diff_ids}
    assert loaded[-1].names == ("other:2", "shop/web:1")
    assert loaded[0].read_file("/bin/bash") == b"shell" * 1000


def test_an_archive_holds_each_layer_once_and_is_the_same_every_time(store: ImageStore, tmp_path: Path) -> None:
    first = saved(store, tmp_path / "1.tar", "oci-archive", "shop/web:1")
    with tarfile.open(first) as tar:
        names = tar.getnames()
        manifest = json.loads(tar.extractfile(names[names.index("index.json") - 1]).read())  # type: ignore[union-attr]
    assert len(names) == len(set(names)) == 6
    assert [each["mediaType"][-8:] for each in manifest["layers"]] == ["tar+gzip"] * 3
    assert saved(store, tmp_path / "2.tar", "oci-archive", "shop/web:1").read_bytes() == first.read_bytes()


def test_an_image_of_plain_layers_keeps_its_digest(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(LOWER)
    image = import_rootfs(store, tmp_path / "root.tar", "app:1")
    (loaded,) = load_archive(ImageStore(tmp_path / "empty"), saved(store, tmp_path / "x.tar", "oci-archive", "app:1"))
    assert (loaded.digest, loaded.names) == (image.digest, ("app:1",))


def test_a_layout_is_written_with_gzipped_layers(store: ImageStore, tmp_path: Path) -> None:
    digest = write_layout(store, store.resolve("shop/web:1"), tmp_path / "layout", "1")
    manifest = json.loads((tmp_path / "layout/blobs" / digest.replace(":", "/")).read_bytes())
    first = (tmp_path / "layout/blobs" / manifest["layers"][0]["digest"].replace(":", "/")).read_bytes()
    assert (gzip.decompress(first), len(first)) == (LOWER, manifest["layers"][0]["size"])
    (loaded,) = load_archive(ImageStore(tmp_path / "empty"), tmp_path / "layout")
    assert (loaded.digest, loaded.names) == (digest, ("layout:1",))


def test_a_layer_that_was_changed_on_disk_is_never_written_for_what_it_was(store: ImageStore, tmp_path: Path) -> None:
    image = store.resolve("shop/web:1")
    (image.layers[0] / "etc/passwd").write_bytes(b"evil")
    with pytest.raises(WrongState, match=r"(write|rebuild) layer"):
        save(store, ["shop/web:1"], io.BytesIO())
    with pytest.raises(WrongState):
        write_layout(store, image, tmp_path / "layout")


def test_what_is_not_here_is_not_saved(store: ImageStore) -> None:
    with pytest.raises(NotFound):
        save(store, ["shop/web:2"], io.BytesIO())
