"""What a new volume starts with: the image's content, whole, once, whoever starts first and whatever is killed."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import stat
import tarfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.drivers import COMPLETE_CONTENT, Host, VolumeWant
from holdfast.files import remove_tree
from holdfast.observed import Receipt
from holdfast.runtime import filling
from holdfast.runtime.filling import PARTIAL, fill, finish
from holdfast_plugins.storage import ManagedVolume
from live.agent import LiveAgent
from live.mounts import Mounts

pytestmark = pytest.mark.live

MANY = 3000


@pytest.fixture
def seed(site: Host) -> Path:
    seed = site.root / "image/data"
    (seed / "private/deep").mkdir(parents=True)
    (seed / "private").chmod(0o700)
    (seed / "private/key").write_text("secret")
    (seed / "program").write_text("#!/bin/sh\n")
    os.chown(seed / "program", 12, 34)
    (seed / "program").chmod(0o4755)
    os.setxattr(seed / "program", "user.note", b"kept")
    (seed / "private/deep/twin").hardlink_to(seed / "program")
    (seed / "link").symlink_to("/etc/passwd")
    (seed / "twin-link").hardlink_to(seed / "link")
    os.chown(seed / "link", 9, 9, follow_symlinks=False)
    os.mkfifo(seed / "pipe")
    (seed / "pipe").chmod(0o620)
    os.utime(seed / "program", (1000, 2000))
    os.utime(seed / "private", (3000, 4000))
    os.setxattr(seed, "user.root", b"too")
    os.chown(seed, 56, 78)
    seed.chmod(0o1750)
    return seed


@pytest.fixture
def volume(site: Host) -> Path:
    volume = site.root / "volume"
    volume.mkdir()
    return volume


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_volume_is_filled_down_to_the_last_attribute(seed: Path, volume: Path) -> None:
    fill(volume, seed)
    program = (volume / "program").stat()
    assert (program.st_uid, program.st_gid, stat.S_IMODE(program.st_mode), program.st_mtime) == (12, 34, 0o4755, 2000)
    assert program.st_ino == (volume / "private/deep/twin").stat().st_ino
    assert os.getxattr(volume / "program", "user.note") == b"kept"
    link = (volume / "link").lstat()
    assert (volume / "link").readlink() == Path("/etc/passwd")
    assert (link.st_uid, link.st_ino) == (9, (volume / "twin-link").lstat().st_ino)
    assert stat.S_IMODE((volume / "pipe").lstat().st_mode) == 0o620
    private = (volume / "private").stat()
    assert (stat.S_IMODE(private.st_mode), private.st_mtime) == (0o700, 4000)
    assert (volume.stat().st_uid, volume.stat().st_gid, stat.S_IMODE(volume.stat().st_mode)) == (56, 78, 0o1750)
    assert os.getxattr(volume, "user.root") == b"too"
    assert names(volume) == names(seed)


def test_what_was_copied_before_a_crash_is_moved_in_without_the_image(seed: Path, volume: Path) -> None:
    fill(volume, seed)
    (volume / COMPLETE_CONTENT).mkdir(mode=0o711)
    (volume / COMPLETE_CONTENT / "late").write_text("moved in")
    (volume / COMPLETE_CONTENT / "program").write_text("an older one")
    finish(volume)
    assert names(volume) == names(seed) | {"late"}
    assert (volume / "program").read_text() == "#!/bin/sh\n"
    assert stat.S_IMODE(volume.stat().st_mode) == 0o711


def test_half_a_copy_is_thrown_away(seed: Path, volume: Path) -> None:
    (volume / PARTIAL).mkdir()
    (volume / PARTIAL / "half").write_text("a file")
    assert filling.is_empty(volume)
    fill(volume, seed)
    assert names(volume) == names(seed)


def test_a_copy_that_fails_leaves_the_volume_as_it_was(seed: Path, volume: Path, mounts: Mounts) -> None:
    mounts.tmpfs(volume, options="size=1m,mode=755")
    (seed / "large").write_bytes(bytes(2 << 20))
    with pytest.raises(OSError, match="No space left"):
        fill(volume, seed)
    assert names(volume) == set()
    assert stat.S_IMODE(volume.stat().st_mode) == 0o755


def test_a_neighbour_that_puts_links_in_the_way_reaches_nothing_of_the_host(
    seed: Path, volume: Path, site: Host
) -> None:
    outside = site.root / "outside"
    outside.mkdir()
    for name in (PARTIAL, COMPLETE_CONTENT):
        (volume / name).symlink_to(outside)
    fill(volume, seed)
    assert names(outside) == set()
    assert names(volume) == names(seed)


def test_a_link_that_replaces_a_directory_during_the_copy_is_not_followed(
    seed: Path, volume: Path, site: Host
) -> None:
    outside, inner, over = site.root / "outside", volume / PARTIAL / "private", threading.Event()
    outside.mkdir()
    for number in range(500):  # which are copied between the making of a directory and the look into it
        (seed / f"f{number}").touch()

    def swap() -> None:
        while not over.is_set():
            with suppress(OSError):
                inner.rename(inner.with_name("elsewhere"))
                inner.symlink_to(outside)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(50):  # until the swap comes in between
            try:
                fill(volume, seed)
            except OSError as error:
                assert names(outside) == set()
                if error.errno == errno.ELOOP:
                    break
            remove_tree(volume)
            volume.mkdir()
        else:
            pytest.fail("no swap came in between")
    finally:
        over.set()
        swapper.join()
    assert names(outside) == set()


@pytest.mark.parametrize("complete", [False, True])
def test_what_an_earlier_version_had_begun_to_fill_is_not_used_half_filled(site: Host, complete: bool) -> None:
    folder = site.root / "volumes/a/v"
    left = folder / (".seeded" if complete else ".seed")
    for path in (left, folder / "_data"):
        path.mkdir(parents=True)
    (left / "late").write_text("moved in")
    receipt: Receipt = ManagedVolume(site).ensure(VolumeWant(id="a/v"))
    data = Path(receipt.data["path"])
    finish(data)
    assert names(data) == ({"late"} if complete else set())
    assert names(folder) == {"_data"}


# -- with an agent -------------------------------------------------------------------------------------------

JOB = """
[containers.{name}]
image = "{image}"
command = ["sh", "-c", "ls {target} | wc -l"]
networks = ["none"]
volumes = ["v:{target}"]
"""


@pytest.fixture
def content_image(agent: LiveAgent, tmp_path: Path) -> Callable[..., None]:
    """Import busybox with directories of many files, as `name`; more: further `-c` instructions."""

    def make(name: str, folders: dict[str, int], *more: str) -> None:
        tar = tmp_path / f"{name.replace(':', '-')}.tar"
        shutil.copy(agent.rootfs.tar, tar)
        with tarfile.open(tar, "a") as archive:
            for folder, count in folders.items():
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, 0o750, 1000, 1000
                archive.addfile(entry)
                for number in range(count):
                    entry = tarfile.TarInfo(f"{folder}/f{number}")
                    entry.size = 7
                    archive.addfile(entry, io.BytesIO(b"content"))
        agent.cli("image", "import", *(word for each in more for word in ("-c", each)), str(tar), name)

    return make


def data_of(agent: LiveAgent, volume: str) -> Path:
    return agent.host.root / "volumes" / volume / "_data"


def ran(agent: LiveAgent, *containers: str) -> bool:
    return all([each["state"] for each in agent.instances(name)] == ["exited"] for name in containers)


def test_all_that_start_at_once_on_a_new_volume_see_all_of_it(
    agent: LiveAgent, content_image: Callable[..., None]
) -> None:
    content_image("many:1", {"www": MANY})
    jobs = [f"c{number}" for number in range(4)]
    text = "".join(JOB.format(name=job, image="many:1", target="/www") for job in jobs)
    agent.write("a.toml", text + "[volumes.v]\n")
    agent.wait(lambda: ran(agent, *(f"a/{job}" for job in jobs)), "all have run")
    assert {agent.cli("logs", f"a/{job}").stdout.strip() for job in jobs} == {str(MANY)}
    assert [event for event in agent.events() if event["kind"] == "failed"] == []
    assert len(names(data_of(agent, "a/v"))) == MANY


def test_a_half_filled_volume_is_never_used(agent: LiveAgent, content_image: Callable[..., None]) -> None:
    content_image("many:1", {"www": MANY})
    data = data_of(agent, "a/v")
    for _ in range(20):  # until a kill comes while the copy is being made, which takes a tenth of a second
        agent.write("a.toml", JOB.format(name="c", image="many:1", target="/www") + "[volumes.v]\n")
        agent.wait(lambda: (data / PARTIAL).is_dir() or ran(agent, "a/c"), "the copy is being made")
        agent.kill()
        if {PARTIAL, COMPLETE_CONTENT} & names(data):
            break
        agent.start()
        agent.remove("a.toml")
        agent.converge()
        agent.cli("volume", "remove", "--force", "a/v")
    else:
        pytest.fail("each kill came too late")
    agent.start()
    agent.wait(lambda: ran(agent, "a/c"), "it has run")
    assert agent.cli("logs", "a/c").stdout.strip() == str(MANY)
    assert len(names(data)) == MANY


def test_what_a_service_deleted_stays_deleted_and_an_empty_volume_keeps_its_owner(
    agent: LiveAgent, content_image: Callable[..., None]
) -> None:
    content_image("data:1", {"data": 3, "spool": 0})
    agent.write(
        "a.toml",
        """
[containers.queue]
image = "data:1"
command = ["sh", "-c", "ls /data >> /log/seen; rm -rf /data/*; echo up >> /log/up; exec sleep 10000"]
restart = "always"
stop_grace_period = "0s"
volumes = ["q:/data", "s:/spool", "log:/log"]
[volumes.q]
[volumes.s]
[volumes.log]
""",
    )
    log = data_of(agent, "a/log") / "up"
    agent.wait(lambda: log.exists() and log.read_text() == "up\n", "it has run")
    spool = data_of(agent, "a/s")
    assert (spool.stat().st_uid, stat.S_IMODE(spool.stat().st_mode)) == (1000, 0o750)
    os.chown(spool, 33, 33)
    agent.converge()
    os.kill(agent.pid("a/queue"), signal.SIGKILL)
    agent.wait(lambda: log.read_text() == "up\nup\n", "it has run again")
    agent.restart()
    agent.cli("restart", "a/queue")
    agent.wait(lambda: log.read_text() == "up\nup\nup\n", "it has run once more")
    assert (data_of(agent, "a/log") / "seen").read_text().split() == ["f0", "f1", "f2"]
    assert spool.stat().st_uid == 33


def test_the_first_to_mount_a_volume_need_not_be_the_one_that_has_its_content(
    agent: LiveAgent, content_image: Callable[..., None]
) -> None:
    content_image("data:1", {"data": 3})
    agent.write(
        "a.toml",
        JOB.format(name="without", image="busybox:1", target="/nowhere")
        + JOB.format(name="with", image="data:1", target="/data")
        + 'depends_on = { without = "completed" }\n[volumes.v]\n',
    )
    agent.wait(lambda: ran(agent, "a/without", "a/with"), "both have run")
    assert agent.cli("logs", "a/with").stdout.strip() == "3"


def test_a_volume_that_was_deleted_by_hand_is_a_new_one(agent: LiveAgent, content_image: Callable[..., None]) -> None:
    content_image("data:1", {"data": 3})
    agent.write(
        "a.toml",
        """
[containers.c]
image = "data:1"
command = ["sleep", "10000"]
restart = "always"
stop_grace_period = "0s"
volumes = ["v:/data"]
[volumes.v]
""",
    )
    agent.converge()
    before = agent.pid("a/c")
    shutil.rmtree(data_of(agent, "a/v").parent)
    agent.converge()
    assert agent.pid("a/c") != before
    assert agent.exec("a/c", "ls", "/data").split() == ["f0", "f1", "f2"]


def test_what_a_container_makes_in_a_volume_does_not_pass_for_a_copy_that_a_crash_cut_off(
    agent: LiveAgent, content_image: Callable[..., None]
) -> None:
    content_image("data:1", {"data": 3})
    agent.write(
        "a.toml",
        """
[containers.c]
image = "data:1"
command = ["sh", "-c", "mkdir -m 0700 /data/.holdfast-complete && touch /data/.holdfast-complete/x; exec sleep 10000"]
restart = "always"
stop_grace_period = "0s"
volumes = ["v:/data"]
[volumes.v]
""",
    )
    agent.converge()
    data = data_of(agent, "a/v")
    agent.wait((data / COMPLETE_CONTENT / "x").exists, "it has made the directory")
    agent.cli("restart", "a/c")
    agent.converge()
    assert (data / COMPLETE_CONTENT / "x").exists()
    assert (data.stat().st_uid, stat.S_IMODE(data.stat().st_mode)) == (1000, 0o750)
