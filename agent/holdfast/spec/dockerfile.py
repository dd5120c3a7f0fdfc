"""A Dockerfile → the images that it names: what it starts FROM and what it copies or mounts `from`.

Only as much of the language is read as that takes (Dockerfile reference: parser directives, FROM, ARG before FROM,
COPY --from, RUN --mount, here-documents); what is wrong with the rest is said by who builds. Called by `builds`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile

_HEREDOC = re.compile(r"""<<-?\s*(["']?)([A-Za-z_][A-Za-z0-9_]*)\1""")
_VARIABLE = re.compile(r"\$(?:(?P<plain>\w+)|\{(?P<name>\w+)(?:(?P<operator>:?[-+])(?P<word>[^}]*))?\})", re.ASCII)
_FROM_OPTION = re.compile(r"--from=(\S+)|--mount=\S*?\bfrom=([^,\s]+)")


@dataclass(frozen=True, slots=True)
class Use:
    """An image that a Dockerfile names in some line. name: with its variables replaced, written: without."""

    line: int
    name: str
    written: str


def images_in(text: str, args: Mapping[str, str]) -> tuple[Use, ...]:
    """Every image named, in order; names of earlier stages are none. args: given from outside, they beat defaults."""
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
                    found.append(Use(line, name, written))
                stages.add(words[2].lower() if len(words) > 2 and words[1].upper() == "AS" else f"{len(stages)}")
            case "COPY" | "ADD" | "RUN":
                options = " ".join(takewhile(lambda each: each.startswith("--"), rest.split()))
                for match in _FROM_OPTION.finditer(options):
                    written = (match[1] or match[2]).strip("\"'")
                    name = _replaced(written, {**known, **args})
                    if name.lower() not in stages and not name.isdigit():
                        found.append(Use(line, name, written))
    return tuple(found)


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, instruction in upper case, what follows), continued lines joined, no comments, no here-documents."""
    lines = text.removeprefix("\ufeff").splitlines()
    escape = _escape(lines)
    at = 0
    while at < len(lines):
        first, joined = at, ""
        while at < len(lines):
            line = lines[at].strip()
            at += 1
            if line.startswith("#") or (joined and not line):
                continue
            joined += line.removesuffix(escape) + " "
            if not line.endswith(escape):
                break
        word, _, rest = joined.strip().partition(" ")
        if word.upper() in ("RUN", "COPY", "ADD"):
            for match in _HEREDOC.finditer(rest):
                while at < len(lines) and lines[at].strip() != match[2]:
                    at += 1
                at += 1
        if word:
            yield first + 1, word.upper(), rest


def _escape(lines: list[str]) -> str:
    """The character that continues a line: a directive at the top may choose another."""
    for line in lines:
        match = re.fullmatch(r"#\s*([a-zA-Z]+)\s*=\s*(\S+)\s*", line)
        if match is None:
            break
        if match[1].lower() == "escape" and match[2] in ("\\", "`"):
            return match[2]
    return "\\"


def _replaced(text: str, values: Mapping[str, str]) -> str:
    """The text with $NAME, ${NAME}, ${NAME:-word} and ${NAME:+word} replaced; what has no value becomes nothing."""

    def value(match: re.Match[str]) -> str:
        found = values.get(match["plain"] or match["name"])
        there = bool(found) if (match["operator"] or "").startswith(":") else found is not None
        if (match["operator"] or "").endswith("-"):
            return found or "" if there else _replaced(match["word"], values)
        if (match["operator"] or "").endswith("+"):
            return _replaced(match["word"], values) if there else ""
        return found or ""

    return _VARIABLE.sub(value, text)
