"""One git process at a time, run so that it asks nothing, runs no hook and dies when it hangs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from holdfast.errors import TryAgain, UnfitHost, WrongState

# Hooks and helpers that a configuration may name would run as the agent's user; `ext::` URLs run anything at all.
OPTIONS = (
    "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "protocol.ext.allow=never",
    "-c", "gc.autoDetach=false", "-c", "maintenance.autoDetach=false", "-c", "core.logAllRefUpdates=false",
    "-c", "core.fsync=committed,loose-object,reference",
)  # fmt: skip
# A GIT_DIR inherited from a hook would send us into somebody else's repository (git-rev-parse(1), --local-env-vars).
STRAY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE",
         "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_PREFIX", "GIT_SHALLOW_FILE")  # fmt: skip


#: A credential helper (gitcredentials(7)) that answers from its environment: /proc/PID/cmdline is for all to read.
HELPER = (
    '!f() { test "$1" = get || return 0; printf "username=%s\\n" "$HOLDFAST_GIT_USER"; '
    'test -z "$HOLDFAST_GIT_PASSWORD" || printf "password=%s\\n" "$HOLDFAST_GIT_PASSWORD"; }; f'
)


@dataclass(frozen=True, slots=True)
class Login:
    """User and password for what lies below a URL, which has neither in it."""

    place: str
    user: str
    password: str

    @property
    def options(self) -> tuple[str, ...]:
        """Options that make git ask our helper and, if there is a password, nobody else."""
        alone = ("-c", f"credential.{self.place}.helper=") if self.password else ()
        return (*alone, "-c", f"credential.{self.place}.helper={HELPER}")

    @property
    def environment(self) -> dict[str, str]:
        return {"HOLDFAST_GIT_USER": self.user, "HOLDFAST_GIT_PASSWORD": self.password}


def split_login(url: str) -> tuple[str, Login | None]:
    """Split an http(s) URL into the URL without secrets and the login; keep others as they are. Raises ValueError."""
    match = re.match(r"(https?://)([^/?#]*)@([^/?#@]*)", url, re.I)
    if match is None:
        return url, None
    user, _, password = (unquote(part) for part in match[2].partition(":"))
    if not (user + password).isprintable():
        raise ValueError("a control character in its user or password")
    place = f"{match[1]}{match[3]}"
    return place + url[match.end() :], Login(place, user, password)


class GitFailed(TryAgain):
    """git ended with a status other than 0; said is the line of its stderr that tells why."""

    def __init__(self, verb: str, status: int, said: str) -> None:
        super().__init__(f"run 'git {verb}': {redact(said)}")
        self.status = status
        self.said = said


class Git:
    """Runs git in one bare repository. held: descriptors that every process inherits (see GitSource)."""

    def __init__(self, repository: Path, timeout: float, login: Login | None = None) -> None:
        self.repository = repository
        self._login = login
        self.held: tuple[int, ...] = ()
        self._timeout = timeout
        self._running: set[subprocess.Popen[bytes]] = set()
        self._interrupted = threading.Event()

    def init(self) -> None:
        """Make the repository; completes one that was left half made."""
        self.run("init", "--quiet", "--bare", "--template=", "--initial-branch=none", "--", str(self.repository))

    def run(self, verb: str, *arguments: str, feed: bytes = b"", most: int = 0) -> bytes:
        """Run a git command and return its output. Raises GitFailed, UnfitHost (no git), TryAgain (too slow).

        most: with more bytes of output than that it is ended, and WrongState raised; it must need no feed.
        """
        login = self._login.options if self._login else ()
        command = ["git", f"--git-dir={self.repository}", *OPTIONS, *login, verb, *arguments]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment() | (self._login.environment if self._login else {}),
                pass_fds=self.held,
                start_new_session=True,  # no terminal for ssh to ask on, and one group to kill
            )
        except FileNotFoundError as error:
            raise UnfitHost("run 'git': not found (install the package git)") from error
        self._running.add(process)
        with process:
            try:
                if self._interrupted.is_set():
                    kill_group(process)
                if most:
                    output, errors = read_most(process, most, self._timeout), b""
                else:
                    output, errors = process.communicate(feed, self._timeout)
            except subprocess.TimeoutExpired:
                raise TryAgain(f"run 'git {verb}': no end after {self._timeout:g} s") from None
            finally:
                kill_group(process)
                self._running.discard(process)
        if process.returncode != 0:
            raise GitFailed(verb, process.returncode, telling_line(errors.decode(errors="replace")))
        return output

    def interrupt(self) -> None:
        """Kill what runs, and whatever is started from now on."""
        self._interrupted.set()
        for process in tuple(self._running):
            kill_group(process)


def read_most(process: subprocess.Popen[bytes], most: int, timeout: float) -> bytes:
    """Read what a process prints up to its end, without holding more than most bytes. Raises WrongState."""
    assert process.stdout is not None
    slow = threading.Timer(timeout, kill_group, [process])
    slow.start()
    try:
        output = process.stdout.read(most + 1)
    finally:
        slow.cancel()
    if len(output) > most:
        raise WrongState(f"read commit: its listing is longer than {most >> 20} MiB (expected fewer files)")
    process.wait()
    return output


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill git, unless it has ended, and the transport helpers it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in STRAY}
    return kept | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}


def telling_line(errors: str) -> str:
    """The line that says what went wrong: the first fatal one, with what the transport said before it."""
    said = "\n".join(filter(None, map(str.strip, errors.splitlines())))
    lines = re.sub(r"(?m)^(fatal: .*:)\n", r"\1 ", said).splitlines()  # "unable to connect to HOST:" goes on
    fatal = [line.removeprefix("fatal: ") for line in lines if line.startswith("fatal: ")]
    remote = [line for line in lines if re.match(r"remote: |ssh: |ERROR|.*permission denied", line, re.I)]
    if fatal and "could not read from remote repository" in fatal[0].lower() and remote:
        return remote[0].removeprefix("remote: ")
    return (fatal or lines or ["git said nothing"])[0]


def redact(text: str) -> str:
    """Hide user names and passwords of URLs in a text; ssh user names, which are no secret, stay."""
    text = re.sub(r"(?<=://)([^\s/@:']*):[^\s/']*@", r"\1:***@", text)
    return re.sub(r"(https?://)[^\s/@']*(:\*\*\*)?@", r"\1***@", text)
