"""What a build says → its log, and the one line that is told when it fails.

The words are those of buildah and of the container tools within it. Called by `build`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from holdfast.errors import HoldfastError, WrongState
from holdfast.images.builds.buildah import STEP, Failed
from holdfast.images.registry.faults import explain, failure, message_of

RETRY = 60.0  # seconds; a build that failed is not tried again before, unless something else is committed
NOISE = re.compile(
    r"Error: |error running container: from \S+ (?!creating)|: exit status|time=|--> |subprocess exited with |"
    + STEP.pattern
)
UNSTARTED = re.compile(r"error running container: from (\S+) creating container for \[.*?\]: (.*)")
DUMPED = re.compile(r"step \{Env:\[.*? Original:(.*?)\}")  # buildah prints the whole of its own value
UNKNOWN = re.compile(r'.*Unknown instruction: "(.*?)" &imagebuilder\.Step\{.*\}')
ABSENT = re.compile(r'checking on sources under "(.*?)": .*?copier: stat: \[?"(.*)"\]?: no such file or directory')
NO_STAGE = re.compile(r"((?:COPY|ADD) --from=\S+): no stage or image found with that name")
UNWRITTEN = re.compile(r"committing container for step \{.*\}: (?:.*: )?(.*)")
FULL = " (see 'holdfast system df')"
NO_SPACE = re.compile("no space left on", re.IGNORECASE)
HEREDOC = re.compile(r"""<<-?(["']?)([A-Za-z_]\w*)\1.*\n((?:.*\n)*?[ \t]*\2[ \t\r]*)$""", re.MULTILINE)
LAST_LINES = 10  # of a log, in the event of a build that failed
LONGEST_STEP = 80  # characters of an instruction in an error
LONGEST_EVENT = 400  # characters of a line in an event
LOG_LIMIT = 16 << 20  # bytes of one log; what a build says beyond it is not kept
REGISTRY = re.compile(r"docker://|pinging container registry|short-name|registr(y|ies)\b")


def failed(name: str, error: Failed, log: Path, dockerfile: str = "") -> HoldfastError:
    """What buildah or skopeo said → one line: the step, its end, and what it said last. Pure."""
    reasons = [line.removeprefix("Error: ") for line in error.errors if line.startswith("Error: ")]
    reason = reasons[-1] if reasons else next(reversed([*error.output, *error.errors]), str(error))
    unwritten = UNWRITTEN.fullmatch(reason)
    reason = DUMPED.sub(lambda step: _shortened(step[1]), reason)
    reason = message_of(reason) if "level=fatal" in reason else reason
    begun = max((at for at, line in enumerate(error.output) if STEP.match(line)), default=-1)
    step = STEP.sub("", error.output[begun]) if begun >= 0 else ""
    kind: type[HoldfastError] = WrongState
    wait, what, cause = RETRY, "", reason
    found = None if error.exceeded else _in_step(reason, step)
    if error.exceeded:
        what, cause, reason = step, error.exceeded, ""
    elif found:
        what, cause = found
        if unknown := UNKNOWN.fullmatch(cause):
            what, cause = step or what, f"unknown instruction '{unknown[1]}'"
            bodies = "\n".join(match[3] for match in HEREDOC.finditer(dockerfile)).upper().splitlines()
            inside = any(line.split()[:1] == [unknown[1]] for line in bodies)
            cause += " (this buildah has no heredocs)" if inside else ""
        elif absent := ABSENT.fullmatch(cause):
            cause = _absent(absent[1], absent[2], what)
        elif "exit status" in cause and (last := _last_word(error.output[begun + 1 :], error.errors)):
            cause += f": {last}"
    elif unwritten:
        what, cause = step, f"its layer can't be written: {unwritten[1]}"
    elif nowhere := NO_STAGE.fullmatch(reason):
        what, cause = nowhere[1], "no stage is called so, and no such image could be had"
        tried = [line for line in error.errors if "Error: initializing source docker://" in line]
        reason = tried[-1].partition("Error: ")[2] if tried else ""
    elif reason.startswith("creating build container: "):
        what, cause = step, reason.removeprefix("creating build container: ")
        if short := re.match(r'short-name "(.*?)" did not resolve to an alias and no unqual', cause):
            whole = f"docker.io/{'' if '/' in short[1] else 'library/'}{short[1]}"
            cause = f"no stage and no image here is called so, and it names no registry (expected {whole}, say)"
            reason = ""
        elif cause.endswith(": image not known"):
            cause = "no such image here, and none is to be pulled (expected it to be loaded, or another `pull`)"
    if not found and not unwritten and REGISTRY.search(reason):
        asked = re.search(r"docker://(\S+?):?(?=[\s\"]|$)", reason)
        image = asked[1] if asked else ""
        explained, what = explain(reason, "build", "", (image, image.rpartition(":")[0])), what or image
        kind, wait, cause = type(explained), max(explained.wait, RETRY), str(explained).removeprefix("build '': ")
    what = f"{_shortened(what)}: " if what else ""
    hint = FULL if unwritten else hint_of(cause)
    return failure(kind, f"build 'images.{name}': {what}{cause}{hint} (all of it is in {log})", wait)


def _in_step(reason: str, step: str) -> tuple[str, str] | None:
    """The instruction and what became of it, where it failed at one. step: the last that was begun."""
    match = re.fullmatch(rf'building at STEP "({re.escape(step)}|.*?)": (?:while running runtime: )?(.*)', reason)
    return (match[1].strip(), match[2]) if match else None


def _absent(where: str, path: str, step: str) -> str:
    """Why what is to be copied is not there."""
    if path.startswith("/<<"):
        return "this buildah has no heredocs"
    if where.endswith("/context"):
        return f"'{path[1:]}' is not in the context (or .dockerignore leaves it out)"
    source = re.search(r"\bfrom=([^\s,]+)", step)
    return f"'{path}' is not in '{source[1]}'" if source else f"'{path}' is not there"


def _last_word(output: Sequence[str], errors: Sequence[str]) -> str:
    """Of what a step said, the line that says most likely why it failed; "" without one."""
    loud, quiet = ([line for line in said if not NOISE.match(line)] for said in (errors, output))
    full = [line for line in [*quiet, *loud] if NO_SPACE.search(line)]
    said = next(reversed(full or loud or quiet), "")
    if unstarted := UNSTARTED.match(said):
        said = f"{Path(unstarted[1]).name}: {unstarted[2]}"
    return said.strip()[:LONGEST_EVENT]


def hint_of(cause: str) -> str:
    """What to look at, where a disk is full."""
    return FULL if NO_SPACE.search(cause) else ""


def _shortened(instruction: str) -> str:
    return instruction if len(instruction) <= LONGEST_STEP else f"{instruction[:LONGEST_STEP]}…"


class Log:
    """The file that the output of one build goes to. begun: called with each step. last: the lines that came last."""

    def __init__(self, path: Path, begun: Callable[[str], None] = lambda step: None) -> None:
        self.path, self._begun = path, begun
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._size = 0

    def __enter__(self) -> Log:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        self._file = self.path.open("w", encoding="utf-8", errors="replace")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def hear(self, line: str) -> None:
        """Take one line."""
        if self._size <= LOG_LIMIT:
            self._size += len(line) + 1
            self._file.write(f"{line}\n" if self._size <= LOG_LIMIT else "what follows is not kept\n")
            self._file.flush()
        line = line if len(line) <= LONGEST_EVENT else f"{line[:LONGEST_EVENT]}…"
        self.last.append(line)
        if STEP.match(line):
            self._begun(line)
