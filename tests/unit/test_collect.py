"""Which images a full disk costs: the decision as values, and what becomes of a real store."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from holdfast.config import ImageSettings
from holdfast.errors import NotFound
from holdfast.images.incoming.load import import_rootfs
from holdfast.images.kept.collect import GRACE, ORPHANS, Disk, Stored, choose, collect
from holdfast.images.kept.image import Image
from holdfast.images.kept.store import ImageStore
from holdfast.node.context import Context
from holdfast.node.images import Collector
from holdfast.store import Store
from tars import entry, tar_of

NOW = 1_000_000.0
SIZES = {"base": 100, "a": 10, "b": 20, "c": 30}
A = Stored("A", ("base", "a"), NOW - 9000)
B = Stored("B", ("base", "b"), NOW - 8000)
C = Stored("C", ("c",), NOW - 7000)


def chosen(images: Sequence[Stored], excess: int, *used: str) -> list[str]:
    return choose(images, SIZES, used, excess, NOW)


def test_the_least_recently_used_goes_first_and_no_more_than_is_needed() -> None:
    assert chosen([C, B, A], 1) == ["A"]
    assert chosen([C, B, A], 10) == ["A"]
    assert chosen([C, B, A], 11) == ["A", "B"]
    assert chosen([C, B, A], 131) == ["A", "B", "C"]
    assert chosen([C, B, A], 0) == []


def test_a_shared_layer_is_freed_with_the_last_image_that_needs_it() -> None:
    assert chosen([A, B, C], 110) == ["A", "B"]


def test_what_is_in_use_stays_and_its_layers_count_for_nothing() -> None:
    assert chosen([A, B, C], 1000, "A") == ["B", "C"]
    assert chosen([A, B, C], 1000, "A", "B", "C") == []


def test_an_image_that_would_free_nothing_stays() -> None:
    assert chosen([Stored("twin", A.layers, NOW - 9999), A, C], 30, "A") == ["C"]


def test_what_was_used_or_came_just_now_stays() -> None:
    fresh = Stored("fresh", ("c",), NOW - GRACE + 1)
    assert chosen([fresh], 1) == []
    assert chosen([Stored("old", ("c",), NOW - GRACE)], 1) == ["old"]


def test_the_excess_is_what_lies_above_a_watermark() -> None:
    assert Disk(90, 10).excess(80) == 11
    assert Disk(80, 20).excess(80) == 0
    assert Disk(0, 0).percent == 0


def test_what_nobody_could_bring_back_stays() -> None:
    assert chosen([Stored("mine", ("c",), NOW - 9000, unique=True), A], 1000) == ["A"]


def fetch(store: ImageStore, tar: Path, name: str) -> Image:
    """An image as if a registry had it."""
    image = import_rootfs(store, tar, name)
    return store.add_image(
        store.read_blob(image.digest), store.read_blob(image.config_digest), [name], source="registry"
    )


class World:
    """A store on a disk that holds nothing else, 10,240 plain archive bytes to an image."""

    def __init__(self, root: Path) -> None:
        self.store = ImageStore(root / "images", ImageSettings(high_watermark=80, low_watermark=50))
        self.root = root
        self.capacity = 51_200

    def make(self, name: str, age: float = 10 * GRACE) -> Image:
        path = _tar(self.root / f"{name}.tar", name)
        image = fetch(self.store, path, name)
        when = time.time() - age
        os.utime(self.store.root / "blobs/sha256" / image.digest[7:], (when, when))
        return image

    def look(self) -> Disk:
        used = sum(self.store.layers.facts(each).size for each in self.store.layers.all())
        return Disk(used, self.capacity - used)

    def here(self) -> set[str]:
        return {image.names[0].partition(":")[0] for image in self.store.list() if image.layers[0].is_dir()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_above_the_high_watermark_images_go_until_the_low_one(world: World) -> None:
    for age, name in enumerate("edcba"):
        world.make(name, 10 * GRACE + age)
    done = collect(world.store, dict, look=world.look)
    assert world.here() == {"e", "d"}
    assert (len(done.freed.images), done.freed.size, done.full) == (3, 30_720, False)
    assert collect(world.store, dict, look=world.look).freed.images == ()


def test_what_was_imported_by_hand_stays_and_goes_by_hand(world: World) -> None:
    for name in "abcde":
        import_rootfs(world.store, _tar(world.root / f"{name}.tar", name), name)
    assert collect(world.store, dict, look=world.look, now=time.time() + 2 * GRACE).full
    assert world.here() == set("abcde")
    world.store.tag("a", "z")
    world.store.remove("a")
    world.store.remove("z")
    assert world.here() == set("bcde")


def _tar(path: Path, name: str) -> Path:
    path.write_bytes(tar_of(entry(name, b"x")))
    return path


def test_below_the_high_watermark_nothing_goes(world: World) -> None:
    for name in "abcd":
        world.make(name)
    assert collect(world.store, dict, look=world.look).freed.size == 0
    assert world.here() == set("abcd")


def test_used_images_stay_however_full_it_is_and_that_is_said(world: World) -> None:
    used = {world.make(name).digest: ["shop/web"] for name in "abcde"}
    done = collect(world.store, lambda: used, look=world.look)
    assert (done.freed.images, done.full, done.percent) == ((), True, 100.0)
    assert world.here() == set("abcde")


def test_use_is_remembered_for_when_it_has_ended(world: World) -> None:
    digests = {name: world.make(name).digest for name in "abcde"}
    world.capacity = 1_000_000
    collect(world.store, lambda: {digests["a"]: ["shop/web"]}, look=world.look)
    world.capacity = 51_200
    assert collect(world.store, dict, look=world.look, now=time.time() + 2 * GRACE).freed.images
    assert "a" in world.here()


def test_nothing_goes_while_something_is_put_in(world: World) -> None:
    for name in "abcde":
        world.make(name)
    with world.store.keep():
        assert collect(world.store, dict, look=world.look).freed.size == 0
    assert collect(world.store, dict, look=world.look).freed.size


def test_layers_of_a_pull_that_broke_off_wait_for_its_next_try_but_not_for_ever(world: World) -> None:
    (world.root / "x.tar").write_bytes(tar_of(entry("x", b"x")))
    with (world.root / "x.tar").open("rb") as stream:
        layer = world.store.layers.add(stream)
    collect(world.store, dict, look=world.look)
    assert world.store.layers.has(layer.diff_id)
    done = collect(world.store, dict, look=world.look, now=time.time() + ORPHANS + 1)
    assert (done.freed.layers, done.freed.size) == ((layer.diff_id,), layer.size)
    assert not list((world.store.root / "layers/sha256").iterdir())


def test_images_that_are_put_to_use_beside_collections_never_lose_a_layer(world: World) -> None:
    """Stagers resolve an image while they keep the store, say that it is used, and then read it for a while."""
    world.capacity = 1  # always full
    tars = [world.root / f"{number}.tar" for number in range(6)]
    for number, path in enumerate(tars):
        path.write_bytes(tar_of(entry("file", str(number).encode())))
    used: dict[str, list[str]] = {}
    lock, stop = threading.Lock(), threading.Event()
    wrong: list[object] = []
    uses: list[int] = []

    def in_use() -> dict[str, list[str]]:
        with lock:
            return {digest: list(users) for digest, users in used.items() if users}

    def stage(number: int) -> None:
        try:
            for _ in range(25):
                with world.store.keep():
                    try:
                        image = world.store.resolve(f"app:{number}")
                    except NotFound:
                        image = fetch(world.store, tars[number], f"app:{number}")
                    with lock:
                        used.setdefault(image.digest, []).append("x")
                read = {image.read_file("/file") for _ in range(20)}
                if read != {str(number).encode()}:
                    wrong.append(number)
                with lock:
                    used[image.digest].remove("x")
                uses.append(number)
        except Exception as error:
            wrong.append(error)

    def collecting() -> Iterator[int]:
        while not stop.is_set():
            yield len(
                collect(world.store, in_use, look=lambda: Disk(100, 0), now=time.time() + 2 * GRACE).freed.images
            )

    freed: list[int] = []
    collector = threading.Thread(target=lambda: freed.extend(collecting()))
    stagers = [threading.Thread(target=stage, args=(number % 6,)) for number in range(8)]
    for thread in (collector, *stagers):
        thread.start()
    for thread in stagers:
        thread.join()
    stop.set()
    collector.join()
    assert (wrong, len(uses)) == ([], 200)
    assert sum(freed) > 0


def test_a_disk_that_stays_full_is_told_of_once(tmp_path: Path) -> None:
    images = ImageStore(tmp_path / "images", ImageSettings(high_watermark=0.0001, low_watermark=0.0001))
    store = Store(tmp_path / "state.db")
    collector = Collector(cast(Context, SimpleNamespace(images=images, store=store)))
    for _ in range(3):
        collector.collect()
    images.settings = ImageSettings(high_watermark=100, low_watermark=100)
    collector.collect()
    assert [event["kind"] for event in store.events()] == ["full"]
    images.settings = ImageSettings(high_watermark=0.0001, low_watermark=0.0001)
    collector.collect()
    assert [event["kind"] for event in store.events()] == ["full", "full"]
    store.close()
