"""The volumes that images declare, and mounts that are taken over from other containers."""

from __future__ import annotations

import re

import pytest

from holdfast.grammar.names import NAME
from holdfast.spec import load
from holdfast.spec.model import App, Container, Mount, NodeFacts, Spec
from holdfast.spec.volumes import image_volumes, volume_name

FACTS = NodeFacts(name="node")


def app_of(**containers: Container) -> App:
    return App(name="shop", path="shop.toml", containers=containers)


def plain(**fields: object) -> Container:
    return Container.model_validate({"image": "x", **fields})


def spec_of(text: str) -> Spec:
    return load({"shop.toml": text.encode()}, FACTS)


def test_a_volume_is_named_after_its_container_and_target() -> None:
    found = image_volumes(app_of(db=plain()), {"db": ["/var/lib/postgresql/data"]})
    assert [(each.source, each.target) for each in found["db"]] == [
        ("shop/db.var-lib-postgresql-data", "/var/lib/postgresql/data")
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [("/a/b", "/a-b"), ("/a.b", "/a/b"), ("/A", "/a"), ("/x" * 60, "/x" * 61), ("/ü", "/ö"), ("/a_b", "/a-b")],
)
def test_different_targets_have_different_volumes(one: str, other: str) -> None:
    names = {volume_name("db", target) for target in (one, other)}
    assert len(names) == 2
    found = image_volumes(app_of(db=plain()), {"db": [one, other]})["db"]
    assert {each.source.removeprefix("shop/") for each in found} == names
    assert all(len(name) <= 63 for name in names)


def test_names_of_containers_with_dots_are_nobody_elses() -> None:
    assert volume_name("a.b", "/c") != volume_name("a", "/b.c")


def test_slots_share_no_volume_and_the_first_has_the_plain_name() -> None:
    targets = ("/data", "/2", "/data/2", "/d.ata", "/" + "x" * 61, "/data--2", "/data-")
    names = [volume_name(c, t, slot) for c in ("db", "db.data") for t in targets for slot in (1, 2, 3, 12)]
    assert len(set(names)) == len(names)
    assert all(NAME.fullmatch(name) for name in names)
    assert (volume_name("db", "/data"), volume_name("db", "/data", 2)) == ("db.data", "db.data--2")


def test_what_the_state_file_mounts_there_comes_instead() -> None:
    mount = Mount(kind="tmpfs", target="/data")
    found = image_volumes(app_of(db=plain(mounts=(mount,))), {"db": ["/data/", "data", "/", "/other"]})
    assert [each.target for each in found["db"]] == ["/other"]


def test_a_path_that_cannot_be_printed_is_refused() -> None:
    with pytest.raises(ValueError, match="control characters"):
        image_volumes(app_of(db=plain()), {"db": ["/da\x1bta"]})


def test_volumes_of_images_are_taken_over_and_filled_by_their_own_container() -> None:
    app = app_of(db=plain(), backup=plain(volumes_from={"db": "ro"}), last=plain(volumes_from={"backup": "rw"}))
    found = image_volumes(app, {"db": ["/data"], "backup": ["/data", "/own"]})
    assert [(each.source, each.read_only, each.nocopy) for each in found["backup"]] == [
        ("shop/db.data", True, True),
        ("shop/backup.own", False, False),
    ]
    assert [each.source for each in found["last"]] == ["shop/db.data", "shop/backup.own"]
    assert found["last"][0].read_only


VOLUMES_FROM = """
[containers.db]
image = "x"
volumes = ["data:/data", "/srv:/srv", "./f:/f"]
tmpfs = ["/tmp"]
[containers.backup]
image = "x"
volumes = ["own:/srv"]
volumes_from = ["db:ro"]
[containers.third]
image = "x"
volumes_from = ["backup"]
[volumes.data]
[volumes.own]
"""


def test_volumes_from_brings_mounts_and_an_order() -> None:
    spec = load({"shop.toml": VOLUMES_FROM.encode(), "f": b"text"}, FACTS)
    assert spec.problems == ()
    containers = spec.apps["shop"].containers
    backup = {each.target: each for each in containers["backup"].mounts}
    assert {target: each.source for target, each in backup.items()} == {
        "/srv": "shop/own",
        "/data": "shop/data",
        "/f": "f",
    }
    assert backup["/data"].read_only and backup["/data"].nocopy and not backup["/srv"].nocopy
    assert {each.target: each.read_only for each in containers["third"].mounts} == {
        "/srv": False,
        "/data": True,
        "/f": True,
    }
    assert containers["backup"].depends_on == {"db": "started"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('["db:rx"]', r"option 'rx' is not known \(expected CONTAINER\[:ro\]\)"),
        ('["nobody"]', "no container is called 'nobody'"),
        ('["other/db"]', "is a container of another app"),
        ('["db", "db:ro"]', "'db' is named twice"),
        ('["me"]', "a cycle: me → me"),
    ],
)
def test_wrong_volumes_from_is_told_with_its_line(value: str, message: str) -> None:
    spec = spec_of(f'[containers.db]\nimage = "x"\n[containers.me]\nimage = "x"\nvolumes_from = {value}\n')
    assert len(spec.problems) == 1
    assert spec.problems[0].line >= 3
    assert re.search(message, spec.problems[0].message)
