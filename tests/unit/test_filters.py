"""Compiled seccomp filters are handed to crun again, and only for the very profile that they were compiled from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from holdfast.runtime.seccomp import ANNOTATION, Filters

CONFIG: dict[str, Any] = {"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}}}


def learned(state: Path) -> Filters:
    (state / "seccomp.bpf").write_bytes(b"filter")
    filters = Filters()
    filters.learn(CONFIG, state)
    return filters


def test_the_same_profile_gets_the_filter_that_was_compiled_of_it(tmp_path: Path) -> None:
    config = {**CONFIG, "annotations": {"a": "b"}}
    learned(tmp_path).annotate(config)
    assert config["annotations"] == {"a": "b", ANNOTATION: "ZmlsdGVy"}


def test_another_profile_or_none_gets_no_filter(tmp_path: Path) -> None:
    filters = learned(tmp_path)
    others: list[dict[str, Any]] = [{"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}}, {"linux": {}}, {}]
    for other in others:
        config = dict(other)
        filters.annotate(config)
        assert config == other


def test_a_runtime_that_leaves_no_filter_teaches_none(tmp_path: Path) -> None:
    filters, config = Filters(), dict(CONFIG)
    filters.learn(CONFIG, tmp_path)
    filters.annotate(config)
    assert config == CONFIG


def test_a_config_is_written_whole_whatever_was_written_before_it() -> None:
    filters = Filters()
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}
    for name in ("a", "b"):
        for filter in (profile, {"defaultAction": "SCMP_ACT_ALLOW"}, None):
            linux = {"cgroupsPath": name, **({"seccomp": filter} if filter else {})}
            config = {"hostname": name, "linux": linux, "annotations": {"x": '"seccomp"'}}
            assert json.loads(filters.dumps(config)) == config
