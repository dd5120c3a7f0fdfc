"""The image store: names, digests, what is removed and what stays, and what a crash or a race leaves."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from holdfast.errors import Conflict, NotFound, TryAgain, WrongCall, WrongState
from holdfast.images.disk import Locks
from holdfast.images.incoming.load import import_rootfs, load_archive
from holdfast.images.kept.image import Freed, Image, Source
from holdfast.images.kept.store import ImageStore
from holdfast.images.unpacking.unpack import Expected
from layouts import Layout, digest_of, files_below
from tars import ROOTFS, entry, tar_of


def test_files_are_looked_up_without_mounting(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "app")
    mode = image.lookup("/bin/ash")
    assert mode is not None
    assert stat.S_ISREG(mode) and mode & 0o111
    assert image.lookup("/bin/bash") is None
    assert image.read_file("/etc/passwd") == b"root"
    assert image.read_file("/etc") is None


def test_an_unknown_name_says_what_is_near_and_how_to_get_it(store: ImageStore, rootfs: Path) -> None:
    import_rootfs(store, rootfs, "shop/web:1.27")
    with pytest.raises(NotFound, match=r"did you mean 'shop/web:1.27'\? \(.*`holdfast image pull`"):
        store.resolve("shop/web:1.26")


@pytest.mark.parametrize(
    ("wanted", "offered"),
    [
        ("shop/web:9", "shop/web:1.27"),
        ("shop/wbe:1.27", "shop/web:1.27"),
        ("other.test:5000/web", "shop/web:1.27"),
        ("shop/api:1.27", ""),
        ("docker.io/library/x:1.27", ""),
    ],
)
def test_a_name_is_offered_for_its_repository_or_the_end_of_it(
    store: ImageStore, rootfs: Path, wanted: str, offered: str
) -> None:
    for name in ("shop/web:1.27", "shop/db:9"):
        import_rootfs(store, rootfs, name)
    with pytest.raises(NotFound) as raised:
        store.resolve(wanted)
    assert str(raised.value).partition("did you mean ")[2].partition("?")[0] == (repr(offered) if offered else "")


def test_removal_keeps_what_others_need(store: ImageStore, rootfs: Path, layout: Layout) -> None:
    import_rootfs(store, rootfs, "one")
    import_rootfs(store, rootfs, "same")
    layout.tag(layout.image([ROOTFS, tar_of(entry("x", b"1"))]), "two:1")
    two = load_archive(store, layout.path)[0]
    store.remove("one")
    assert [image.names for image in store.list()] == [("same:latest",), ("two:1",)]
    store.remove("two:1")
    assert [layer.is_dir() for layer in two.layers] == [True, False]
    store.remove(store.resolve("same").digest)
    assert files_below(store.root) == ["index.json"]
    with pytest.raises(NotFound):
        store.remove("same")


def test_an_image_in_use_is_not_removed_but_may_lose_a_name(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "one")
    import_rootfs(store, rootfs, "two")
    store.remove("one", lambda: {image.digest: ["shop/web"]})
    with pytest.raises(Conflict, match=r"remove image 'two': in use by shop/web"):
        store.remove("two", lambda: {image.digest: ["shop/web"]})
    with pytest.raises(Conflict):
        store.remove(image.digest, lambda: {image.digest: ()})
    assert store.resolve("two").digest == image.digest


def test_a_used_image_outlives_the_name_that_moved_on(store: ImageStore, rootfs: Path, tmp_path: Path) -> None:
    old = import_rootfs(store, rootfs, "app")
    (tmp_path / "new.tar").write_bytes(tar_of(entry("new", b"1")))
    import_rootfs(store, tmp_path / "new.tar", "app")
    import_rootfs(store, tmp_path / "new.tar", "other")
    store.remove("other", lambda: {old.digest: ()})
    assert store.get(old.digest).layers == old.layers
    assert store.prune(lambda: {old.digest: ()}) == Freed()
    freed = store.prune()
    assert (freed.images, freed.layers, freed.size) == ((old.digest,), old.diff_ids, old.size)
    with pytest.raises(NotFound):
        store.get(old.digest)


def test_what_a_killed_load_left_is_swept_and_counts_for_nothing(store: ImageStore, rootfs: Path) -> None:
    half = store.root / "partial" / hashlib.sha256(ROOTFS).hexdigest()
    half.mkdir()
    (half / "bin").mkdir()
    half.with_name(f"{half.name}.lock").touch()
    again = ImageStore(store.root)
    assert [path.name for path in (store.root / "partial").iterdir()] == []
    assert import_rootfs(again, rootfs, "app").read_file("/bin/sh") == b"shell"


def test_what_another_process_is_unpacking_is_not_swept(store: ImageStore) -> None:
    with Locks(store.partial, frozenset()).hold("busy"):
        (store.root / "partial/busy").mkdir()
        ImageStore(store.root)
        assert (store.root / "partial/busy").is_dir()


def test_several_loads_of_the_same_layers_at_once_agree(tmp_path: Path, layout: Layout) -> None:
    layers = [tar_of(*(entry(f"{name}/{n}", b"x" * 5000) for n in range(100))) for name in "abc"]
    layout.tag(layout.image(layers), "x:1")

    def load(_: int) -> Image:
        return load_archive(ImageStore(tmp_path / "images"), layout.path)[0]

    with ThreadPoolExecutor(8) as threads:
        images = list(threads.map(load, range(8)))
    assert len({image.digest for image in images}) == 1
    assert all(len(list(layer.rglob("*"))) == 101 for layer in images[0].layers)
    assert {path.name for path in (tmp_path / "images/partial").iterdir()} <= {"store.lock", "index.lock"}


def test_a_lost_layer_is_named_and_comes_back_with_the_next_load(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "app")
    image.layers[0].rename(rootfs.with_name("lost"))
    with pytest.raises(NotFound, match="is gone"):
        store.resolve("app")
    assert store.list()[0].digest == image.digest
    assert import_rootfs(store, rootfs, "app") == store.resolve("app")


def pulled(store: ImageStore, layout: Layout, *names: str, source: Source = "registry") -> tuple[Image, str]:
    """An image that an index led to, as a puller puts it in; and the index's digest."""
    descriptor = layout.image([ROOTFS, tar_of(entry("v", str(names).encode()))])
    manifest = layout.json(descriptor["digest"])
    top = json.dumps({"schemaVersion": 2, "manifests": [{"digest": "sha256:" + "0" * 64}, descriptor]}).encode()
    with store.keep():
        for layer in manifest["layers"]:
            store.layers.add(io.BytesIO(layout.read(layer["digest"])))
        documents = layout.read(descriptor["digest"]), layout.read(manifest["config"]["digest"])
        return store.add_image(*documents, names, source=source, top=top), digest_of(top)


def test_an_image_is_found_by_every_digest_that_leads_to_it(store: ImageStore, layout: Layout, rootfs: Path) -> None:
    image, top = pulled(store, layout, "registry.example/app:1")
    other = import_rootfs(store, rootfs, "other")
    for reference in (
        image.digest,
        image.config_digest,
        top,
        f"registry.example/app@{top}",
        f"registry.example/app:1@{image.digest}",
        image.digest[7:19],
        image.config_digest[:20],
    ):
        assert store.resolve(reference) == image, reference
    assert store.names()["registry.example/app:1"].top == top
    assert store.read_blob(top)
    assert store.resolve(other.digest[7:15]) == other
    for reference in ("sha256:" + "0" * 64, "registry.example/app@sha256:" + "0" * 64, "0" * 12):
        with pytest.raises(NotFound, match=reference[-12:]):
            store.resolve(reference)
    store.remove("registry.example/app:1")
    assert files_below(store.root / "blobs/sha256") == sorted(
        digest.removeprefix("sha256:") for digest in (other.digest, other.config_digest)
    )


def test_an_index_that_is_pinned_leads_to_its_image_without_any_name(store: ImageStore, layout: Layout) -> None:
    image, top = pulled(store, layout)
    assert store.names() == {} and store.list() == []
    assert store.list(dangling=True) == [image] == [store.resolve(f"app@{top}")]
    assert store.prune(lambda: {image.digest: ()}) == Freed()
    assert store.resolve(top) == image
    assert store.prune().images == (image.digest,)
    assert files_below(store.root / "blobs") == []


def test_a_configuration_that_is_not_the_manifests_is_refused(store: ImageStore, layout: Layout) -> None:
    image, _ = pulled(store, layout, "app")
    manifest, config = store.read_blob(image.digest), store.read_blob(image.config_digest)
    with pytest.raises(WrongState, match=r"store image .*other.*its configuration is"):
        store.add_image(manifest, config + b" ", ["other"], source="registry")
    with pytest.raises(WrongState, match="it is no image"):
        store.add_image(b"{}", config, ["other"], source="registry")
    store.layers.drop(image.diff_ids[0])
    with pytest.raises(NotFound, match=r"its layer sha256:.* is not here"):
        store.add_image(manifest, config, ["other"], source="registry")
    assert set(store.names()) == {"docker.io/library/app:latest"}


def test_names_remember_where_they_came_from(store: ImageStore, layout: Layout, rootfs: Path) -> None:
    import_rootfs(store, rootfs, "a")
    image, top = pulled(store, layout, "b")
    store.tag("b", "registry.example/c:2")
    found = {name.rpartition("/")[2]: (each.source, each.top) for name, each in store.names().items()}
    assert found == {
        "a:latest": ("import", store.resolve("a").digest),
        "b:latest": ("registry", top),
        "c:2": ("tag", top),
    }
    assert store.resolve("registry.example/c:2").digest == image.digest
    with pytest.raises(WrongCall, match="not a name to give"):
        store.tag("b", f"c@{image.digest}")
    with pytest.raises(NotFound):
        store.tag("nothing", "d")


def test_an_older_store_is_read(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "app")
    (store.root / "index.json").write_text(json.dumps({"docker.io/library/app:latest": image.digest}))
    layer = image.layers[0]
    layer.with_suffix(".json").unlink()
    layer.with_suffix(".recipe").unlink()
    layer.with_suffix(".size").write_text(str(len(ROOTFS)))
    again = ImageStore(store.root)
    assert again.resolve("app") == image
    name = again.names()["docker.io/library/app:latest"]
    assert (name.digest, name.top, name.source, name.at) == (image.digest, image.digest, "load", 0.0)
    again.remove("app")
    assert files_below(store.root) == ["index.json"]


def test_of_two_who_bring_a_layer_one_works_and_the_other_waits_for_it(store: ImageStore) -> None:
    diff_id = digest_of(ROOTFS)
    (first, feed), (second, unused) = os.pipe(), os.pipe()
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(store.layers.add, first, Expected(diff_id))
        while not any(path.is_dir() for path in store.partial.iterdir()):
            assert not one.done()
        other = ImageStore(store.root)
        two = threads.submit(other.layers.add, second, Expected(diff_id))  # nothing ever comes out of that pipe
        os.write(feed, ROOTFS)
        os.close(feed)
        found = one.result(20)
        assert two.result(20) == found
    assert (found.diff_id, found.size) == (diff_id, len(ROOTFS))
    for descriptor in (first, second, unused):
        os.close(descriptor)


def test_what_loses_its_name_while_something_is_put_in_goes_later(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "app")
    with store.keep():
        assert store.remove("app") == Freed()
        assert store.get(image.digest).names == ()
        with pytest.raises(TryAgain, match="is being pulled"):
            store.prune(patience=0.1)
    assert store.prune().images == (image.digest,)


def test_prune_by_hand_takes_what_a_pull_that_broke_off_has_left(store: ImageStore, rootfs: Path) -> None:
    kept = import_rootfs(store, rootfs, "app")
    with store.keep():
        left = store.layers.add(io.BytesIO(tar_of(entry("left", b"1"))))
    freed = store.prune()
    assert (freed.images, freed.layers, freed.size) == ((), (left.diff_id,), left.size)
    assert store.layers.all() == list(kept.diff_ids)
    assert store.resolve("app") == kept


def test_an_image_whose_configuration_is_lost_can_be_taken_away(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "app")
    (store.root / "blobs/sha256" / image.config_digest[7:]).unlink()
    again = ImageStore(store.root)
    with pytest.raises(NotFound):
        again.resolve("app")
    assert again.list(dangling=True) == []
    assert again.remove("app").images == (image.digest,)
    with again.alone():
        assert again.delete_orphans(time.time() + 1).layers == image.diff_ids
    assert files_below(store.root) == ["index.json"]


def test_what_a_crash_left_of_the_index_goes(store: ImageStore) -> None:
    (store.root / "index.json.0f58.new").write_bytes(b"{")
    with store.alone():
        store.delete_orphans(0.0)
    assert files_below(store.root) == []


def test_a_layer_that_others_need_is_not_freed(store: ImageStore, layout: Layout, rootfs: Path) -> None:
    plain = import_rootfs(store, rootfs, "plain")
    image, _ = pulled(store, layout, "app")
    freed = store.remove("app")
    assert (freed.images, freed.layers) == ((image.digest,), (image.diff_ids[1],))
    assert freed.size == image.size - plain.size
    assert store.get(plain.digest) == plain


def test_a_scratch_folder_goes_with_its_block_and_is_not_swept_before(store: ImageStore) -> None:
    with store.layers.scratch() as folder:
        (folder / "x").write_text("x")
        ImageStore(store.root)
        assert (folder / "x").exists()
    assert not folder.exists()
