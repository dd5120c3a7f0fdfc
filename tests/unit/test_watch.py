"""The watch over processes: ends are told of at once, and nothing else is."""

from __future__ import annotations

import os
import queue
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.node.watch import OTHERS, ExitWatch
from holdfast.runtime.conmon import Run, boot_id

PATIENCE = 10.0


@contextmanager
def _process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _run(first: subprocess.Popen[bytes], conmon: subprocess.Popen[bytes]) -> Run:
    return Run(first.pid, conmon.pid, _ticks(first.pid), _ticks(conmon.pid), boot_id())


@pytest.fixture
def woken() -> queue.SimpleQueue[str]:
    return queue.SimpleQueue()


@pytest.fixture
def watch(woken: queue.SimpleQueue[str]) -> Iterator[ExitWatch]:
    made = ExitWatch(woken.put)
    yield made
    made.close()


def test_the_end_of_either_process_wakes(watch: ExitWatch, woken: queue.SimpleQueue[str]) -> None:
    with _process() as first, _process() as conmon:
        run = _run(first, conmon)
        watch.add("web", run)
        assert watch.watches("web", run)
        os.kill(first.pid, signal.SIGKILL)
        assert woken.get(timeout=PATIENCE) == "web"
        assert not watch.watches("web", run)
        os.kill(conmon.pid, signal.SIGKILL)
        assert woken.get(timeout=PATIENCE) == "web"


def test_a_run_of_which_nothing_is_left_wakes_at_once(watch: ExitWatch, woken: queue.SimpleQueue[str]) -> None:
    with _process() as first, _process() as conmon:
        run = _run(first, conmon)
    watch.add("web", run)
    assert woken.get(timeout=PATIENCE) == "web"


def test_a_conmon_that_is_gone_does_not_wake_at_every_look(watch: ExitWatch, woken: queue.SimpleQueue[str]) -> None:
    with _process() as first:
        with _process() as conmon:
            run = _run(first, conmon)
        watch.add("web", run)
        watch.add("web", run)
        assert woken.empty()


def test_a_zombie_that_nobody_has_reaped_does_not_wake_at_every_look(
    watch: ExitWatch, woken: queue.SimpleQueue[str]
) -> None:
    with _process() as first, _process() as conmon:
        run = _run(first, conmon)
        first.kill()
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        watch.add("web", run)
        assert woken.empty()
        assert not watch.watches("web", run)


def test_a_process_that_got_the_number_of_one_that_ended_is_not_watched(
    watch: ExitWatch, woken: queue.SimpleQueue[str]
) -> None:
    with _process() as first, _process() as conmon:
        run = _run(first, conmon)
        other = Run(first.pid, conmon.pid, run.started_ticks - 1, run.conmon_ticks - 1, boot_id())
        watch.add("web", other)
        assert woken.get(timeout=PATIENCE) == "web"
        assert not watch.watches("web", other)


def test_watching_twice_is_watching_once_and_leaves_no_descriptor(woken: queue.SimpleQueue[str]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    made = ExitWatch(woken.put)
    with _process() as first, _process() as conmon:
        for _ in range(3):
            made.add("web", _run(first, conmon))
        made.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_watch_leaves_descriptors_to_everything_else(watch: ExitWatch, woken: queue.SimpleQueue[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with _process() as first, _process() as conmon:
        run = _run(first, conmon)
        resource.setrlimit(resource.RLIMIT_NOFILE, (OTHERS + 1, hard))
        try:
            watch.add("web", run)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert woken.empty()
        assert not watch.watches("web", run)
        watch.add("web", run)
        assert watch.watches("web", run)
