"""Compare tags that are versions, to find the newest of many. Pure.

A tag is read as `[v]NUMBERS[-PRERELEASE][FLAVOUR]`: `1.27.3`, `v2.0.0-rc.1`, `3.20-alpine`. Order is that of Semantic
Versioning 2.0.0, section 11, with any number of numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

_TAG = re.compile(
    r"(v?)(\d+(?:\.\d+){0,3})(?:-((?:alpha|beta|a|b|dev|pre|preview|rc|m)(?:[.-]?\d+)*)(?![a-z]))?(.*)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Version:
    """A tag, taken apart. prerelease: () for a release, which is newer than any of its prereleases."""

    prefix: str
    numbers: tuple[int, ...]
    prerelease: tuple[str | int, ...]
    flavour: str

    @property
    def order(self) -> tuple[object, ...]:
        """Sorts versions of one flavour."""
        parts = tuple((0, each, "") if isinstance(each, int) else (1, 0, each) for each in self.prerelease)
        return (self.numbers, not self.prerelease, parts)

    def comparable(self, other: Version) -> bool:
        """Check whether the other has as many numbers and the same flavour: `1.28` and `1.27.3` do not compare."""
        return (self.prefix, len(self.numbers), self.flavour) == (other.prefix, len(other.numbers), other.flavour)


def parse_version(tag: str) -> Version | None:
    """Read the version that a tag names; None for one that names none, as `latest`."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return None
    prefix, numbers, prerelease, flavour = match.groups()
    if flavour and flavour[0] not in "-_+.":  # a commit's hash, a date run together with words
        return None
    parts = re.findall(r"\d+|[a-z]+", prerelease or "")
    return Version(
        prefix,
        tuple(int(number) for number in numbers.split(".")),
        tuple(int(part) if part.isdigit() else part for part in parts),
        flavour,
    )


def newest(tag: str, tags: Iterable[str], pattern: str = "*") -> str:
    """Find the newest of tags that matches pattern (a glob) and is a version above tag; tag itself if none is.

    A release is never followed by a prerelease.
    """
    best_tag, best = tag, parse_version(tag)
    if best is None:
        return tag
    written = best
    for candidate in tags:
        version = parse_version(candidate)
        if version is None or not fnmatchcase(candidate, pattern) or not version.comparable(written):
            continue
        if version.prerelease and not written.prerelease:
            continue
        if version.order > best.order:
            best_tag, best = candidate, version
    return best_tag
