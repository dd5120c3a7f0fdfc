"""Images out of containers: what a new layer, its configuration and its history say; and how histories are shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import UnfitHost
from holdfast.images.incoming.load import load_archive
from holdfast.images.kept.image import Image, whole_history
from holdfast.images.kept.store import ImageStore
from holdfast.images.outgoing.commit import Note, changed, commit_image
from holdfast.node.images import history_of
from holdfast.node.usage import allocated
from layouts import make_layout
from tars import entry, tar_of

NOTE = Note("holdfast commit shop/web", "why", "me", 1_000_000_000.5)


@pytest.fixture
def base(store: ImageStore, tmp_path: Path) -> Image:
    make_layout(
        tmp_path / "base", [{"a": b"1"}, {"b": b"2"}], config={"Cmd": ["/a"], "Env": ["A=1", "B=2"]}, docker=True
    )
    return load_archive(store, tmp_path / "base", "base:1")[0]


def test_a_committed_image_is_the_base_with_one_more_layer(store: ImageStore, base: Image) -> None:
    archive = tar_of(entry("c", b"3"))

    def write(out: Any) -> None:
        out.write(archive)

    image = commit_image(store, base, write, "new:1", {"User": "1"}, NOTE)
    assert image.diff_ids[:2] == base.diff_ids
    assert [layer["digest"] for layer in image.manifest["layers"][:2]] == [
        layer["digest"] for layer in base.manifest["layers"]
    ]
    assert {layer["mediaType"].partition(".layer")[0] for layer in image.manifest["layers"]} == {
        "application/vnd.oci.image"
    }
    assert (image.config, image.created) == ({"User": "1"}, 1_000_000_000.5)
    assert image.history[-1] == {
        "created": "2001-09-09T01:46:40.500000Z",
        "created_by": "holdfast commit shop/web",
        "comment": "why",
        "author": "me",
    }
    assert [step.get("created_by") for step in image.history] == ["unknown", "unknown", "holdfast commit shop/web"]
    assert history_of(image, lambda _: 1)[0]["comment"] == "why"
    assert (image.read_file("/a"), image.read_file("/c")) == (b"1", b"3")
    assert store.names()["docker.io/library/new:1"].source == "commit"


def test_what_can_not_be_read_is_why_there_is_no_image(store: ImageStore, base: Image) -> None:
    def write(out: Any) -> None:
        out.write(tar_of(entry("c", b"3")))
        raise UnfitHost("read '/c': input/output error")

    with pytest.raises(UnfitHost, match="input/output"):
        commit_image(store, base, write, "new:1", {}, NOTE)
    assert set(store.names()) == {"docker.io/library/base:1"}


def test_changes_add_to_lists_and_replace_the_rest() -> None:
    config = {"Env": ["A=1", "B=2"], "Cmd": ["/a"], "Labels": {"x": "1"}, "User": "root"}
    done = changed(config, {"Env": ["B=3", "C=4"], "Cmd": ["/b"], "Labels": {"y": "2"}, "Volumes": {"/v": {}}})
    assert done == {
        "Env": ["A=1", "B=3", "C=4"],
        "Cmd": ["/b"],
        "Labels": {"x": "1", "y": "2"},
        "Volumes": {"/v": {}},
        "User": "root",
    }


def image_with(history: list[dict[str, Any]]) -> Image:
    return Image("d", (), {}, (), 0, 0.0, "amd64", diff_ids=("one", "two"), document={"history": history})


def test_a_history_gives_each_layer_to_the_step_that_made_it() -> None:
    steps: list[dict[str, Any]] = [
        {"created_by": "ADD", "created": "2026-01-02T03:04:05Z"},
        {"created_by": "CMD", "empty_layer": True},
        {"created_by": "RUN", "comment": "x"},
    ]
    rows = history_of(image_with(steps), {"one": 10, "two": 20}.__getitem__)
    assert [(row["layer"], row["created_by"], row["size"]) for row in rows] == [
        ("two", "RUN", 20),
        ("", "CMD", 0),
        ("one", "ADD", 10),
    ]
    assert rows[2]["created"] == 1767323045


def test_a_history_that_does_not_add_up_is_shown_layer_by_layer() -> None:
    rows = history_of(image_with([{"created_by": "ADD"}]), {"one": 10, "two": 20}.__getitem__)
    assert [(row["layer"], row["created_by"]) for row in rows] == [("two", ""), ("one", "")]


def test_a_history_tells_of_every_layer_when_it_is_whole() -> None:
    steps: list[dict[str, Any]] = [{"created_by": "ADD"}, {"created_by": "CMD", "empty_layer": True}]
    assert whole_history(steps, 1) == steps
    assert whole_history(steps, 2) == [*steps, {"created_by": "unknown"}]
    assert whole_history(steps, 0) == []


def test_hard_links_take_up_the_disk_once(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a").write_bytes(b"x" * 100_000)
    once = allocated(tmp_path)
    os.link(tmp_path / "d/a", tmp_path / "b")
    assert allocated(tmp_path) == once >= 100_000
    assert allocated(tmp_path / "nothing") == 0
