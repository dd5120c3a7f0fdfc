"""A branch of a git repository → Revision: git fetches into a bare mirror, a commit is read from there as one value.

    refresh   ls-remote → fetch, if the tip moved → check (descends, readable) → refs/holdfast/current
    current   refs/holdfast/current → ls-tree + cat-file, once for each commit

What fails before the last arrow changes nothing: `current` still returns the commit that was accepted last, even
after a restart while the remote is down. git finds credentials itself: helpers, GIT_ASKPASS, ssh_config(5).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import posixpath
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from holdfast.errors import HoldfastError, TryAgain, UnfitHost, WrongConfig, WrongState, reason
from holdfast.files import held
from holdfast.source.gitcommand import Git, GitFailed, redact, split_login
from holdfast.source.revision import Revision, SourceState, Watch
from holdfast.source.snapshot import read_commit

CURRENT = "refs/holdfast/current"
FETCHED = "refs/holdfast/fetched"
LONGEST_BACKOFF = 600.0
JITTER = 0.1
log = structlog.get_logger("holdfast")


class Rewritten(TryAgain):
    """The branch does not contain the commit that was last accepted; a person has to confirm that."""


class GitSource:
    """The state in folder `path` of a branch. url: a path, file://, https:// or ssh (also host:path)."""

    def __init__(
        self,
        url: str,
        root: Path,
        branch: str = "main",
        path: str = "",
        interval: float = 30.0,
        timeout: float = 300.0,
    ) -> None:
        """root: the agent's; the mirror is below it. interval, timeout (of one git process): seconds."""
        if url.startswith("-") or not re.fullmatch(r"(?!-)[^\s~^:?*\[\\]+", branch) or ".." in branch:
            raise WrongConfig(f"state.git '{redact(url)}', branch '{branch}': not a URL and the name of a branch")
        self._branch, self._interval = branch, interval
        self._shown = redact(url)
        try:
            self._url, login = split_login(url)
        except ValueError as error:
            raise WrongConfig(f"state.git '{self._shown}': {error}") from error
        self._path = posixpath.normpath(path.strip("/")) if path.strip("/.") else ""
        name = hashlib.sha256(f"{url}\0{branch}".encode()).hexdigest()[:16]
        self._mirror = root / "source" / f"{name}.git"
        self._git = Git(self._mirror, timeout, login)
        self._working = threading.Lock()
        self._reading = threading.Lock()
        self._noting = threading.Lock()
        self._refused: tuple[str, HoldfastError] | None = None  # a tip not to fetch again, and why
        self._revision: Revision | None = None
        self._state = SourceState(kind="git", url=self._shown, branch=branch, path=self._path)

    def state(self) -> SourceState:
        return self._state

    def current(self, *, light: bool = False) -> Revision:
        """Read the commit that was last accepted; see Source.current."""
        with self._reading:
            commit = self._accepted()
            if not commit:
                raise TryAgain(self._state.error or f"read '{self._shown}': not fetched yet")
            if self._revision is None or self._revision.id != commit:
                self._show(self._read(commit))
            assert self._revision is not None
            return self._revision

    def refresh(self, *, accept_rewrite: bool = False) -> None:
        """Fetch the branch if its tip moved, and accept it if it may be; see Source.refresh."""
        with self._working:
            try:
                with self._alone():
                    revision = self._advance(accept_rewrite)
            except HoldfastError as error:
                self._fail(error)
                raise
            except OSError as error:
                failure = UnfitHost(f"fetch '{self._shown}' into '{self._mirror}': {reason(error)}")
                self._fail(failure)
                raise failure from error
            with self._reading:
                self._show(revision)
            self._note(error="", failures=0, fetched_at=time.time())

    def newest(self) -> Revision:
        """Read the branch's tip as a refresh would, and accept nothing; see Source.newest."""
        with self._working, self._alone():
            return self._look(accept_rewrite=False)

    def watch(self, wake: Callable[[str], None]) -> Watch:
        """Poll in a thread of its own; wake when the commit, or what is wrong, changed."""
        return GitPoll(self, wake, self._interval)

    def interrupt(self) -> None:
        """Make every refresh and read fail at once from now on, including those under way."""
        self._git.interrupt()

    def plan_next(self, seconds: float) -> None:
        """Note when the next poll will be, for `state`."""
        self._note(next_try_at=time.time() + seconds)

    def _advance(self, accept_rewrite: bool) -> Revision:
        """Fetch the tip and accept it."""
        revision = self._look(accept_rewrite)
        if revision.id != self._accepted():
            self._git.run("update-ref", CURRENT, revision.id)
        self._refused = None
        return revision

    def _look(self, accept_rewrite: bool) -> Revision:
        """Fetch the tip, and read it if it may follow the accepted commit."""
        tip, before = self._tip(), self._accepted()
        if tip == before:
            return self._revision if self._revision and self._revision.id == tip else self._read(tip)
        if self._refused and self._refused[0] == tip and not accept_rewrite:
            cause = self._refused[1]
            raise type(cause)(*cause.args)
        tip = self._fetch()
        try:
            if before and not accept_rewrite:
                self._check_descent(tip, before)
            return self._read(tip)
        except (Rewritten, WrongState) as error:
            self._refused = (tip, error)
            raise

    def _check_descent(self, tip: str, before: str) -> None:
        try:
            self._git.run("merge-base", "--is-ancestor", before, tip)
        except GitFailed as error:
            if error.status != 1:
                raise
            raise Rewritten(
                f"fetch '{self._shown}': the history of branch '{self._branch}' was rewritten: {tip[:10]} does not "
                f"follow {before[:10]}: what runs stays (`holdfast sync --accept-rewrite` takes it)"
            ) from None

    def _tip(self) -> str:
        ref = f"refs/heads/{self._branch}"
        try:
            said = self._git.run("ls-remote", "--", self._url, ref).decode()
        except GitFailed as error:
            raise self._unreachable(error) from error
        for line in said.splitlines():  # a pattern without wildcards also matches the tails of longer names
            if line.endswith(f"\t{ref}"):
                return line.split("\t")[0]
        gone = f"branch '{self._branch}' is gone: what runs stays" if self._accepted() else ""
        raise TryAgain(f"fetch '{self._shown}': {gone or f'there is no branch {self._branch!r}'}")

    def _fetch(self) -> str:
        try:
            self._git.run(
                "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--force", "--no-recurse-submodules",
                "--", self._url, f"+refs/heads/{self._branch}:{FETCHED}",
            )  # fmt: skip
        except GitFailed as error:
            raise self._unreachable(error) from error
        return self._git.run("rev-parse", "--verify", FETCHED).decode().strip()

    def _unreachable(self, error: GitFailed) -> TryAgain:
        hint = " (git config --system --add safe.directory PATH)" if "dubious ownership" in error.said else ""
        return TryAgain(f"fetch '{self._shown}': can't be fetched: {redact(error.said)}{hint}")

    def _accepted(self) -> str:
        """The commit last accepted, or ""."""
        with contextlib.suppress(OSError):
            return (self._mirror / CURRENT).read_text().strip()
        if (self._mirror / "HEAD").exists():  # packed by git-gc(1), or never written
            with contextlib.suppress(GitFailed):
                return self._git.run("rev-parse", "--verify", "--quiet", CURRENT).decode().strip()
        return ""

    def _read(self, commit: str) -> Revision:
        revision = read_commit(self._git, commit, self._path, self._shown)
        return replace(revision, url=self._shown, branch=self._branch)

    def _show(self, revision: Revision) -> None:
        self._revision = revision
        self._note(revision=revision.id, author=revision.author, message=revision.message, committed_at=revision.at)

    def _fail(self, error: HoldfastError) -> None:
        self._note(error=str(error), failures=self._state.failures + 1)

    def _note(self, **known: Any) -> None:
        with self._noting:
            self._state = replace(self._state, **known)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the mirror for one refresh, and remove what a killed git left in it.

        Every git we start inherits the lock's descriptor: one that outlives a killed agent keeps the mirror locked,
        so a lock file of git's that is found here belongs to nobody.
        """
        self._mirror.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with held(os.open(self._mirror.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TryAgain(f"fetch '{self._shown}': another git is at work in '{self._mirror}'") from None
            self._git.held = (lock,)
            try:
                self._tidy()
                if not (self._mirror / CURRENT).exists():
                    self._git.init()
                yield
            finally:
                self._git.held = ()

    def _tidy(self) -> None:
        left = [*self._mirror.glob("*.lock"), *self._mirror.glob("refs/**/*.lock")]
        left += [*self._mirror.glob("objects/pack/tmp_*"), *self._mirror.glob("objects/??/tmp_obj_*")]
        left += [path for path in self._mirror.glob("objects/tmp_objdir-*/**/*") if path.is_file()]
        left += [ref for ref in self._mirror.glob("refs/holdfast/*") if not ref.stat().st_size]  # left by a power cut
        for path in left:
            path.unlink(missing_ok=True)


class GitPoll:
    """Refreshes a GitSource every interval, with jitter; after failures, half as often each time."""

    def __init__(self, source: GitSource, wake: Callable[[str], None], interval: float) -> None:
        self._source = source
        self._wake = wake
        self._interval = interval
        self._poked = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._poll, name="holdfast-poll", daemon=True)
        self._thread.start()

    def poke(self) -> None:
        self._poked.set()

    def close(self) -> None:
        self._closed = True
        self._poked.set()
        self._source.interrupt()  # an agent that ends does not wait for a remote that hangs, nor leave a git behind
        self._thread.join()

    def _poll(self) -> None:
        while not self._closed:
            before = self._source.state()
            try:
                self._source.refresh()
            except HoldfastError:
                pass  # it is in state().error
            except Exception:  # a bug must not end the polling in silence
                log.exception("poll failed")
            after = self._source.state()
            pause = next_pause(self._interval, after.failures, random.random())
            self._source.plan_next(pause)
            if self._closed:
                return
            if after.revision != before.revision:
                self._wake(f"commit {after.revision[:10]}: {after.message}")
            elif after.error != before.error:
                self._wake(after.error or "the repository can be read again")
            self._poked.wait(pause)
            self._poked.clear()


def next_pause(interval: float, failures: int, chance: float) -> float:
    """Seconds until the next poll: doubled by each failure up to ten minutes, spread by chance (0 to 1)."""
    longest = max(interval, LONGEST_BACKOFF)
    pause = min(interval * 2.0 ** min(failures, 32), longest)
    return pause * (1 - JITTER + 2 * JITTER * chance)
