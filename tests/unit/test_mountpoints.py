"""Whether what a bind mount's source is meant to lie on is mounted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast import mounts
from holdfast.errors import TryAgain
from holdfast.runtime import mountpoints
from holdfast.runtime.mountpoints import Mounted, lacking, real_path
from holdfast.source.directory import DirectorySource
from holdfast.spec import load
from holdfast.spec.model import Mount, NodeFacts

FSTAB = r"""
# /dev/sdz /commented ext4 defaults 0 0
UUID=1 / ext4 defaults 0 1
UUID=2 none swap sw 0 0
server:/x /srv/nfs nfs4 _netdev 0 0
/dev/sdb1 /mnt/with\040space/ ext4 noauto 0 0
broken
"""
MOUNTINFO = r"""22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 8:2 / {} rw - nfs4 server:/x rw
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of files; its mountinfo is written by the test with `mounted`."""
    monkeypatch.setattr(mountpoints, "FSTAB", tmp_path / "fstab")
    monkeypatch.setattr(mounts, "OURS", mounts.OURS)
    (tmp_path / "fstab").write_text(FSTAB)
    mounted(tmp_path, "/elsewhere")
    return tmp_path


def mounted(host: Path, point: str) -> None:
    (host / "mountinfo").write_text(MOUNTINFO.format(point))
    mounts.OURS = mounts.MountTable(host / "mountinfo")


def bind(source: str, require_mount: bool | None = None) -> Mount:
    return Mount(kind="bind", source=source, target="/data", require_mount=require_mount)


def test_a_source_below_an_fstab_entry_waits_for_it(host: Path) -> None:
    for source in ("/srv/nfs", "/srv/nfs/a/b"):
        assert "/srv/nfs is not mounted" in lacking(bind(source), Mounted.now())
        assert lacking(bind(source, require_mount=False), Mounted.now()) == ""
    mounted(host, "/srv/nfs")
    assert lacking(bind("/srv/nfs/a", require_mount=True), Mounted.now()) == ""


def test_others_do_not_wait(host: Path) -> None:
    for source in ("/srv/nfs2", "/srv", "/etc", "/commented/x", "/"):
        assert lacking(bind(source), Mounted.now()) == ""
    assert lacking(Mount(kind="tmpfs", target="/srv/nfs"), Mounted.now()) == ""


def test_a_link_to_what_is_not_mounted_waits(host: Path) -> None:
    (host / "link").symlink_to("/srv/nfs/deep")
    assert "/srv/nfs is not mounted" in lacking(bind(str(host / "link")), Mounted.now())


def test_links_are_followed_as_the_kernel_does_until_a_file_system_that_may_not_answer(host: Path) -> None:
    place = host / "place"
    (place / "deep/er").mkdir(parents=True)
    (place / "up").symlink_to("deep/../deep/er")
    (place / "abs").symlink_to(place / "up")
    (place / "loop").symlink_to("loop")
    (place / "lost").symlink_to("nowhere/x")
    now = Mounted.now()
    for path in ("abs", "abs/../new", "up//./x", "lost/y", "deep"):
        assert real_path(f"{place}/{path}", now) == os.path.realpath(f"{place}/{path}")
    assert real_path("/", now) == "/"
    assert real_path(f"{place}/loop/x", now).startswith(str(place))
    mounted(host, str(place / "deep"))  # nfs4
    assert real_path(f"{place}/up/x", Mounted.now()) == f"{place}/deep/er/x"
    (place / "deep/link").symlink_to("/")
    assert real_path(f"{place}/deep/link/x", Mounted.now()) == f"{place}/deep/link/x"


def test_escapes_are_read_as_fstab_and_mountinfo_write_them(host: Path) -> None:
    assert "with space is not mounted" in lacking(bind("/mnt/with space/x"), Mounted.now())
    mounted(host, r"/mnt/with\040space")
    assert lacking(bind("/mnt/with space/x"), Mounted.now()) == ""


def test_what_is_required_without_fstab_must_lie_on_some_mount(host: Path) -> None:
    assert "nothing is mounted at or above '/usb/x'" in lacking(bind("/usb/x", require_mount=True), Mounted.now())
    mounted(host, "/usb")
    assert lacking(bind("/usb/x", require_mount=True), Mounted.now()) == ""


def test_a_changed_fstab_is_read_again_and_a_missing_one_asks_for_nothing(host: Path) -> None:
    (host / "fstab").write_text("x /new ext4 defaults 0 0\n")
    assert "/new is not mounted" in lacking(bind("/new/x"), Mounted.now())
    (host / "fstab").unlink()
    assert lacking(bind("/new/x"), Mounted.now()) == ""


def test_require_mount_is_for_binds_only() -> None:
    text = """
[containers.web]
image = "x"
[[containers.web.volumes]]
source = "data"
target = "/data"
require_mount = true
[volumes.data]
"""
    (problem,) = load({"a.toml": text.encode()}, NodeFacts(name="n")).problems
    assert "does not apply to a mount of type volume (expected type bind)" in problem.message


def test_a_state_directory_whose_file_system_is_not_mounted_is_not_taken_for_an_empty_one(host: Path) -> None:
    state = host / "state"
    state.mkdir()
    (state / "shop.toml").write_text("")
    (host / "fstab").write_text(f"server:/x {state} nfs4 _netdev 0 0\n")
    mounted(host, str(state))
    source = DirectorySource(state)
    assert set(source.current().files) == {"shop.toml"}
    state.rename(host / "away")  # what lies underneath comes to light
    state.mkdir()
    mounted(host, "/elsewhere")
    with pytest.raises(TryAgain, match=r"is not mounted, which .* names \(what runs stays\)"):
        source.current()
    state.rmdir()
    (host / "away").rename(state)
    mounted(host, str(state))
    assert set(source.current().files) == {"shop.toml"}
