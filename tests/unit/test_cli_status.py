"""`holdfast status` and `holdfast plan` as a person reads them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli import main, render
from holdfast.cli.render import ago, pairs, size, span
from holdfast.cli.status import app_reason, limits, ports, show_apps, show_status
from holdfast.observed import container_of
from holdfast.plan.actions import Plan, StartInstance
from paper import LIMITS, PaperAgent, Run


def test_status_is_a_table_with_a_headline(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    assert run("status") == 0
    head, _, columns, *rows = said().splitlines()
    assert head.startswith("edge-1: converged  c0ffee1234  Add the shop  (Ann, ")
    assert columns.split() == ["NAME", "STATE", "GEN", "SINCE", "ADDRESS", "PORTS", "IMAGE"]
    assert [row.split()[:3] for row in rows if row.startswith("shop")] == [["shop", "converged", "3"]]
    assert any(
        row.split() == ["web", "running", "1", "1m", "10.209.0.2", "8080:80", "shop/web:1.27", "(1)"] for row in rows
    )


def test_status_tells_what_is_on_its_way_and_what_is_newer(agent: PaperAgent, said: Callable[[], str]) -> None:
    status = agent.status()
    web = status["apps"]["shop"]["containers"]["web"]
    web["newer"] = f"app:2@sha256:{'c' * 64}"
    layers = [
        {"digest": "sha256:a", "state": "done", "done": 1 << 20, "total": 1 << 20},
        {"digest": "sha256:b", "state": "pulling", "done": 1 << 20, "total": 3 << 20},
        {"digest": "sha256:c", "state": "here", "done": 0, "total": 9 << 20},
    ]
    coming = {"ref": "app:3", "state": "pulling", "done": 2 << 20, "total": 4 << 20, "layers": layers}
    building = {"image": "images.shop/web", "step": "STEP 2/3: RUN make", "began": time.time(), "error": ""}
    broken = {"image": "images.shop/db", "step": "", "began": time.time(), "error": "build 'images.shop/db': exit 1"}
    show_status(
        {**status, "transfers": [coming, {"ref": "db:1", "state": "resolving"}], "builds": [building, broken]}
    )
    told = said()
    assert "images.shop/web: being built for" in told and "STEP 2/3: RUN make" in told
    assert "failed builds\n  build 'images.shop/db': exit 1" in told
    assert "newer image: app:2 (cccccccccccc)" in told
    assert "app:3: 2MiB of 4MiB, 1 of 2 layers" in told
    assert "db:1: the registry is asked" in told


def test_status_says_once_what_a_container_lacks(agent: PaperAgent, said: Callable[[], str]) -> None:
    status = agent.status()
    web = status["apps"]["shop"]["containers"]["web"]
    web["reason"] = "its link was removed"
    (run,) = web["instances"]
    web["instances"] = [{**run, "faults": ["its link was removed"], "warnings": ["no limit"]}]
    show_status(status)
    assert [line.strip() for line in said().splitlines() if line.startswith("    ")] == [
        "its link was removed",
        "warning: no limit",
    ]


def test_status_json_is_what_the_agent_says(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    assert run("status", "--json") == 0
    assert json.loads(said()) == json.loads(json.dumps(agent.status()))


def test_plan_exits_with_2_when_there_are_changes(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    assert run("plan") == 0
    assert said() == "nothing to do\n"
    start = StartInstance(app="shop", container="web", generation=1, reason="it is not there")
    agent.plan_now = (Plan(actions=(start,)), Plan(waiting={container_of("shop", "api"): "waits for web"}))
    assert run("plan") == 2
    assert said().splitlines() == [
        "shop",
        "  + start web  it is not there",
        "waiting",
        "  shop/api: waits for web",
        "",
        "1 change",
    ]


def test_plan_shows_what_is_wrong_with_the_state_files_and_exits_with_1(
    agent: PaperAgent, run: Run, said: Callable[[], str]
) -> None:
    agent.problems = ("shop.toml:3: containers.web.port: unknown key 'port' (did you mean 'ports'?)",)
    assert run("plan") == 1
    assert said().splitlines() == ["state files", f"  {agent.problems[0]}", "nothing to do"]


def test_plan_shows_hints_which_are_no_problem(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    agent.hints = (".shop.toml: a hidden TOML file: it is not read (expected NAME.toml)",)
    assert run("plan") == 0
    assert ".shop.toml: a hidden TOML file" in said()


def test_plan_exits_with_1_on_any_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("run_root = 7\n")
    assert main(["plan", "--config", str(broken)]) == 1
    assert capsys.readouterr().err.startswith("holdfast: ")


def test_times_and_sizes_read_as_people_say_them() -> None:
    assert [ago(100, at) for at in (100, 142, 280, 7300, 100 + 86400 * 12)] == [
        "now",
        "42s ago",
        "3m ago",
        "2h ago",
        "12d ago",
    ]
    assert ago(130, 100) == "in 30s"
    assert ago(None) == ""
    assert [size(number) for number in (0, 512, 1536, 10 << 20, 3 << 40)] == ["0B", "512B", "1.5KiB", "10MiB", "3TiB"]
    assert span(59.9) == "59s"
    assert list(pairs({"a": {"b": [1, 2]}, "none": None, "c": [{"d": True}]})) == [
        "a:",
        "  b: 1, 2",
        "c:",
        "  - d: yes",
    ]


def test_a_reason_that_a_container_tells_is_not_told_by_its_app_as_well() -> None:
    containers = {"web": {"reason": "waits until shop/db has started"}, "db": {"reason": ""}}
    waiting = {"state": "waiting", "reason": "shop/web: waits until shop/db has started", "containers": containers}
    assert app_reason("shop", waiting) == ""
    assert app_reason("shop", {**waiting, "state": "failed", "reason": "shop/web: exec 'x': not found"})


def test_a_reason_that_an_app_tells_is_not_told_by_its_containers_as_well(said: Callable[[], str]) -> None:
    container: dict[str, Any] = {
        "state": "waiting",
        "reason": "no such image (tried once)",
        "next_at": None,
        "instances": [],
        "ports": [],
        "published": [],
        "image": "app:1",
        "digest": "",
        "newer": "",
    }
    app = {"state": "failed", "reason": "no such image", "generation": None, "containers": {"web": container}}
    show_apps({"at": 0.0, "apps": {"shop": app}})
    assert said().count("no such image") == 1


@pytest.mark.parametrize(
    ("asked", "published", "state", "shown"),
    [
        (["8080:80/tcp", "53:53/udp"], ["8080:80/tcp", "53:53/udp"], "running", "8080:80 53:53/udp"),
        (["8080:80/tcp", "53:53/udp"], ["53:53/udp"], "running", "53:53/udp (asked 8080:80)"),
        (["8080:80/tcp"], [], "running", "none (asked 8080:80)"),
        (["8080:80/tcp"], ["8080:81/tcp"], "running", "8080:81 (asked 8080:80)"),
        (["8080:80/tcp"], [], "failed", ""),
        (["8080:80/tcp"], None, "running", "8080:80"),
    ],
)
def test_ports_are_shown_as_the_kernel_publishes_them_beside_what_is_missing(
    asked: list[str], published: list[str] | None, state: str, shown: str
) -> None:
    assert ports({"ports": asked, "published": published, "state": state}) == shown


@pytest.mark.parametrize(
    ("asked", "observed", "shown"),
    [
        ({"memory": 1 << 30}, {"memory": 1 << 30, "memory_swap": 2 << 30}, "1GiB"),
        ({"memory": 1 << 30, "cpus": 0.5}, {"memory": 512 << 20, "cpus": 0.5}, "512MiB (asked 1GiB), 0.5 CPUs"),
        ({"memory": 1 << 30}, {}, "no memory limit (asked 1GiB)"),
        ({}, {"cpus": 0.25}, "0.25 CPUs (asked no CPU limit)"),
        ({}, {"pids": 10}, "10 processes (asked 2048 processes)"),
        ({"memory": 1000}, {"memory": 1000, "memory_swap": 4000}, "1000B"),
        ({}, {}, ""),
        ({"memory": 1 << 30}, None, ""),
    ],
)
def test_limits_are_shown_as_the_kernel_has_them_beside_what_was_asked_where_that_differs(
    asked: dict[str, Any], observed: dict[str, Any] | None, shown: str
) -> None:
    whole = {"asked": {**LIMITS, **asked}, "observed": None if observed is None else {**LIMITS, **observed}}
    assert limits({"limits": whole}) == shown


def test_sizes_are_never_printed_with_an_exponent() -> None:
    for power in range(1, 52):
        for count in ((1 << power) - 1, 1 << power, 999 << (power // 10 * 10), 1023 << (power // 10 * 10)):
            assert "e" not in size(count).removesuffix("iB"), count


def test_a_table_that_is_too_wide_is_folded_between_words_and_then_between_columns(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    head = ["NAME", "PORTS", "IMAGE"]
    rows = [["shop/web", "8080:80 127.0.0.1:9090:9090", "registry.example:5000/shop/web:1.27 (0123456789ab)"]]
    for columns in (40, 60, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        render.table(head, rows)
        lines = said().splitlines()
        assert max(map(len, lines)) <= columns
        words = " ".join(lines).split()
        assert {"8080:80", "127.0.0.1:9090:9090", "registry.example:5000/shop/web:1.27"} <= set(words)
