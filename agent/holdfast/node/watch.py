"""Notices the end of processes at once: one thread, one epoll, a pidfd each. Nothing is polled.

The container's process and its conmon are both watched: the first says that something happened, the second that
the exit file is written.
"""

from __future__ import annotations

import os
import resource
import select
import threading
from collections.abc import Callable

from holdfast.runtime.conmon import Run, is_running, reap

OTHERS = 256  # descriptors that are left to everything else


class ExitWatch:
    """Calls wake(instance) from its thread when a process of an instance ends."""

    def __init__(self, wake: Callable[[str], None]) -> None:
        self._wake = wake
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[str, int]] = {}  # pidfd → instance, pid
        self._known: set[tuple[str, int]] = set()
        self.watching: set[str] = set()  # instances of whose run both processes are watched
        self._lock = threading.Lock()
        self._doorbell, self._bell = os.pipe()
        self._epoll.register(self._doorbell, select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, name="exits", daemon=True)
        self._thread.start()

    def add(self, instance: str, run: Run) -> None:
        """Watch both processes of a run, and wake at once if neither is there any more. Idempotent.

        One alone that is gone is no news: a conmon that was killed is gone for good, and what a conmon that is left
        has still to write down is there when it ends.
        """
        there = [
            self._add(instance, pid, ticks)
            for pid, ticks in ((run.pid, run.started_ticks), (run.conmon_pid, run.conmon_ticks))
        ]
        with self._lock:
            if self.watches(instance, run):
                self.watching.add(instance)
        if not any(there):
            self._wake(instance)

    def watches(self, instance: str, run: Run) -> bool:
        """Whether both processes of a run are watched, and so run: costs no system call."""
        return (instance, run.pid) in self._known and (instance, run.conmon_pid) in self._known

    def close(self) -> None:
        """End the thread and let go of every process."""
        os.write(self._bell, b".")
        self._thread.join()
        for fd in (*self._watched, self._doorbell, self._bell):
            os.close(fd)
        self._epoll.close()

    def _add(self, instance: str, pid: int, ticks: int) -> bool:
        """Watch one process; False if it has ended, whoever has its number now. One that there is no descriptor left
        for is looked at by every pass instead."""
        with self._lock:
            if (instance, pid) in self._known:
                return True
            if len(self._watched) >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHERS:
                return is_running(pid, ticks)
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                return False
            if not is_running(pid, ticks):
                os.close(fd)
                reap(pid)
                return False
            self._known.add((instance, pid))
            self._watched[fd] = (instance, pid)
            self._epoll.register(fd, select.EPOLLIN)
            return True

    def _serve(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._doorbell:
                    return
                with self._lock:
                    instance, pid = self._watched.pop(fd)
                    self._known.discard((instance, pid))
                    self.watching.discard(instance)
                    self._epoll.unregister(fd)
                    os.close(fd)
                reap(pid)
                self._wake(instance)
