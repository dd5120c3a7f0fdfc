"""A Dockerfile → the images that it names (what it starts FROM and what it copies or mounts `from`) and its mounts.

Only as much of the language is read as that takes (Dockerfile reference: parser directives, FROM, ARG before FROM,
COPY --from, RUN --mount, here-documents); what is wrong with the rest is said by who builds. Called by `builds`, and
by `images.build`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile

_HEREDOC = re.compile(r"""(?:^|\s)\d*<<-?(["']?)([A-Za-z_]\w*)\1(?=\s|$)""", re.ASCII)
_VARIABLE = re.compile(r"\$(?:(?P<plain>\w+)|\{(?P<name>\w+)(?:(?P<operator>:?[-+])(?P<word>[^}]*))?\})", re.ASCII)
_FROM_OPTION = re.compile(r"--from=(\S+)|--mount=\S*?\bfrom=([^,\s]+)")
_PLATFORM = re.compile(r"--platform=(\S+)")
_KEPT = ("FROM", "ARG", "RUN")  # buildah's cache knows by which arguments these were made


@dataclass(frozen=True, slots=True)
class Use:
    """An image that a Dockerfile names in some line. name: with its variables replaced, written: without. word: the
    instruction. platform: of `FROM --platform`, as written."""

    line: int
    name: str
    written: str
    word: str = "FROM"
    platform: str = ""


@dataclass(frozen=True, slots=True)
class RunMount:
    """What a RUN instruction mounts, in some line. options: of `--mount`, by name; "" for one without a value."""

    line: int
    options: Mapping[str, str]


def images_in(text: str, args: Mapping[str, str]) -> tuple[Use, ...]:
    """Find every image that is named, except earlier stages. args: given from outside, they win over defaults."""
    known: dict[str, str] = {}
    stages: set[str] = set()
    found: list[Use] = []
    for line, word, rest in _instructions(text):
        match word:
            case "ARG" if not stages:
                for each in rest.split():
                    name, given, default = each.partition("=")
                    if given or name in args:
                        known[name] = args.get(name, _replaced(default.strip("\"'"), known))
            case "FROM":
                words = [each for each in rest.split() if not each.startswith("--")]
                written = words[0].strip("\"'") if words else ""
                name = _replaced(written, known)
                if name and name.lower() not in stages and name != "scratch":
                    platform = _PLATFORM.search(rest.partition(written)[0])
                    found.append(Use(line, name, written, platform=platform[1].strip("\"'{}") if platform else ""))
                stages.add(words[2].lower() if len(words) > 2 and words[1].upper() == "AS" else f"{len(stages)}")
            case "COPY" | "ADD" | "RUN":
                options = " ".join(f"--{each}" for each in _options(rest, "--"))
                for match in _FROM_OPTION.finditer(options):
                    written = (match[1] or match[2]).strip("\"'")
                    name = _replaced(written, {**known, **args})
                    if name.lower() not in stages and not name.isdigit():
                        found.append(Use(line, name, written, word))
    return tuple(found)


def mounts_in(text: str, *, heredocs: bool = True) -> tuple[RunMount, ...]:
    """Find what the RUN instructions mount, in order. heredocs: whether the builder knows here-documents; buildah
    before 1.33 takes their lines for instructions."""
    return tuple(
        RunMount(line, dict(each.partition("=")[::2] for each in re.sub("[\"']", "", option).split(",")))
        for line, word, rest in _instructions(text, heredocs=heredocs)
        if word == "RUN"
        for option in _options(rest, "--mount=")
    )


def keyed(text: str, args: Mapping[str, str]) -> str:
    """Add an ARG to each stage, before the first instruction that a build argument may change.

    The name of the ARG is made of all arguments: buildah compares most instructions (ENV, LABEL, COPY, …) as they
    are written, and would take a layer of its cache that was made with other values. What comes before stays cached.
    """
    declared = [(line, word, rest) for line, word, rest in _instructions(text)]
    given = sorted(args.items()) + [("", rest) for _, word, rest in declared if word == "ARG"]
    if all(word != "ARG" for _, word, _ in declared):
        return text
    mark = f"ARG HOLDFAST_CACHE_{sha256(repr(given).encode()).hexdigest()[:12]}"
    lines, before, pending = text.splitlines(), set[int](), False
    for line, word, rest in declared:
        if word == "FROM":
            pending = True
        elif pending and word not in _KEPT and "$" in rest:
            before.add(line)
            pending = False
    marked = (f"{mark}\n{line}" if number in before else line for number, line in enumerate(lines, 1))
    return "\n".join(marked) + "\n"


def _options(rest: str, prefix: str) -> list[str]:
    """Return the values of an instruction's options that start with a prefix."""
    options = takewhile(lambda each: each.startswith("--"), rest.split())
    return [each.removeprefix(prefix) for each in options if each.startswith(prefix)]


def _instructions(text: str, *, heredocs: bool = True) -> Iterator[tuple[int, str, str]]:
    """(line, instruction in upper case, what follows), continued lines joined, no comments; heredocs: no
    here-documents, either. One that does not end is none: its lines are instructions for some builders."""
    lines = text.removeprefix("\ufeff").splitlines()
    escape = _escape(lines)
    at = 0
    while at < len(lines):
        first, joined = at, ""
        while at < len(lines):
            line = lines[at].rstrip()
            at += 1
            if line.lstrip().startswith("#") or (joined and not line):
                continue
            joined += line.removesuffix(escape)  # nothing comes in between: a word may go on in the next line
            if not line.endswith(escape):
                break
        word, rest = (*joined.split(None, 1), "", "")[:2]
        if heredocs and word.upper() in ("RUN", "COPY", "ADD"):
            for match in _HEREDOC.finditer(rest):
                ends = (number for number, line in enumerate(lines[at:], at + 1) if line.strip() == match[2])
                at = next(ends, at)
        if word:
            yield first + 1, word.upper(), rest


def _escape(lines: list[str]) -> str:
    """Return the character that continues a line; a directive at the top may choose another."""
    for line in lines:
        match = re.fullmatch(r"#\s*([a-zA-Z]+)\s*=\s*(\S+)\s*", line)
        if match is None:
            break
        if match[1].lower() == "escape" and match[2] in ("\\", "`"):
            return match[2]
    return "\\"


def _replaced(text: str, values: Mapping[str, str]) -> str:
    """Replace $NAME, ${NAME}, ${NAME:-word} and ${NAME:+word}; a name without a value becomes nothing."""

    def value(match: re.Match[str]) -> str:
        found, operator = values.get(match["plain"] or match["name"]), match["operator"] or ""
        there = bool(found) if operator.startswith(":") else found is not None
        if operator and there == operator.endswith("+"):  # a word instead of a value, or of no value
            return _replaced(match["word"], values)
        return "" if operator.endswith("+") else found or ""

    return _VARIABLE.sub(value, text)
