"""What every live test is held to (nothing of it is left on the host), and an agent of its own for those that ask."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from footprint import sweep, wait_clean
from ground import Rootfs, patient
from holdfast.config import ImageSettings
from holdfast.drivers import Host
from holdfast.images.incoming.pull import Puller
from holdfast.images.kept.store import ImageStore
from live.agent import LiveAgent
from live.mounts import Mounts
from live.registry import Registry
from live.workshop import Workshop

QUICK = ImageSettings(stall_timeout=patient(20.0), min_free=0)


@pytest.fixture(autouse=True)
def clean_host(site: Host) -> Iterator[None]:
    """Fail when the test leaves anything on the host that bears its site's name; sweep it away all the same."""
    yield
    left = wait_clean(site, patient(10.0))
    if left:
        sweep(site)
        pytest.fail("left on the host:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture
def new_agent(
    tmp_path: Path, busybox_rootfs: Rootfs, request: pytest.FixtureRequest
) -> Iterator[Callable[[Host], LiveAgent]]:
    """Make agents for any sites; each is brought back to nothing at the end, and its host checked."""
    made: list[LiveAgent] = []

    def make(host: Host) -> LiveAgent:
        made.append(LiveAgent(host, tmp_path / host.name, busybox_rootfs))
        request.node.stash.setdefault(AGENTS, []).append(made[-1])
        return made[-1]

    yield make
    for agent in made:
        agent.close()


@pytest.fixture
def agent(new_agent: Callable[[Host], LiveAgent], site: Host) -> LiveAgent:
    """An agent of the test's own, running, with nothing to hold yet and the image `busybox:1`."""
    agent = new_agent(site)
    agent.start()
    agent.image("busybox:1")
    return agent


@pytest.fixture
def mounts(mounts_alone: None) -> Iterator[Mounts]:
    """Makes mounts, which are gone at the end."""
    with ExitStack() as stack:
        yield Mounts(stack)


@pytest.fixture
def hang() -> Iterator[Callable[[Path], None]]:
    """Mount file systems that answer nobody, as NFS does whose server is gone; at the end they fail."""
    libc, served = ctypes.CDLL(None, use_errno=True), dict[Path, int]()

    def mount(point: Path) -> None:
        served[point] = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={served[point]},rootmode=40000,user_id=0,group_id=0"
        if libc.mount(b"hung", os.fsencode(point), b"fuse", 0, options.encode()) != 0:
            pytest.skip(f"mount fuse: {os.strerror(ctypes.get_errno())}")

    yield mount
    for point, handle in served.items():
        os.close(handle)
        assert libc.umount2(os.fsencode(point), 2) == 0  # MNT_DETACH


@pytest.fixture
def new_registry(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Registry]]:
    """Make registries on 127.0.0.1 (or as `live.registry.Registry` takes it); all are gone at the end."""
    with ExitStack() as stack:

        def make(**options: Any) -> Registry:
            port = free_port()
            made = Registry(tmp_path / f"registry-{port}", port, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def registry(new_registry: Callable[..., Registry]) -> Registry:
    """An empty registry on 127.0.0.1, over plain HTTP, for anyone."""
    return new_registry()


@pytest.fixture
def new_puller(tmp_path: Path) -> Iterator[Callable[..., Puller]]:
    """Make pullers, each with a store in root (default: one of the test's own), which are closed at the end."""
    with ExitStack() as stack:

        def make(settings: ImageSettings = QUICK, root: Path | None = None, **rest: Any) -> Puller:
            puller = Puller(ImageStore(root or tmp_path / "images", settings), settings, **rest)
            stack.callback(puller.close)
            return puller

        yield make


@pytest.fixture
def puller(new_puller: Callable[..., Puller]) -> Puller:
    """A puller with an empty store."""
    return new_puller()


@pytest.fixture
def workshop(site: Host) -> Workshop:
    """A builder of the test's own, with an empty store and cache."""
    return Workshop(site)


AGENTS = pytest.StashKey[list[LiveAgent]]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.CallInfo[None], None]:
    """Show the agents' logs with a failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        report.sections += [(f"agent {agent.host.name}", agent.log()) for agent in item.stash.get(AGENTS, [])]
