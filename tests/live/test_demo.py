"""`make demo` holds what it promises: it observes each step, and leaves nothing behind however it ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from footprint import wait_clean
from ground import patient
from holdfast.drivers import Host

DEMO = Path(__file__).parents[2] / "examples/demo.py"

pytestmark = [pytest.mark.live, pytest.mark.timeout(300), pytest.mark.xdist_group("demo")]


@pytest.fixture(autouse=True)
def one_at_a_time() -> Iterator[None]:
    """There is one demo on a host; workers of xdist wait for each other."""
    with (Path(tempfile.gettempdir()) / "holdfast-tests-demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def demo(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", DEMO, *arguments], text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def what_is_left() -> list[str]:
    """What bears the demo's name; where its root was does not matter any more."""
    return wait_clean(Host("hfdemo", Path("/nonexistent/hfdemo"), Path("/run/hfdemo")))


def test_demo_observes_every_step_and_leaves_nothing() -> None:
    with demo("--shared") as process:
        told, _ = process.communicate(timeout=patient(110))
    assert process.returncode == 0, told
    assert "make run" in told.splitlines()[-1]
    assert what_is_left() == []


def test_demo_that_is_interrupted_leaves_nothing() -> None:
    with demo("--shared") as process:
        assert process.stdout
        seen = next((line for line in process.stdout if "server and client run" in line), None)
        assert seen, "the first step did not come up"
        os.kill(process.pid, signal.SIGINT)
        told, _ = process.communicate(timeout=patient(60))
    assert process.returncode == 130, told
    assert what_is_left() == []
