"""Sizes of volumes and writable layers: kept by the file system's project quotas, refused where it has none.

What a file system keeps to is tried on a disk of its own; a kernel without quotas can show the refusals only.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.drivers import Host, RootfsWant, VolumeWant
from holdfast.errors import UnfitHost, WrongState
from holdfast_plugins.storage import ManagedVolume, OverlayRootfs, quota
from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("mounts_alone")]

MIB = 1 << 20
OPTIONS = {"ext4": "prjquota", "xfs": "pquota"}
NOBODY = 65534


@pytest.fixture(params=["tmpfs", "ext4"])
def plain(request: pytest.FixtureRequest, site: Host, tmp_path: Path) -> Iterator[Host]:
    """A host whose root lies on a file system without project quotas."""
    yield from on_disk(site, tmp_path, request.param)


@pytest.fixture(params=["ext4", "xfs"])
def quotas(request: pytest.FixtureRequest, site: Host, tmp_path: Path) -> Iterator[Host]:
    """A host whose root lies on a file system with project quotas."""
    yield from on_disk(site, tmp_path, request.param, quotas=True)


def on_disk(site: Host, folder: Path, kind: str, *, quotas: bool = False) -> Iterator[Host]:
    """The site with its root on a disk of its own, which lies in a folder that does not bear the site's name."""
    place, image = folder / "disk", folder / "image"
    place.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "none", place]
    else:
        with image.open("wb") as file:
            file.truncate(1 << 30)
        features = ["-O", "quota,project"] if quotas and kind == "ext4" else []
        subprocess.run([f"mkfs.{kind}", "-q", *features, image], check=True)
        command = ["mount", "-o", f"loop,{OPTIONS[kind]}" if quotas else "loop", image, place]
    mounted = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    if mounted.returncode != 0 and quotas:
        pytest.skip(f"this kernel has no {kind} with project quotas (CONFIG_QUOTA, CONFIG_QFMT_V2, CONFIG_XFS_QUOTA)")
    assert mounted.returncode == 0, mounted.stderr
    try:
        yield replace(site, root=place / "root")
    finally:
        subprocess.run(["umount", place], check=True)


def written(path: Path, size: int) -> int:
    """How many bytes may be written to a file before the file system refuses more, without CAP_SYS_RESOURCE."""
    done = 0
    with path.open("wb", buffering=0) as file:
        os.seteuid(NOBODY)
        try:
            while done < size:
                done += file.write(bytes(MIB // 4))
        except OSError as error:
            assert error.errno in (errno.EDQUOT, errno.ENOSPC)
        finally:
            os.seteuid(0)
    return done


def test_a_file_system_without_project_quotas_is_named_with_what_would_be_right(plain: Host) -> None:
    want = VolumeWant(id="a/v", driver_opts={"size": "10MiB"})
    kind = (
        "tmpfs"
        if "tmpfs" in subprocess.check_output(["stat", "-f", "-c", "%T", plain.root.parent], text=True)
        else "ext4"
    )
    words = rf"volume 'a/v': driver_opts\.size: file system '{kind}' at '{plain.root.parent}' has no project quotas"
    right = (
        r"mount it with prjquota" if kind == "ext4" else r"expected ext4 mounted with prjquota, or xfs with pquota"
    )
    for verb in (ManagedVolume(plain).check, ManagedVolume(plain).ensure):
        with pytest.raises(UnfitHost, match=rf"{words} \(.*{right}\)"):
            verb(want)
    with pytest.raises(UnfitHost, match=r"storage_opt\.size: file system"):
        OverlayRootfs(plain).check(RootfsWant(instance="x", layers=(plain.root.parent,), size=MIB))
    ManagedVolume(plain).ensure(VolumeWant(id="a/v"))


@pytest.mark.parametrize(("size", "words"), [("much", "is not a size"), ("0", "0 is too small")])
def test_what_is_no_size_is_refused(site: Host, size: str, words: str) -> None:
    with pytest.raises(WrongState, match=words):
        ManagedVolume(site).check(VolumeWant(id="a/v", driver_opts={"size": size}))


def test_a_volume_holds_what_its_size_says_and_grows_in_place(quotas: Host) -> None:
    driver = ManagedVolume(quotas)
    data = Path(driver.ensure(VolumeWant(id="a/v")).data["path"])
    (data / "before").write_bytes(bytes(2 * MIB))
    (data / "link").symlink_to("/etc/passwd")
    driver.check(VolumeWant(id="a/v", driver_opts={"size": "4MiB"}))
    receipt = driver.ensure(VolumeWant(id="a/v", driver_opts={"size": "4MiB"}))
    assert MIB < written(data / "more", 10 * MIB) <= 2 * MIB
    neighbour = Path(driver.ensure(VolumeWant(id="a/w", driver_opts={"size": "4MiB"})).data["path"])
    assert written(neighbour / "own", 3 * MIB) == 3 * MIB
    driver.ensure(VolumeWant(id="a/v", driver_opts={"size": "8MiB"}))
    assert 4 * MIB < written(data / "more", 10 * MIB) <= 6 * MIB
    driver.ensure(VolumeWant(id="a/v"))
    assert written(data / "more", 10 * MIB) == 10 * MIB
    driver.remove(receipt)
    with quota._opened(quotas.root) as folder:
        assert all(quota._is_free(folder, each) for each in quota._candidates(f"{quotas.name} volume a/v"))


def test_a_writable_layer_holds_what_storage_opt_says(quotas: Host) -> None:
    layer = quotas.root / "layer"
    layer.mkdir(parents=True)
    (layer / "file").write_text("x")
    driver = OverlayRootfs(quotas)
    receipt = driver.ensure(RootfsWant(instance="x", layers=(layer,), size=4 * MIB))
    try:
        root = Path(receipt.data["path"])
        (root / "file").write_text("copied up")
        (root / "file").rename(root / "moved")
        assert 2 * MIB < written(root / "much", 10 * MIB) <= 4 * MIB
    finally:
        driver.remove(receipt)
        with suppress(OSError):
            (quotas.run_root / "instances").rmdir()


def test_containers_get_as_much_as_their_commit_says_and_more_with_the_next(
    quotas: Host, new_agent: Callable[[Host], LiveAgent]
) -> None:
    agent = new_agent(quotas)
    agent.configure(more="images.min_free = 0")
    agent.start()
    agent.image("busybox:1")
    text = """
        [containers.web]
        image = "busybox:1"
        command = ["sleep", "10000"]
        stop_grace_period = "0s"
        storage_opt = { size = "4MiB" }
        volumes = ["data:/data"]
        [volumes.data]
        driver_opts = { size = "6MiB" }
    """

    def holds(folder: str) -> float:
        """How many MiB may be written there in a container."""
        words = f"dd if=/dev/zero of={folder}/file bs=256k count=80 2>&1; stat -c %s {folder}/file; rm {folder}/file"
        said = agent.exec("shop/web", "sh", "-c", words).splitlines()
        assert "No space left" in said[0] or "quota exceeded" in said[0], said
        return int(said[-1]) / MIB

    agent.write("shop.toml", text)
    agent.converge()
    assert 3 < holds("/root") <= 4
    assert 5 < holds("/data") <= 6
    agent.write("shop.toml", text.replace("4MiB", "8MiB").replace("6MiB", "10MiB"))
    agent.converge()
    assert 7 < holds("/root") <= 8
    assert 9 < holds("/data") <= 10


def test_a_commit_that_asks_for_a_size_on_such_a_disk_is_refused_and_what_runs_stays(agent: LiveAgent) -> None:
    text = '[containers.web]\nimage = "busybox:1"\ncommand = ["sleep", "10000"]\nstop_grace_period = "0s"\n'
    agent.write("shop.toml", text)
    agent.converge()
    try:
        quota.check(agent.host.root, "x")
    except UnfitHost:
        pid = agent.pid("shop/web")
        agent.write("shop.toml", text + 'storage_opt = { size = "1GiB" }\n')
        agent.sync()
        agent.wait(lambda: "has no project quotas" in " ".join(agent.cli("status").stdout.split()), "it is refused")
        assert agent.pid("shop/web") == pid
    else:
        pytest.skip("the disk of this test has project quotas")
