"""The store: what is put in is there again after a restart, and a disk that is full is told of, not fallen over."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from holdfast.errors import NotPermitted, UnfitHost
from holdfast.identity import make_id, read_id
from holdfast.observed import Failure, Generation, Hold, Instance, InstanceId, Receipt, Subject
from holdfast.spec.model import App, Container
from holdfast.store import KEPT_GENERATIONS, RESERVE, Store

WEB = Instance(id=InstanceId("i1"), app="shop", container="web", generation=1, want=Container(image="a"), image="sha")
APP = App(name="shop", path="shop.toml", containers={"web": WEB.want})


@contextmanager
def _open(path: Path) -> Iterator[Store]:
    store = Store(path / "state.db")
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with _open(tmp_path) as opened:
        yield opened


@contextmanager
def _full_disk(store: Store) -> Iterator[None]:
    """No page more than there is: what SQLite says then is what it says of a full disk."""
    database = store._db
    room = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {room}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        database.execute("INSERT INTO events (value) VALUES (zeroblob(100000))")
    database.execute("INSERT INTO events (value) VALUES (?)", ("x" * 100,))
    try:
        yield
    finally:
        database.execute("PRAGMA max_page_count = 1000000")


def _big(text: str = "x") -> str:
    return text * 100_000


def test_everything_is_there_again_after_a_restart(tmp_path: Path) -> None:
    receipt = Receipt("rootfs", "overlay", "i1", "i1", {"path": "/x"})
    generation = Generation(app=APP, number=1, state="good", images={"web": "sha"})
    failure = Failure("StartInstance 1", "no", 2, 10.0, None)
    with _open(tmp_path) as store:
        store.put_instance(WEB)
        store.put_receipt(receipt)
        store.put_generation(generation)
        store.hold("shop/web", Hold("stopped", 1.0, "me"))
        store.put_failure(Subject.parse("shop/web"), failure)
        store.put_intent("shop/web", {"verb": "StartInstance"})
        store.put_fact("boot", "b")
        store.event("started", "shop/web", "it is not there")
    with _open(tmp_path) as store:
        assert store.instances == {WEB.id: WEB}
        assert store.instances[WEB.id].want is store.generation("shop", 1).app.containers["web"]
        assert store.owned("i1") == [receipt]
        history = store.history()
        assert history.generations == {"shop": (generation,)}
        assert history.holds == {"shop/web": Hold("stopped", 1.0, "me")}
        assert history.failures == {"shop/web": failure}
        assert store.intents() == {"shop/web": {"verb": "StartInstance"}}
        assert store.fact("boot") == "b"
        assert [event["subject"] for event in store.events()] == ["shop/web"]


def test_receipts_come_back_in_the_order_in_which_things_were_made(tmp_path: Path) -> None:
    made = [
        Receipt("rootfs", "d", "i1", "i1"),
        Receipt("netns", "d", "i1", "i1"),
        Receipt("endpoint", "d", "i1/n", "i1"),
    ]
    with _open(tmp_path) as store:
        for receipt in made:
            store.put_receipt(receipt)
    with _open(tmp_path) as store:
        assert store.owned("i1") == made


def test_what_a_full_disk_has_no_room_for_is_written_later_in_its_order(tmp_path: Path) -> None:
    receipt = Receipt("netns", "kernel", "i1", "i1")
    with _open(tmp_path) as store:
        store.put_instance(WEB)
        store.put_receipt(receipt)
        with _full_disk(store):
            store.put_instance(replace(WEB, image=_big()))
            store.put_instance(replace(WEB, image="newest"))
            store.drop_receipt(receipt)
            store.hold("shop/web", Hold("stopped", 1.0))
            assert store.instances[WEB.id].image == "newest"
            assert store.receipt("netns", "i1") is None
            assert store.late == 3
            assert "full" in store.lacks
            with _open(tmp_path) as other:
                assert other.instances == {WEB.id: WEB}
        assert store.catch_up()
        assert store.lacks == ""
    with _open(tmp_path) as again:
        assert again.instances[WEB.id].image == "newest"
        assert again.owned("i1") == []
        assert again.history().holds == {"shop/web": Hold("stopped", 1.0)}


def test_what_is_made_has_to_be_on_record_before(store: Store) -> None:
    store.need_room()
    with _full_disk(store):
        store.put_intent("shop", {"verb": "StageGeneration", "reason": _big()})
        with pytest.raises(UnfitHost, match=r"full \(free some space there"):
            store.need_room()
    store.need_room()


def test_what_is_late_when_the_store_is_closed_is_written_then_if_it_can_be(tmp_path: Path) -> None:
    with _open(tmp_path) as store, _full_disk(store):
        store.put_fact("boot", _big())
    with _open(tmp_path) as again:
        assert again.fact("boot") == _big()


def test_a_generation_that_is_not_written_down_yet_keeps_its_images(store: Store) -> None:
    with _full_disk(store):
        store.put_generation(Generation(app=APP, number=1, state="good", images={"web": _big("y")}))
        assert ("shop/web", _big("y")) in store.images()


def test_a_damaged_store_is_an_error_and_not_a_full_disk(store: Store) -> None:
    store._db.execute("DROP TABLE holds")
    with pytest.raises(UnfitHost, match="no such table"):
        store.hold("shop/web", Hold("stopped", 1.0))


def test_the_reserve_goes_only_when_it_is_asked_for_and_comes_back(tmp_path: Path) -> None:
    reserve = tmp_path / "reserve"
    with _open(tmp_path) as store:
        store.keep_reserve()
        assert reserve.stat().st_size == RESERVE
        assert reserve.stat().st_blocks * 512 >= RESERVE
        with _full_disk(store):
            store.put_fact("boot", _big())
            assert not store.catch_up()
            assert reserve.exists()
            assert not store.catch_up(give_up=True)
            assert not reserve.exists()
        assert store.catch_up()
        store.keep_reserve()
        assert reserve.exists()


def test_a_failure_is_backed_off_even_on_a_full_disk(store: Store) -> None:
    failure = Failure("StartInstance 1", _big(), 1, 10.0, 20.0)
    with _full_disk(store):
        store.put_failure(Subject.parse("shop/web"), failure)
        assert store.history().failures == {"shop/web": failure}


def test_an_event_that_finds_no_room_holds_up_nothing(store: Store) -> None:
    heard: list[str] = []
    store.listen(lambda event: heard.append(event["message"]))
    with _full_disk(store):
        store.event("started", "shop/web", _big())
    store.event("started", "shop/web", "there is room again")
    assert heard == ["there is room again"]


def test_walking_over_the_instances_is_not_disturbed_by_one_that_comes_or_goes(store: Store) -> None:
    for number in range(3):
        store.put_instance(replace(WEB, id=InstanceId(f"i{number}")))
    seen = []
    for id in store.instances:
        seen.append(id)
        store.drop_instance(id)
        store.put_instance(replace(WEB, id=InstanceId(f"new {id}")))
    assert seen == ["i0", "i1", "i2"]
    assert sorted(store.instances) == ["new i0", "new i1", "new i2"]


def test_an_instance_that_somebody_else_has_changed_is_not_exchanged(store: Store) -> None:
    store.put_instance(WEB)
    ours = replace(WEB, phase="exited")
    theirs = store.change_instance(WEB.id, phase="running")
    assert not store.exchange_instance(WEB, ours)
    assert store.instances[WEB.id] == theirs
    assert store.exchange_instance(theirs, ours)
    assert store.instances[WEB.id] == ours


def test_old_generations_go_but_never_the_one_in_force(store: Store) -> None:
    store.put_generation(Generation(app=APP, number=1, state="good"))
    for number in range(2, 9):
        store.put_generation(Generation(app=APP, number=number, state="staged"))
    kept = [each.number for each in store.history().generations["shop"]]
    assert kept == [1, *range(9 - KEPT_GENERATIONS, 9)]


def test_what_another_process_has_staged_counts_among_the_images(tmp_path: Path) -> None:
    with _open(tmp_path) as command, _open(tmp_path) as agent:
        agent.put_generation(Generation(app=APP, number=1, state="staged", images={"web": "new"}))
        agent.put_instance(WEB)
        assert command.images() == agent.images() == [("shop/web", "new"), ("shop/web", "sha")]


def test_a_generation_never_moves_back(store: Store) -> None:
    store.put_generation(Generation(app=APP, number=1, state="good"))
    store.mark_generation("shop", 1, "active")
    assert store.generation("shop", 1).state == "good"


def test_a_generation_that_has_come_further_is_not_written_again(store: Store) -> None:
    store.put_generation(Generation(app=APP, number=1, state="staged"))
    written: list[str] = []
    store._db.set_trace_callback(written.append)
    store.mark_generation("shop", 1, "good")
    assert written == ["UPDATE generations SET state = 'good' WHERE app = 'shop' AND number = 1"]
    with _open(store.path.parent) as again:
        assert again.generation("shop", 1).state == "good"


def test_the_past_is_the_same_object_until_it_changes(store: Store) -> None:
    store.put_generation(Generation(app=APP, number=1, state="staged"))
    before = store.history()
    assert store.history() is before
    store.hold("shop/web", Hold("stopped", 1.0))
    assert store.history() is not before
    assert store.history().generations["shop"] is before.generations["shop"]


def test_a_store_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    with _open(tmp_path) as store:
        store.put_generation(Generation(app=APP, number=1, state="good"))
    whole = TypeAdapter(Generation).dump_json(Generation(app=APP, number=1, state="good"))
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as db:
        db.execute("UPDATE generations SET value = ?", (whole,))
        db.execute("DROP TABLE containers")
        db.execute("ALTER TABLE generations DROP COLUMN state")
        db.execute("PRAGMA user_version = 1")
    with _open(tmp_path) as store:
        assert store.generation("shop", 1) == Generation(app=APP, number=1, state="good")
        store.put_generation(Generation(app=APP, number=2, state="staged"))
        store.mark_generation("shop", 2, "active")
    with _open(tmp_path) as store:
        assert [each.state for each in store.history().generations["shop"]] == ["good", "active"]


def test_containers_are_written_once_for_all_generations_that_ask_the_same(tmp_path: Path) -> None:
    def containers() -> int:
        with closing(sqlite3.connect(tmp_path / "state.db")) as db:
            return int(db.execute("SELECT count(*) FROM containers").fetchone()[0])

    base = {f"c{number}": Container(image=f"b:{number}") for number in range(10)}
    with _open(tmp_path) as store:
        for number in range(1, 10):
            changed = {**base, "c0": Container(image=f"edited:{number}")}
            app = App(name="shop", path="shop.toml", containers=changed)
            store.put_generation(Generation(app=app, number=number, state="good"))
            assert containers() == 9 + min(number, KEPT_GENERATIONS)
    with _open(tmp_path) as store:
        known = store.history().generations["shop"]
        assert [each.app.containers["c0"].image for each in known] == [f"edited:{number}" for number in range(5, 10)]
        assert known[0].app.containers["c5"] is known[-1].app.containers["c5"]
        store.forget_app("shop")
        assert containers() == 0


def test_a_forgotten_app_leaves_nothing_and_others_alone(store: Store) -> None:
    for app in ("shop", "shopping"):
        store.put_generation(Generation(app=APP.model_copy(update={"name": app}), number=1, state="good"))
        store.hold(f"{app}/web", Hold("stopped", 1.0))
        store.put_failure(Subject.parse(app), Failure("d", "e", 1, 0.0, None))
    store.forget_app("shop")
    history = store.history()
    assert [set(each) for each in (history.generations, history.holds, history.failures)] == [
        {"shopping"},
        {"shopping/web"},
        {"shopping"},
    ]


def test_several_may_open_a_store_that_is_not_there_yet(tmp_path: Path) -> None:
    for number in range(10):
        path, together = tmp_path / f"{number}.db", threading.Barrier(4)

        def opened(path: Path = path, together: threading.Barrier = together) -> None:
            together.wait()
            Store(path).close()

        with ThreadPoolExecutor(4) as pool:
            for each in [pool.submit(opened) for _ in range(4)]:
                each.result()


def test_who_may_not_read_what_the_agent_keeps_is_told_to_become_root(tmp_path: Path) -> None:
    make_id(tmp_path)
    Store(tmp_path / "state.db").close()
    me = os.geteuid()
    tmp_path.chmod(0)
    if me == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(NotPermitted, match=r"^open store '.*/state.db': permission denied \(become root\)$"):
            Store(tmp_path / "state.db")
        with pytest.raises(NotPermitted, match=r"^read '.*/id': permission denied \(become root\)$"):
            read_id(tmp_path)
    finally:
        if me == 0:
            os.seteuid(me)
        tmp_path.chmod(0o700)
