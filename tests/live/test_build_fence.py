"""What a build can reach, whatever is in its Dockerfile, its base and its arguments: nothing of the host."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ground import patient, wait_for
from holdfast.errors import TryAgain, WrongState
from holdfast.images.builds import fence, hazards
from holdfast.images.builds.buildah import check_plain
from holdfast.images.builds.hazards import buildah_version, is_safe
from holdfast.images.incoming.load import load_archive
from layouts import Layout
from live.processes import command_lines
from live.workshop import BUSYBOX, STATE, Workshop, busybox, content, shop

pytestmark = pytest.mark.live


def behind_the_fence(workshop: Workshop, script: str, **options: Any) -> str:
    """What a shell says that broke out of its step: it is where buildah itself is."""
    with workshop.buildah.alone():
        return "\n".join(workshop.buildah._run(["sh", "-c", f"exec 2>&1; {script}; true"], **options))


def test_what_breaks_out_of_a_step_finds_nothing_of_the_host(workshop: Workshop, tmp_path: Path) -> None:
    secret = workshop.host.root / "secret"
    secret.write_text("host-secret")
    tmp_path.joinpath("open").write_text("for anyone")
    said = behind_the_fence(
        workshop,
        f"cat {secret} {tmp_path}/open /etc/shadow /etc/hostname; ls -d /home /var/lib /sys/fs/cgroup/*; "
        "for each in /proc/[0-9]*; do echo process; done; mount -t cgroup -o memory none /mnt; "
        "mknod /tmp/disk b 254 0; unshare --user true; echo x > /usr/bin/x; mount -o remount,rw /usr; "
        "umount /usr; ls /dev; cat /proc/self/uid_map; dmesg | head -1; nsenter -t 1 -a true && echo entered",
    )
    assert "host-secret" not in said
    assert "for anyone" not in said
    assert "root:" not in said
    assert said.count("process") < 8, "its own processes alone"
    listed = {line for line in said.splitlines() if re.fullmatch(r"\w+", line)} - {"process", "entered"}
    links = {"fd", "ptmx", "stderr", "stdin", "stdout"}
    assert listed <= links | {
        "fd",
        "full",
        "null",
        "ptmx",
        "pts",
        "random",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "tty",
        "urandom",
        "zero",
    }
    for refused in ("mknod: /tmp/disk", "unshare failed", "cannot create /usr/bin/x", "umount: /usr"):
        assert refused in said
    assert str(fence.FIRST_ID) in said
    assert not Path("/usr/bin/x").exists()


def test_root_behind_the_fence_is_nobody_who_owns_anything(workshop: Workshop) -> None:
    with workshop.buildah.alone():
        made = workshop.buildah.work / "made"
        workshop.buildah._run(["sh", "-c", f"touch {made}"])
        assert made.lstat().st_uid == fence.FIRST_ID


@pytest.mark.parametrize("planted", ["storage/overlay-images", "storage/overlay-images/images.json"])
def test_links_that_a_build_leaves_in_its_storage_are_not_followed(workshop: Workshop, planted: str) -> None:
    elsewhere = workshop.host.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "images.json").write_text('[{"id": "x", "names": ["stolen"]}]')
    target = elsewhere if planted.endswith("images") else elsewhere / "images.json"
    link = workshop.buildah.folder / planted
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    assert workshop.buildah.names() == {}


def test_what_is_no_file_is_not_read_out_of_a_build(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/x").symlink_to("/etc/shadow")
    with pytest.raises(WrongState, match=r"'x' is neither a file nor a folder"):
        check_plain(tmp_path)


def test_a_link_of_a_stage_is_mounted_by_no_build(workshop: Workshop) -> None:
    """CVE-2024-1753, as a buildah without its repair would do it: it reaches the fence, and nothing of the host."""
    secret = workshop.host.root / "secret"
    secret.mkdir()
    (secret / "key").write_text("host-secret")
    steal = f"RUN --mount=type=bind,from=stage,source=/link,target=/p,rw cat /p{secret}/key; "
    steal += f"echo x > /p{secret}/new; true\n"
    files = shop(BUSYBOX + "FROM tools AS stage\nRUN ln -s / /link\nFROM tools\n" + steal)
    if not is_safe(buildah_version(Path(shutil.which("buildah") or ""))):
        with pytest.raises(WrongState, match=r"line \d+: RUN --mount: source '/link' in 'stage': .*CVE-2024-1753"):
            workshop.build(files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hazards, "SAFE", (0, 0, 0))  # any buildah counts as one that has the repair
        with suppress(WrongState):
            workshop.build(files)
    assert not (secret / "new").exists()
    log = workshop.host.root / "builds/logs/shop/web.log"
    assert "STEP" in log.read_text()
    assert "host-secret" not in log.read_text()


def test_what_an_image_makes_of_each_dockerfile_is_checked_and_done(workshop: Workshop, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    files = [{"bin": None, "bin/busybox": busybox(), "bin/sh": "busybox"}]
    for name, trigger in (
        ("good", "RUN busybox touch /made"),
        ("bad", "RUN --mount=type=bind,from=good:1,source=../x,target=/p true"),
    ):
        layout.tag(layout.image(files, config={"OnBuild": [trigger]}, history=[{"created_by": "tar"}]), f"{name}:1")
    load_archive(workshop.store, layout.path)
    assert workshop.build(shop("FROM good:1\n")).lookup("/made") is not None
    with pytest.raises(WrongState, match=r"ONBUILD of 'bad:1': RUN --mount: source '\.\./x' leads out of its place"):
        workshop.build(shop("FROM bad:1\n"))


def test_the_id_of_a_cache_leads_nowhere_else(workshop: Workshop) -> None:
    """CVE-2024-9675."""
    step = "RUN --mount=type=cache,target=/c,id=../../../../../../escape echo x > /c/x\n"
    with pytest.raises(WrongState, match=r"line 4: RUN --mount: id '\.\./.*' leads out of its place"):
        workshop.build(shop(BUSYBOX + step))
    image = workshop.build(shop(BUSYBOX + step.replace("../", "") + "RUN echo done > /done\n"))
    assert content(image, "/done") == "done\n"


def test_no_argument_of_a_build_is_in_a_command_line(workshop: Workshop) -> None:
    state = STATE.replace("[containers", 'args = { TOKEN = "s3cret-of-build" }\n[containers')
    step = 'RUN echo begun; [ "$TOKEN" = s3cret-of-build ] && sleep 1000\n'
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(workshop.build, shop(BUSYBOX + "ARG TOKEN\n" + step, state))
        wait_for(lambda: "begun\n" in workshop.log(), "the step runs")
        seen = [line for line in command_lines() if b"s3cret-of-build\0" in line or b"=s3cret-of-build" in line]
        workshop.builder.close()
        with pytest.raises(TryAgain):
            building.result(patient(20))
    assert seen == []
