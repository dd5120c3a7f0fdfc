"""The image store: import, load, resolve, remove, and what a crash or a race leaves."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from holdfast.errors import Conflict, HoldfastError, NotFound, TryAgain, WrongCall, WrongState
from holdfast.grammar.images import Reference, familiar
from holdfast.images.disk import Locks
from holdfast.images.formats.manifests import architecture
from holdfast.images.formats.references import parse, parse_changes
from holdfast.images.incoming.load import import_rootfs, load_archive
from holdfast.images.incoming.pull import Puller
from holdfast.images.incoming.transfers import Transfer
from holdfast.images.kept.image import Freed, Image, Source
from holdfast.images.kept.store import ImageStore
from holdfast.images.registry.faults import failure
from holdfast.images.registry.skopeo import Skopeo
from holdfast.images.unpacking.unpack import Expected
from holdfast.node.context import Context
from holdfast.node.images import ImageAnswers
from holdfast.runtime.content import ContentStore
from tars import entry, tar_of

ROOTFS = tar_of(
    entry("bin/sh", b"shell", mode=0o755), entry("bin/ash", kind="link", linkname="sh"), entry("etc/passwd", b"root")
)
CHANGES = ['CMD ["/bin/sh", "-l"]', "ENV A=1", "USER nobody"]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    path = tmp_path / "rootfs.tar"
    path.write_bytes(ROOTFS)
    return path


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An OCI layout that is written by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, **descriptor: Any) -> dict[str, Any]:
        digest = digest_of(data)
        (self.path / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(data)
        return {"digest": digest, "size": len(data), **descriptor}

    def image(self, *layers: bytes, name: str = "", machine: str = "", diff_ids: list[str] | None = None) -> Any:
        config = {
            "architecture": machine or architecture(),
            "os": "linux",
            "created": "2026-01-02T03:04:05.123456789Z",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids or [digest_of(layer) for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "config": self.blob(json.dumps(config).encode()),
            "layers": [self.blob(gzip.compress(layer)) for layer in layers],
        }
        notes = {"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}
        return self.blob(json.dumps(manifest).encode(), **notes)

    def index(self, *manifests: Any) -> Path:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
        return self.path

    def archive(self, path: Path) -> Path:
        with tarfile.open(path, "w") as tar:
            tar.add(self.path, arcname=".")
        return path


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "shop")


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


def files_below(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


def test_an_imported_root_file_system_is_an_image(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "app:1", CHANGES)
    assert image.config == {"Cmd": ["/bin/sh", "-l"], "Env": ["A=1"], "User": "nobody"}
    assert (image.names, image.size, image.architecture) == (("app:1",), len(ROOTFS), architecture())
    assert image.created == 1_000_000_000
    assert image.layers == (store.root / "layers/sha256" / hashlib.sha256(ROOTFS).hexdigest(),)
    assert image == store.resolve("docker.io/library/app:1") == store.get(image.digest) == store.resolve(image.digest)
    assert store.list() == [image]


def test_files_are_looked_up_without_mounting(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "app")
    mode = image.lookup("/bin/ash")
    assert mode is not None
    assert stat.S_ISREG(mode) and mode & 0o111
    assert image.lookup("/bin/bash") is None
    assert image.read_file("/etc/passwd") == b"root"
    assert image.read_file("/etc") is None


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
    descriptor = layout.image(ROOTFS, upper, name="1.0")
    (image,) = load_archive(store, layout.index(descriptor))
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
    descriptor = layout.image(ROOTFS, name="registry.example:5000/a/b:1")
    layout.index(descriptor)
    archive = layout.archive(tmp_path / "oci.tar")
    archive.write_bytes(compress(archive.read_bytes()))
    docker = docker_archive(tmp_path / "docker.tar")
    docker.write_bytes(compress(docker.read_bytes()))
    assert [image.digest for image in load_archive(store, archive)] == [descriptor["digest"]]
    (image,) = load_archive(store, docker)
    assert image.names == ("shop/web:2",)
    assert len(image.layers) == 2
    assert store.resolve("registry.example:5000/a/b:1").layers[0] == image.layers[0]
    assert load_archive(store, docker, "other:3")[0].names == ("other:3", "shop/web:2")


def test_of_an_index_the_image_for_this_host_is_taken(store: ImageStore, layout: Layout) -> None:
    ours = {**layout.image(ROOTFS), "platform": {"os": "linux", "architecture": architecture()}}
    theirs = {**layout.image(ROOTFS, machine="vax"), "platform": {"os": "linux", "architecture": "vax"}}
    index = {"schemaVersion": 2, "manifests": [theirs, ours]}
    nested = layout.blob(
        json.dumps(index).encode(),
        mediaType="application/vnd.oci.image.index.v1+json",
        annotations={"io.containerd.image.name": "docker.io/library/both:1"},
    )
    (image,) = load_archive(store, layout.index(nested))
    assert (image.digest, image.names) == (ours["digest"], ("both:1",))
    with pytest.raises(WrongState, match=r"no image for linux/.*it has: linux/vax"):
        load_archive(store, layout.index(theirs))


def test_another_architecture_is_refused(store: ImageStore, layout: Layout) -> None:
    with pytest.raises(WrongState, match=rf"is for linux/vax \(expected linux/{architecture()}\)"):
        load_archive(store, layout.index(layout.image(ROOTFS, name="x:1", machine="vax")))
    assert store.list() == []


def test_damage_is_noticed_and_leaves_nothing(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(WrongState, match=r"load '.*shop': unpack layer '.*0000"):
        load_archive(store, layout.index(layout.image(ROOTFS, name="x:1", diff_ids=["sha256:" + "0" * 64])))
    descriptor = layout.image(ROOTFS, name="y:1")
    (layout.path / "blobs" / descriptor["digest"].replace(":", "/")).write_bytes(b"{}")
    with pytest.raises(WrongState, match="is damaged"):
        load_archive(store, layout.index(descriptor))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(ROOTFS)[:100])
    with pytest.raises(WrongState):
        import_rootfs(store, tmp_path / "cut.gz", "z")
    for name, content in (("text", b"hello" * 1000), ("tar", ROOTFS)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WrongState, match=r"no tar archive|neither an OCI layout nor"):
            load_archive(store, tmp_path / name)
    assert files_below(store.root) == []


def test_a_missing_file_and_a_missing_name_are_wrong_calls(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        import_rootfs(store, tmp_path / "no", "x")
    with pytest.raises(NotFound, match="no such file"):
        load_archive(store, tmp_path / "no")
    with pytest.raises(WrongCall, match="has no name"):
        load_archive(store, layout.index(layout.image(ROOTFS)))


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
    two = load_archive(store, layout.index(layout.image(ROOTFS, tar_of(entry("x", b"1")), name="two:1")))[0]
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
    store.remove("one", {image.digest: ["shop/web"]})
    with pytest.raises(Conflict, match=r"remove image 'two': in use by shop/web"):
        store.remove("two", {image.digest: ["shop/web"]})
    with pytest.raises(Conflict):
        store.remove(image.digest, {image.digest})
    assert store.resolve("two").digest == image.digest


def test_a_used_image_outlives_the_name_that_moved_on(store: ImageStore, rootfs: Path, tmp_path: Path) -> None:
    old = import_rootfs(store, rootfs, "app")
    (tmp_path / "new.tar").write_bytes(tar_of(entry("new", b"1")))
    import_rootfs(store, tmp_path / "new.tar", "app")
    import_rootfs(store, tmp_path / "new.tar", "other")
    store.remove("other", {old.digest})
    assert store.get(old.digest).layers == old.layers
    assert store.prune({old.digest}) == Freed()
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
    path = layout.index(layout.image(*layers, name="x:1"))

    def load(_: int) -> Image:
        return load_archive(ImageStore(tmp_path / "images"), path)[0]

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
    descriptor = layout.image(ROOTFS, tar_of(entry("v", str(names).encode())))
    manifest = (layout.path / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()
    config = (layout.path / "blobs" / json.loads(manifest)["config"]["digest"].replace(":", "/")).read_bytes()
    top = json.dumps({"schemaVersion": 2, "manifests": [{"digest": "sha256:" + "0" * 64}, descriptor]}).encode()
    with store.keep():
        for layer in json.loads(manifest)["layers"]:
            with (layout.path / "blobs" / layer["digest"].replace(":", "/")).open("rb") as stream:
                store.add_layer(stream)
        return store.add_image(manifest, config, names, source=source, top=top), digest_of(top)


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
    assert store.prune({image.digest}) == Freed()
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


def test_a_store_of_old_is_read(store: ImageStore, rootfs: Path) -> None:
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
        one = threads.submit(store.add_layer, first, Expected(diff_id))
        while not any(path.is_dir() for path in store.partial.iterdir()):
            assert not one.done()
        other = ImageStore(store.root)
        two = threads.submit(other.add_layer, second, Expected(diff_id))  # nothing ever comes out of that pipe
        os.write(feed, ROOTFS)
        os.close(feed)
        found = one.result(20)
        assert two.result(20) == found
    assert (found.diff_id, found.size) == (diff_id, len(ROOTFS))
    for descriptor in (first, second, unused):
        os.close(descriptor)


def test_what_loses_its_name_while_something_is_put_in_goes_later(
    store: ImageStore, rootfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.images.kept.store.PATIENCE", 0.1)
    image = import_rootfs(store, rootfs, "app")
    with store.keep():
        assert store.remove("app") == Freed()
        assert store.get(image.digest).names == ()
        with pytest.raises(TryAgain, match="is being pulled"):
            store.prune()
    assert store.prune().images == (image.digest,)


def test_prune_by_hand_takes_what_a_pull_that_broke_off_has_left(store: ImageStore, rootfs: Path) -> None:
    kept = import_rootfs(store, rootfs, "app")
    with store.keep():
        left = store.add_layer(io.BytesIO(tar_of(entry("left", b"1"))))
    freed = store.prune()
    assert (freed.images, freed.layers, freed.size) == ((), (left.diff_id,), left.size)
    assert store.layers.all() == list(kept.diff_ids)
    assert store.resolve("app") == kept


def answers_of(store: ImageStore, puller: Any) -> tuple[ImageAnswers, list[tuple[str, str, str]]]:
    """What answers for a store and a puller, and the events that are told meanwhile."""
    told: list[tuple[str, str, str]] = []
    events = SimpleNamespace(event=lambda *words, **_: told.append(words), retry_now=lambda: None)
    return ImageAnswers(cast(Context, SimpleNamespace(images=store, puller=puller, store=events))), told


def test_a_pull_by_hand_that_fails_is_told_as_an_event(store: ImageStore) -> None:
    def pull(ref: str, *, watch: Any) -> Image:
        watch(Transfer(ref))
        time.sleep(0.2)
        raise NotFound(f"pull {ref!r}: the registry has no such image (404)")

    answers, told = answers_of(store, SimpleNamespace(pull=pull))
    steps = answers.pull_image("r.test/app:1")
    assert [each["ref"] for each in next(steps)["transfers"]] == ["r.test/app:1"]
    with pytest.raises(NotFound):
        list(steps)
    assert told == [("failed", "r.test/app:1", "pull 'r.test/app:1': the registry has no such image (404)")]


def test_what_no_registry_has_is_not_asked_for(store: ImageStore, rootfs: Path) -> None:
    image = import_rootfs(store, rootfs, "app")
    answers, told = answers_of(store, Puller(store))
    for ref, expected in {
        "images.web": "is built, not pulled",
        image.digest: "names no registry, and the image is here already",
        image.config_digest: "is here already",
        f"sha256:{'0' * 64}": "names no registry [(]expected NAME@sha256:0",
    }.items():
        with pytest.raises(WrongCall, match=expected):
            list(answers.pull_image(ref))
    assert told == []


def test_a_name_without_a_tag_says_which_one_was_asked_for(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def manifest(
        _self: Skopeo, _reference: Reference, _name: str, as_written: str, _deadline: float | None = None
    ) -> bytes:
        raise failure(NotFound, f"pull {as_written!r}: the registry has no such image (404)", 60.0)

    monkeypatch.setattr(Skopeo, "manifest", manifest)
    for ref, end in {
        "r.test:5000/web": "(404) as ':latest', for no tag is written (expected r.test:5000/web:TAG)",
        "r.test:5000/web:latest": "(404)",
        f"r.test/web@sha256:{'0' * 64}": "(404)",
    }.items():
        with pytest.raises(NotFound) as raised:
            Puller(store).resolve(ref)
        assert str(raised.value).endswith(f"no such image {end}")
        assert raised.value.wait == 60.0


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
    with store.scratch() as folder:
        (folder / "x").write_text("x")
        ImageStore(store.root)
        assert (folder / "x").exists()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("reference", "full"),
    [
        ("app", "docker.io/library/app:latest"),
        ("app:1", "docker.io/library/app:1"),
        ("shop/web", "docker.io/shop/web:latest"),
        ("docker.io/app", "docker.io/library/app:latest"),
        ("index.docker.io/library/app", "docker.io/library/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("registry.example:5000/shop/web:1.27", "registry.example:5000/shop/web:1.27"),
        ("ghcr.io/a/b_c--d.e:V1_x", "ghcr.io/a/b_c--d.e:V1_x"),
    ],
)
def test_names_are_completed_as_docker_does(reference: str, full: str) -> None:
    assert parse(reference).name == full
    assert parse(familiar(full)).name == full


@pytest.mark.parametrize("reference", ["", "App", "a b", "app:", "/app", "app/", "../x", "a:b:c", "-a"])
def test_malformed_names_are_refused(reference: str) -> None:
    with pytest.raises(WrongCall, match="image name"):
        parse(reference)


def test_dockerfile_instructions_become_configuration() -> None:
    config = parse_changes(
        [
            "CMD echo hi",
            'entrypoint ["/init"]',
            'ENV A=1 B="x y"',
            "ENV C d e",
            "WORKDIR /w",
            "EXPOSE 80 53/udp",
            "LABEL k=v",
            'VOLUME ["/a b"]',
            "STOPSIGNAL SIGINT",
            "USER 1:2",
        ]
    )
    assert config == {
        "Cmd": ["/bin/sh", "-c", "echo hi"],
        "Entrypoint": ["/init"],
        "Env": ["A=1", "B=x y", "C=d e"],
        "WorkingDir": "/w",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Labels": {"k": "v"},
        "Volumes": {"/a b": {}},
        "StopSignal": "SIGINT",
        "User": "1:2",
    }


@pytest.mark.parametrize("change", ["COPY a b", "ENV", "ENV A=1 b", 'ENV A="', "VOLUME [1"])
def test_wrong_instructions_are_refused(change: str) -> None:
    with pytest.raises(WrongCall, match="change"):
        parse_changes([change])


def test_content_is_stored_once_immutable_and_pruned(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "content")
    file = store.store_file(b"text")
    assert file == hashlib.sha256(b"text").hexdigest()
    tree = store.store_tree({"a/b": file, "c": file})
    assert store.store_tree({"c": file, "a/b": file}) == tree
    assert (store.path(tree) / "a/b").read_bytes() == b"text"
    assert stat.S_IMODE(store.path(file).stat().st_mode) == 0o444
    store.prune({tree})
    assert (store.path(tree) / "c").read_bytes() == b"text"
    with pytest.raises(NotFound):
        store.path(file)
    store.prune(set())
    assert files_below(store.root) == []
    for name in ("/a", "../a", "a//b", ""):
        with pytest.raises(WrongState, match="not a path below"):
            store.store_tree({name: file})


def test_content_is_stored_by_many_at_once(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "content")
    files = {f"d/{number}": store.store_file(b"%d" % number) for number in range(50)}
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(lambda _: store.store_tree(files), range(16)))) == 1
    assert list((store.root / "partial").iterdir()) == []


def test_every_error_here_is_one_line(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(HoldfastError) as caught:
        store.resolve("x" * 10)
    assert "\n" not in str(caught.value)
