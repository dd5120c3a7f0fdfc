"""What every test may ask for: a place of its own on this host (`site`), ports, and a small root file system.

A live test that can't run here is skipped with the reason, and fails where CI=true.
"""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from busybox_image import unpack_tar, write_busybox_tar
from ground import PATIENCE, Rootfs, find_port, make_site, patient
from holdfast.drivers import Host

LONGEST = (
    "test_crash.py",
    "test_build_agent.py",
    "test_names.py",
    "test_ending.py",
    "test_demo.py",
    "test_shutdown.py",
)
PROGRAMS = ("conmon", "nft", "ip", "git", "busybox", "skopeo", "buildah")

gc.disable()  # until all tests are collected: none of what they are made of is garbage
os.environ["PATH"] += os.pathsep + "/usr/local/sbin:/usr/sbin:/sbin"


def why_not_live() -> str | None:
    """What keeps live tests from running here; None: nothing."""
    if os.geteuid() != 0:
        return "not root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if shutil.which("crun") is None and shutil.which("runc") is None:
        missing.append("crun or runc")
    return f"missing: {', '.join(missing)} (make setup)" if missing else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left with it: first all that waits for one lock, which one
    worker does, then the longest files.

    Give a test more time where everything takes longer.
    """

    def late(item: pytest.Item) -> tuple[bool, bool, bool]:
        alone = "mounts_alone" in getattr(item, "fixturenames", ())
        return not alone, item.path.name not in LONGEST, item.get_closest_marker("live") is None

    items.sort(key=late)
    for item in items:
        if "mounts_alone" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("mounts"))
        if PATIENCE != 1 and (limit := item.get_closest_marker("timeout")):
            item.add_marker(pytest.mark.timeout(patient(limit.args[0])), append=False)


def pytest_collection_finish() -> None:
    """Keep the tests themselves out of every look for garbage, and out of what a forked process copies."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("live") and (reason := why_not_live()):
        if os.environ.get("CI") == "true":
            pytest.fail(f"a live test can't run here: {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture
def new_site() -> Iterator[Callable[[], Host]]:
    """Make any number of sites, each with a name, places and an address pool of its own."""
    with ExitStack() as stack:
        yield lambda: make_site(stack)


@pytest.fixture
def site(new_site: Callable[[], Host]) -> Host:
    """A name, places and an address pool that no other test has."""
    return new_site()


@pytest.fixture
def mounts_alone() -> Iterator[None]:
    """Keep tests apart that make a mount namespace and tests that need a mount to end with its unmount.

    A new mount namespace holds a copy of every mount of the host, and so each loop device, until it ends.
    """
    with (Path(tempfile.gettempdir()) / "holdfast-tests-mounts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def free_port() -> Iterator[Callable[[], int]]:
    """Find ports of the host that nobody listens on and that no other test is given meanwhile."""
    with ExitStack() as stack:
        yield lambda: find_port(stack)


@pytest.fixture
def free_ports() -> Iterator[Callable[[int], int]]:
    """The same for several ports in a row: returns the first."""
    with ExitStack() as stack:
        yield lambda count: find_port(stack, count)


@pytest.fixture(scope="session")
def busybox_rootfs(tmp_path_factory: pytest.TempPathFactory) -> Rootfs:
    """busybox with all its applets, /etc/passwd and the usual empty folders."""
    folder = tmp_path_factory.mktemp("busybox")
    rootfs = Rootfs(folder / "rootfs", folder / "rootfs.tar")
    write_busybox_tar(rootfs.tar)
    unpack_tar(rootfs.tar, rootfs.path)
    return rootfs
