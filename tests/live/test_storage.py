"""The storage drivers on a real kernel: overlay, managed, bind, tmpfs, file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.drivers import Host, MountWant, RootfsWant, VolumeWant
from holdfast.errors import UnfitHost, WrongCall, WrongState
from holdfast.files import open_source
from holdfast.guard import guarded
from holdfast.kinds import VOLUME
from holdfast.observed import Receipt
from holdfast.plugins import load_plugins
from holdfast.runtime.content import ContentStore
from holdfast.spec.model import Mount
from holdfast.syscalls import is_mounted, unmount
from holdfast.testing import (
    DriverConformance,
    MountConformance,
    RootfsConformance,
    VolumeConformance,
    host_fingerprint,
)
from holdfast.workers import Worker
from holdfast_plugins.storage import BindMount, FileMount, ManagedVolume, OverlayRootfs, TmpfsMount
from holdfast_plugins.storage.mounts import _by_descriptor, _mount_by_page

pytestmark = pytest.mark.live


@pytest.fixture
def host(site: Host) -> Host:
    return site


def make_layers(root: Path, count: int) -> tuple[Path, ...]:
    layers = []
    for number in range(count):
        layer = root / "layers" / f"{number:03},with:signs"
        (layer / "etc").mkdir(parents=True)
        (layer / "etc" / f"from-{number}").write_text(str(number))
        (layer / "etc/top").write_text(str(number))
        layers.append(layer)
    return tuple(layers)


@pytest.mark.usefixtures("mounts_alone")
class OnSites(DriverConformance):
    """Runs on the test's own site; a second one is another agent."""

    @pytest.fixture
    def host(self, site: Host) -> Host:
        return site

    @pytest.fixture
    def another_host(self, new_site: Callable[[], Host]) -> Host:
        return new_site()


class TestOverlayRootfs(OnSites, RootfsConformance):
    def make_driver(self, host: Host) -> OverlayRootfs:
        return OverlayRootfs(host)


class TestManagedVolume(OnSites, VolumeConformance):
    def make_driver(self, host: Host) -> ManagedVolume:
        return ManagedVolume(host)

    def make_want(self, host: Host, number: int) -> VolumeWant:
        return VolumeWant(id=f"shop/data-{number}")


class TestBindMount(OnSites, MountConformance):
    def make_driver(self, host: Host) -> BindMount:
        return BindMount(host)

    def make_want(self, host: Host, number: int) -> MountWant:
        source = host.root / "made" / str(number)
        mount = Mount(kind="bind", source=str(source), target=f"/b/{number}", create_host_path=True)
        return MountWant(instance="one", mount=mount)


class TestTmpfsMount(OnSites, MountConformance):
    leaves_traces = False

    def make_driver(self, host: Host) -> TmpfsMount:
        return TmpfsMount()

    def make_want(self, host: Host, number: int) -> MountWant:
        return MountWant(instance="one", mount=Mount(kind="tmpfs", target=f"/run/{number}", size=1 << 20))


class TestFileMount(OnSites, MountConformance):
    def make_driver(self, host: Host) -> FileMount:
        return FileMount(host)

    def make_want(self, host: Host, number: int) -> MountWant:
        store = ContentStore(host.root / "content")
        target = f"/etc/{number}.conf"
        mount = Mount(kind="file", source="a.conf", target=target, on_change="SIGHUP", mode=0o640, uid=33)
        return MountWant(instance=f"i{number}", mount=mount, content=store.path(store.store_file(b"first\n")))


class TestFileMountOfAFolder(TestFileMount):
    def make_want(self, host: Host, number: int) -> MountWant:
        store = ContentStore(host.root / "content")
        tree = store.store_tree({"x/y": store.store_file(b"y"), "z": store.store_file(b"z")})
        mount = Mount(kind="file", source="conf.d", target=f"/etc/{number}.d", on_change="none")
        return MountWant(instance="one", mount=mount, content=store.path(tree))


def test_a_hundred_layers_on_long_paths_are_stacked_in_order(host: Host) -> None:
    driver = OverlayRootfs(host)
    layers = make_layers(host.root / ("x" * 200) / ("y" * 200), 100)
    receipt = driver.ensure(RootfsWant(instance="deep", layers=layers))
    try:
        root = Path(receipt.data["path"])
        assert (root / "etc/top").read_text() == "99"
        assert len(list((root / "etc").iterdir())) == 101
        (root / "etc/top").write_text("changed")
        assert (Path(receipt.data["upper"]) / "etc/top").read_text() == "changed"
        assert (layers[-1] / "etc/top").read_text() == "99"
    finally:
        driver.remove(receipt)


def test_older_kernels_are_given_the_same_hundred_layers_in_one_page(host: Host) -> None:
    layers = make_layers(host.root / ("x" * 200), 100)
    folders = [host.root / name for name in ("upper", "work", "merged")]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        short = [_by_descriptor(path, stack) for path in (*layers[::-1], *folders[:2])]
        _mount_by_page(host.name, short[:-2], short[-2], short[-1], folders[2])
        stack.callback(unmount, folders[2])
        assert (folders[2] / "etc/top").read_text() == "99"


def test_written_files_survive_a_reboot(host: Host) -> None:
    driver = OverlayRootfs(host)
    want = RootfsWant(instance="lasting", layers=make_layers(host.root, 1))
    receipt = driver.ensure(want)
    root = Path(receipt.data["path"])
    (root / "kept").write_text("yes")
    unmount(root)
    assert list(driver.observe()) == [Receipt("rootfs", "overlay", "lasting", "lasting", root=host.id)]
    assert driver.ensure(want) == receipt
    assert (root / "kept").read_text() == "yes"
    driver.remove(receipt)


def test_a_busy_root_file_system_is_removed_all_the_same(host: Host) -> None:
    driver = OverlayRootfs(host)
    receipt = driver.ensure(RootfsWant(instance="busy", layers=make_layers(host.root, 1)))
    with (Path(receipt.data["path"]) / "etc/top").open():
        driver.remove(receipt)
        assert list(driver.observe()) == []


def test_the_root_directory_looks_as_in_the_image(host: Host) -> None:
    layers = make_layers(host.root, 2)
    layers[-1].chmod(0o751)
    os.chown(layers[-1], 12, 34)
    driver = OverlayRootfs(host)
    receipt = driver.ensure(RootfsWant(instance="looks", layers=layers))
    found = Path(receipt.data["path"]).stat()
    driver.remove(receipt)
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o751, 12, 34)


def test_missing_and_too_many_layers_are_refused_before_anything_is_made(host: Host) -> None:
    driver = OverlayRootfs(host)
    with pytest.raises(WrongState, match="is no directory"):
        driver.check(RootfsWant(instance="x", layers=(host.root / "nowhere",)))
    with pytest.raises(WrongState, match="501 layers"):
        driver.check(RootfsWant(instance="x", layers=(host.root,) * 501))
    with pytest.raises(WrongCall, match="not an instance"):
        driver.remove(Receipt("rootfs", "overlay", "../../etc"))


def test_the_kernels_own_words_reach_the_error(host: Host) -> None:
    layers = make_layers(host.root, 1)
    driver = OverlayRootfs(host)
    receipt = driver.ensure(RootfsWant(instance="lower", layers=layers))
    nested = OverlayRootfs(Host(host.name, Path(receipt.data["path"]), host.run_root / "nested"))
    try:
        with pytest.raises(UnfitHost, match="overlay"):
            nested.ensure(RootfsWant(instance="x", layers=layers))
    finally:
        driver.remove(receipt)


def test_deletion_that_was_cut_off_is_no_volume_and_is_finished_later(host: Host) -> None:
    driver = ManagedVolume(host)
    receipt = driver.ensure(VolumeWant(id="a/v"))
    folder = Path(receipt.data["path"]).parent
    folder.rename(folder.with_name(".removed-v"))
    assert list(driver.observe()) == []
    driver.remove(receipt)
    assert list((host.root / "volumes").iterdir()) == []


def test_volume_options_and_names_are_checked(host: Host) -> None:
    driver = ManagedVolume(host)
    with pytest.raises(WrongState, match=r"driver_opts\.colour: unknown key 'colour' \(expected one of size\)"):
        driver.check(VolumeWant(id="a/v", driver_opts={"colour": "red"}))
    for name in ("v", "../v", "a/..", "a/b/c", "/etc"):
        with pytest.raises(WrongCall, match="not a volume's name"):
            driver.remove(Receipt("volume", "managed", name))


def test_a_volume_of_another_driver_is_refused_with_both_names(host: Host) -> None:
    plugins = load_plugins(host)
    plugins.driver(VOLUME, "managed").ensure(VolumeWant(id="a/v"))

    class Other(ManagedVolume):
        name = "other"

        def observe(self) -> list[Receipt]:
            return []

    plugins._drivers[VOLUME]["other"] = guarded(Other(host), VOLUME, lambda what, error: None, Worker("observe", 5.0))
    with pytest.raises(WrongState, match=r"'a/v': driver 'managed' made it.*'other' is asked for"):
        plugins.check_volume("other", VolumeWant(id="a/v"))
    plugins.check_volume("other", VolumeWant(id="a/w"))
    plugins.check_volume("managed", VolumeWant(id="a/v"))


def test_a_program_of_the_revision_is_one_where_it_is_mounted(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    plain, program = store.store_file(b"x"), store.store_file(b"x", executable=True)
    assert plain != program
    tree = store.path(store.store_tree({"a": plain, "b": program}))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (store.path(plain), store.path(program), tree / "b")]
    assert modes == [0o444, 0o555, 0o555]


def test_a_missing_bind_source_is_an_error_unless_it_may_be_created(host: Host) -> None:
    driver = BindMount(host)
    missing = host.root / "not/there"
    with pytest.raises(UnfitHost, match="no such file or directory on this host"):
        driver.check(MountWant(instance="x", mount=Mount(kind="bind", source=str(missing), target="/a")))
    mount = Mount(kind="bind", source=str(missing), target="/a", create_host_path=True, read_only=True)
    driver.check(MountWant(instance="x", mount=mount))
    assert not missing.exists()
    receipt = driver.ensure(MountWant(instance="x", mount=mount))
    assert Path(receipt.data["source"]).samefile(missing)
    assert receipt.data["options"] == ["rbind", "rprivate", "ro", "rro"]
    driver.release(receipt)
    assert list(driver.observe()) == []
    assert missing.is_dir()


def test_a_file_is_read_only_without_asking_for_what_is_below_it(host: Host) -> None:
    source = host.root / "file"
    source.write_text("x")
    mount = Mount(kind="bind", source=str(source), target="/a", read_only=True)
    driver = BindMount(host)
    receipt = driver.ensure(MountWant(instance="x", mount=mount))
    assert Path(receipt.data["source"]).samefile(source)
    assert receipt.data["options"] == ["rbind", "rprivate", "ro"]
    driver.release(receipt)
    assert source.read_text() == "x"


def test_what_is_mounted_below_a_source_is_still_there_after_the_start(host: Host) -> None:
    source, inner = host.root / "source", host.root / "source/inner"
    inner.mkdir(parents=True)
    subprocess.run(["mount", "--bind", source, source], check=True)
    subprocess.run(["mount", "--make-shared", source], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", inner], check=True)
    try:
        (inner / "file").write_text("x")
        driver = BindMount(host)
        receipt = driver.ensure(MountWant(instance="x", mount=Mount(kind="bind", source=str(source), target="/a")))
        assert (Path(receipt.data["source"]) / "inner/file").read_text() == "x"
        driver.release(receipt)
        assert (inner / "file").read_text() == "x"
    finally:
        subprocess.run(["umount", inner, source], check=True)


def test_roots_hold_for_links_and_for_what_is_created(host: Host) -> None:
    root, outside = host.root / "allowed", host.root / "outside"
    for folder in (root / "inner", outside):
        folder.mkdir(parents=True)
    (root / "out").symlink_to(outside)
    (root / "in").symlink_to(root / "inner")
    (host.root / "way").symlink_to(root / "out")  # a root that leads through another one, and then out
    driver, roots = BindMount(host), (str(root), str(root / "out"), str(host.root / "way"))

    def ensure(source: Path, *, create: bool = False) -> Receipt:
        mount = Mount(kind="bind", source=str(source), target="/a", create_host_path=create)
        want = MountWant(instance="x", mount=mount, roots=roots)
        for verb in (driver.check, driver.ensure):
            made = verb(want)
        assert isinstance(made, Receipt)
        return made

    for good in (ensure(root / "in"), ensure(root / "in/new/deep", create=True)):
        driver.release(good)
    assert (root / "inner/new/deep").is_dir()
    for bad in (root / "out", host.root / "way", Path("/"), root / "in/../../outside"):
        with pytest.raises(WrongState, match="outside the bind_roots"):
            ensure(bad)
    with pytest.raises(WrongState, match="outside the bind_roots"):
        ensure(root / "out/new/deep", create=True)
    for missing in (outside / "new", host.root / "nowhere/new", Path("/nowhere/new")):
        with pytest.raises(WrongState, match="outside the bind_roots"):
            ensure(missing, create=True)
        with pytest.raises(WrongState, match="outside the bind_roots"):
            open_source(str(missing), roots, create=True)
        assert not missing.parent.exists() or missing.parent == outside
    assert list(outside.iterdir()) == []
    assert list(driver.observe()) == []


def test_a_folder_that_is_swapped_for_a_link_all_the_time_is_never_left(host: Host) -> None:
    root, outside = host.root / "allowed", host.root / "outside"
    for folder in (root / "x", outside):
        folder.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    (root / "link").symlink_to(outside)
    swap = "import ctypes, sys; a, b = map(str.encode, sys.argv[1:])\n"
    swap += "while not ctypes.CDLL(None).renameat2(-100, a, -100, b, 2): pass"  # RENAME_EXCHANGE
    racer = subprocess.Popen([sys.executable, "-c", swap, str(root / "x"), str(root / "link")])
    try:
        driver, refused, mounted = BindMount(host), 0, 0
        mount = Mount(kind="bind", source=str(root / "x"), target="/a")
        while refused < 50 or mounted < 50:
            try:
                receipt = driver.ensure(MountWant(instance="x", mount=mount, roots=(str(root),)))
            except (WrongState, UnfitHost):
                refused += 1
                continue
            mounted += 1
            assert list(Path(receipt.data["source"]).iterdir()) == []
            driver.release(receipt)
    finally:
        racer.kill()
        racer.wait()


def test_tmpfs_carries_size_mode_and_owner(host: Host) -> None:
    mount = Mount(kind="tmpfs", target="/t", size=1048576, mode=0o700, uid=5, gid=6, read_only=True)
    options = TmpfsMount().ensure(MountWant(instance="x", mount=mount)).data["options"]
    assert options == ["nosuid", "nodev", "noexec", "mode=700", "size=1048576", "uid=5", "gid=6", "ro"]
    with pytest.raises(WrongState, match="size 0"):
        TmpfsMount().check(MountWant(instance="x", mount=Mount(kind="tmpfs", target="/t", size=0)))


def test_a_read_only_file_is_mounted_from_the_store_itself(host: Host) -> None:
    store = ContentStore(host.root / "content")
    content = store.path(store.store_file(b"x"))
    want = MountWant(instance="x", mount=Mount(kind="file", source="f", target="/f", read_only=True), content=content)
    driver = FileMount(host)
    receipt = driver.ensure(want)
    assert receipt.data["source"] == str(content)
    with pytest.raises(WrongCall, match="on_change"):
        driver.refresh(receipt, content)


def test_a_refreshed_file_keeps_its_inode_owner_and_mode(host: Host) -> None:
    store = ContentStore(host.root / "content")
    old, new = (store.path(store.store_file(text)) for text in (b"a long first text", b"short"))
    mount = Mount(kind="file", source="f", target="/f", on_change="SIGHUP", mode=0o640, uid=12, gid=34)
    driver = FileMount(host)
    receipt = driver.ensure(MountWant(instance="x", mount=mount, content=old))
    copy = Path(receipt.data["source"])
    before = copy.stat()
    driver.refresh(receipt, new)
    after = copy.stat()
    assert copy.read_bytes() == b"short"
    assert (after.st_ino, after.st_mode, after.st_uid, after.st_gid) == (before.st_ino, 0o100640, 12, 34)
    assert driver.ensure(MountWant(instance="x", mount=mount, content=new)) == receipt
    driver.remove(receipt)


def test_a_refreshed_directory_is_changed_in_place(host: Host) -> None:
    store = ContentStore(host.root / "content")
    a, b = store.store_file(b"a"), store.store_file(b"b")
    old = store.path(store.store_tree({"same": a, "changed": a, "gone": a, "file": a, "dir/x": a}))
    new = store.path(store.store_tree({"same": a, "changed": b, "added/deep": b, "file/now-dir": a, "dir": b}))
    mount = Mount(kind="file", source="d", target="/d", on_change="none")
    driver = FileMount(host)
    receipt = driver.ensure(MountWant(instance="x", mount=mount, content=old))
    copy = Path(receipt.data["source"])
    inodes = {name: (copy / name).stat().st_ino for name in (".", "same", "changed")}
    driver.refresh(receipt, new)
    assert {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()} == {
        "same": b"a",
        "changed": b"b",
        "added/deep": b"b",
        "file/now-dir": b"a",
        "dir": b"b",
    }
    assert {name: (copy / name).stat().st_ino for name in inodes} == inodes
    driver.remove(receipt)


def test_links_that_a_container_planted_lead_nowhere(host: Host) -> None:
    store = ContentStore(host.root / "content")
    precious = host.root / "precious"
    precious.mkdir()
    (precious / "a").write_text("host's own")
    tree = store.path(store.store_tree({"a": store.store_file(b"new"), "d/a": store.store_file(b"new")}))
    mount = Mount(kind="file", source="d", target="/d", mode=0o600, uid=5)
    driver = FileMount(host)
    want = MountWant(instance="x", mount=mount, content=tree)
    copy = Path(driver.ensure(want).data["source"])
    before = host_fingerprint(host.name, precious)
    (copy / "a").unlink()
    (copy / "a").symlink_to(precious / "a")
    (copy / "d/a").unlink()
    (copy / "d").rmdir()
    (copy / "d").symlink_to(precious)
    os.mkfifo(copy / "pipe")
    receipt = driver.ensure(want)
    assert host_fingerprint(host.name, precious) == before
    assert (copy / "a").read_bytes() == (copy / "d/a").read_bytes() == b"new"
    assert sorted(path.name for path in copy.iterdir()) == ["a", "d"]
    assert stat.S_IMODE((copy / "d").stat().st_mode) == 0o700
    driver.remove(receipt)


def test_nobody_but_root_reaches_what_containers_have_written(host: Host) -> None:
    driver = OverlayRootfs(host)
    receipt = driver.ensure(RootfsWant(instance="x", layers=make_layers(host.root, 1)))
    ManagedVolume(host).ensure(VolumeWant(id="a/v"))
    folders = (host.root / "instances", host.run_root / "instances", host.root / "volumes")
    modes = [stat.S_IMODE(folder.stat().st_mode) for folder in folders]
    driver.remove(receipt)
    assert modes == [0o700] * 3


def test_unmounting_what_is_not_mounted_succeeds(host: Host) -> None:
    unmount(host.root)
    unmount(host.root / "nowhere")
    assert not is_mounted(host.root / "nowhere")
    assert host_fingerprint(host.name)["links"] == ()
