"""Which of a registry's tags is the newest version of the one that is written."""

from __future__ import annotations

import pytest

from holdfast.images.formats.versions import newest, parse_version


@pytest.mark.parametrize(
    ("tag", "pattern", "tags", "expected"),
    [
        ("1.27.3", "*", ["1.27.4", "1.28.0", "1.9.9", "latest"], "1.28.0"),
        ("1.27.3", "1.27.*", ["1.27.4", "1.28.0", "1.27.10"], "1.27.10"),
        ("1.27.3", "*", ["1.27.2", "1.26.9"], "1.27.3"),
        ("1.27.3", "*", ["2", "2.1"], "1.27.3"),  # less precise: they float
        ("1.27", "*", ["1.28", "1.28.1", "2"], "1.28"),
        ("1.27.3", "*", ["v1.28.0"], "1.27.3"),
        ("v1.9", "v1.*", ["v1.10", "v2.0"], "v1.10"),
        ("3.20.1-alpine", "*", ["3.21.0", "3.20.2-alpine", "3.22.0-slim"], "3.20.2-alpine"),
        ("1.0.0", "*", ["1.1.0-rc.1", "1.1.0-beta"], "1.0.0"),
        ("1.1.0-rc.1", "*", ["1.1.0-rc.2", "1.1.0-rc.10", "1.1.0-beta.9"], "1.1.0-rc.10"),
        ("1.1.0-rc.1", "*", ["1.1.0-rc.2", "1.1.0"], "1.1.0"),
        ("1.0.0-rc1-alpine", "*", ["1.0.0-alpine", "1.0.0"], "1.0.0-alpine"),
        ("latest", "*", ["1.0.0"], "latest"),
        ("12", "*", ["13", "2024f3ab"], "13"),
    ],
)
def test_the_newest_version_is_of_the_same_kind_as_the_one_that_is_written(
    tag: str, pattern: str, tags: list[str], expected: str
) -> None:
    assert newest(tag, tags, pattern) == expected
    assert newest(tag, reversed(tags), pattern) == expected


@pytest.mark.parametrize("tag", ["latest", "stable-2", "2024f3ab", "x1.2", ""])
def test_what_is_no_version_is_none(tag: str) -> None:
    assert parse_version(tag) is None
