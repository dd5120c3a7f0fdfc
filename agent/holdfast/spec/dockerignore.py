"""A .dockerignore → which paths of a build's context it leaves out, as Docker does (moby's patternmatcher).

Later lines win; `!` takes back; a pattern that fits a folder fits all that is in it; `*` and `?` stay within one step
of the path, `**` spans any number of them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from functools import lru_cache


class Ignore:
    """The patterns of one .dockerignore."""

    def __init__(self, text: str) -> None:
        """Raises ValueError, with the line, for a pattern that means nothing."""
        self.rules = [*_rules(text)]
        self._folders: dict[str, tuple[bool, ...]] = {"": (False,) * len(self.rules)}

    def leaves_out(self, path: str) -> bool:
        """Say whether a file is left out, by its path below the context."""
        out = False
        for (keeps, _), fits in zip(self.rules, self._fits(path), strict=True):
            out = not keeps if fits else out
        return out

    def _fits(self, path: str) -> tuple[bool, ...]:
        """Say for each rule whether it fits the path or a folder above it."""
        folder = posixpath.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = self._fits(folder)
        above = self._folders[folder]
        return tuple(
            inherited or pattern.fullmatch(path) is not None
            for inherited, (_, pattern) in zip(above, self.rules, strict=True)
        )


def _rules(text: str) -> Iterator[tuple[bool, re.Pattern[str]]]:
    """Read each line that is a pattern: (takes back?, pattern)."""
    for number, raw in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        line = raw.strip()
        if raw.startswith("#") or not line:
            continue
        keeps = line.startswith("!")
        pattern = line.removeprefix("!").strip()
        if not pattern:
            raise ValueError(f"line {number}: '{raw}' takes back nothing (expected a pattern behind '!')")
        cleaned = posixpath.normpath(pattern)
        stripped = cleaned.lstrip("/") if len(cleaned) > 1 else cleaned
        try:
            yield keeps, re.compile(_expression(stripped), re.DOTALL)
        except (re.error, ValueError):
            raise ValueError(f"line {number}: '{raw}' is not a pattern (expected a closed [ ])") from None


@lru_cache(maxsize=512)
def _expression(pattern: str) -> str:
    """Turn one pattern into a regular expression. Raises ValueError for a [ without ], and a lone \\ at the end."""

    def piece(match: re.Match[str]) -> str:
        match match.lastgroup, match[0]:
            case "steps", _:
                return ".*" if match.end() == len(pattern) else "(?:.*/)?"
            case "set", _:
                return _set(match["set"])
            case None, "[" | "\\":
                raise ValueError(pattern)
            case _, plain:
                return {"*": "[^/]*", "?": "[^/]"}.get(plain) or re.escape(match["escaped"] or plain)

    return _PIECE.sub(piece, pattern)


_PIECE = re.compile(r"(?P<steps>\*\*/?)|\\(?P<escaped>.)|\[(?P<set>.[^\]]*)\]|.", re.DOTALL)


def _set(inner: str) -> str:
    """Turn the set between [ and ] into that of a regular expression: single characters and ranges."""
    negated = inner.startswith("^")
    one = r"(?:\\.|.)"
    parts = re.findall(rf"({one})(?:-({one}))?", inner[negated:], re.DOTALL)
    found = ("-".join(re.escape(each.removeprefix("\\")) for each in ends if each) for ends in parts)
    return f"[{'^' * negated}{''.join(found)}]"
