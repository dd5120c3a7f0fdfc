"""Sizes, durations and plain numbers."""

from __future__ import annotations

import re

LARGEST = 2**63 - 1  # what 64 bits hold, which is what TOML promises and SQLite stores
LONGEST_DURATION = 3650 * 86400.0  # seconds: clocks and system calls can count them
NO_DURATION = "is not a duration (expected a number and a unit, ms, s, m, h or d, as in '1m30s')"
LONGEST_NUMBER = 15  # digits: whatever its unit, it stays within 64 bits
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {
    "": 1,
    "b": 1,
    **{unit: 1024**power for power, letter in enumerate("kmgt", 1) for unit in (letter, f"{letter}ib")},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
}


def number(text: str) -> bool:
    """Say whether a text is a decimal number of at most 15 digits."""
    return text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER


def size(text: str) -> int:
    """Read a size in bytes: `64MiB` (and `64m`, as in Docker) is 1024-based, `64MB` 1000-based; a number is bytes."""
    match = _SIZE.fullmatch(text.strip())
    factor = _BYTES.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"'{text}' is not a size (expected a number and one of KiB, MiB, GiB, KB, MB, GB, k, m, g)")
    if len(match[1]) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(match[1])} digits is not a size (expected at most {LONGEST_NUMBER})")
    found = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if found > LARGEST:
        raise ValueError(f"'{text}' is too large for a size (expected less than 8388608TiB)")
    return found


def size_text(number: int) -> str:
    """Write a size in the largest unit that gives a whole number: 64MiB."""
    powers = (power for power in (4, 3, 2, 1) if number and number % 1024**power == 0)
    power = next(powers, 0)
    return f"{number // 1024**power}{'KMGT'[power - 1]}iB" if power else f"{number} bytes"


def about(count: float) -> str:
    """Write a number of bytes in three digits: 512B, 1.5KiB, 10MiB."""
    if count < 1024:
        return f"{count:.0f}B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 999.5:  # what rounds to 1,000 would be printed as 1e+03
            return f"{count:.3g}{unit}"
    return f"{count / 1024:.3g}TiB" if count < 999.5 * 1024 else f"{count / 1024:.0f}TiB"


def duration(text: str) -> float:
    """Read a duration in seconds: `1m30s`, `100ms`, `0`."""
    if text == "0":
        return 0.0
    if not text or len(text) > 2 * LONGEST_NUMBER or _DURATION.sub("", text):
        raise ValueError(f"'{text}' {NO_DURATION}")
    seconds = round(sum(float(number) * SECONDS[unit] for number, unit in _DURATION.findall(text)), 9)
    if seconds > LONGEST_DURATION:
        raise ValueError(f"'{text}' is longer than anything is waited for here (expected at most 3650d)")
    return seconds
