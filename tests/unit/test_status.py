"""What the operator reads: one state per app and container, and whether the node is converged."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from holdfast.observed import (
    Exit,
    Failure,
    Finding,
    History,
    Hold,
    InstanceId,
    Limits,
    Observed,
    PublishedPort,
    Receipt,
    Subject,
)
from holdfast.plan import decide
from holdfast.plan.actions import (
    Change,
    Live,
    Plan,
    RemoveInstance,
    RemoveOrphan,
    StageGeneration,
    StartInstance,
    StopInstance,
    UpdateInstance,
)
from holdfast.spec.model import Problem, Resources, Spec
from holdfast.status import Status, make_status, plan_json
from paper import BACK, NOW, SHOP, SOURCE, app, container, ended, good, history, instance, spec


def status(
    *instances: Any, want: Spec | None = None, past: History | None = None, plan: Plan | None = None, **source: Any
) -> Status:
    return make_status(
        spec=want if want is not None else spec(SHOP),
        observed=Observed(at=NOW, instances=instances),
        history=past or history(good(SHOP)),
        plan=plan or Plan(),
        source={**SOURCE, **source},
        node="edge-1",
    )


def shop(**fields: Any) -> tuple[Any, Any]:
    """Both instances of the shop, web with other fields."""
    return instance(SHOP, "web", **fields), instance(SHOP, "api")


def start(name: str = "web", **fields: Any) -> StartInstance:
    return StartInstance(app="shop", container=name, generation=1, reason="it is not there", **fields)


def test_a_node_where_everything_runs_is_converged() -> None:
    found = status(*shop())
    assert found.converged
    assert found.blockers == ()
    assert found.apps["shop"].state == "converged"
    assert found.apps["shop"].generation == 1
    assert found.apps["shop"].containers["web"].state == "running"
    assert found.commit["author"] == "Ann"


def test_the_json_holds_what_the_api_promises() -> None:
    found = json.loads(json.dumps(status(*shop(addresses={"bridge": "10.209.0.2"})).json()))
    assert {"converged", "revision", "commit", "node", "problems", "source", "plugins", "apps"} <= found.keys()
    assert {"state", "generation", "reason", "revision", "containers"} <= found["apps"]["shop"].keys()
    run = found["apps"]["shop"]["containers"]["web"]["instances"][0]
    assert run["addresses"] == {"bridge": "10.209.0.2"}
    own = status(*shop(addresses={"shop/default": "10.209.0.3"})).apps["shop"].containers["web"].instances[0]
    assert own.addresses == {"shop/default": "10.209.0.3", "bridge": "10.209.0.3"}
    assert {
        "id",
        "pid",
        "state",
        "restarts",
        "exit_code",
        "signal",
        "oom",
        "started_at",
        "warnings",
        "faults",
    } <= run.keys()


def test_limits_and_published_ports_are_those_of_the_kernel_beside_what_is_asked() -> None:
    want = SHOP.model_copy(
        update={
            "containers": {"web": SHOP.containers["web"].model_copy(update={"resources": Resources(memory=1 << 30)})}
        }
    )
    web = instance(want, "web", addresses={"shop/default": "10.209.0.3"})
    other = PublishedPort("tcp", "", 9090, "10.209.0.4", 80)
    for held, port, expected in (
        (Limits(1 << 30, 2 << 30, None, 2048), PublishedPort("tcp", "", 8080, "10.209.0.3", 80), ["8080:80/tcp"]),
        (Limits(512 << 20), PublishedPort("tcp", "127.0.0.1", 8080, "10.209.0.3", 81), ["127.0.0.1:8080:81/tcp"]),
        (Limits(), other, []),
    ):
        seen = Observed(at=NOW, instances=(web,), published=(port, other), limits={web.id: held})
        found = make_status(spec=spec(want), observed=seen, history=history(good(want)), plan=Plan(), source=SOURCE)
        shown = json.loads(json.dumps(found.json()))["apps"]["shop"]["containers"]["web"]
        assert (shown["ports"], shown["published"]) == (["8080:80/tcp"], expected)
        limits = shown["instances"][0]["limits"]
        assert limits["asked"] == {"memory": 1 << 30, "memory_swap": None, "cpus": None, "pids": 2048}
        assert limits["observed"] == asdict(held)


def test_what_does_not_run_has_no_limits_and_what_nobody_says_of_ports_is_not_made_up() -> None:
    web = instance(SHOP, "web", **ended(0))
    seen = Observed(at=NOW, instances=(web,), limits={web.id: Limits(1)})
    found = make_status(spec=spec(SHOP), observed=seen, history=history(good(SHOP)), plan=Plan(), source=SOURCE)
    shown = found.apps["shop"].containers["web"]
    assert (shown.published, shown.instances[0].limits.observed) == (None, None)


def test_an_unreachable_source_is_shown_and_leaves_the_node_converged() -> None:
    found = status(*shop(), error="fetch '/srv/state.git': no such repository", next_try_at=NOW + 30)
    assert found.converged
    assert found.source["error"].startswith("fetch")


TAKEN = Finding("network shop/front", "a route", "remove it", breaks=True)


def test_what_others_did_to_the_host_is_a_blocker_where_it_breaks_something() -> None:
    for finding, blockers in (
        (TAKEN, ("network shop/front: a route (remove it)",)),
        (replace(TAKEN, breaks=False), ()),
    ):
        seen = Observed(at=NOW, instances=shop(), findings=(finding,))
        found = make_status(spec=spec(SHOP), observed=seen, history=history(good(SHOP)), plan=Plan(), source=SOURCE)
        assert (found.converged, found.blockers) == (not blockers, blockers)
        assert found.json()["findings"][0]["text"] == "a route"


def test_a_node_that_never_read_a_revision_is_not_converged_and_says_why() -> None:
    found = make_status(
        spec=None, observed=Observed(), history=History(), plan=Plan(), source={"error": "remote is down"}
    )
    assert not found.converged
    assert "remote is down" in found.blockers[0]


def test_a_planned_start_makes_an_app_change_and_its_container_start() -> None:
    found = status(instance(SHOP, "api"), plan=Plan(actions=(start(),)))
    assert found.apps["shop"].state == "changing"
    assert found.apps["shop"].containers["web"].state == "starting"
    assert not found.converged


@pytest.mark.parametrize("subject", ["shop/web", "shop", "volume shop/data", "firewall"])
def test_a_node_whose_action_is_still_under_way_is_not_converged(subject: str) -> None:
    for busy in (frozenset({Subject.parse(subject)}), frozenset[Subject]()):
        seen = Observed(at=NOW, instances=shop(), busy=busy)
        found = make_status(spec=spec(SHOP), observed=seen, history=history(good(SHOP)), plan=Plan(), source=SOURCE)
        assert found.converged == (not busy), found.blockers


def test_a_container_in_back_off_degrades_its_app_and_says_when_it_is_tried_again() -> None:
    web, api = shop(**ended(1), streak=4)
    web = replace(web, started_at=NOW - 2)
    found = status(web, api, plan=Plan(waiting={Subject.parse("shop/web"): "back-off: it exited with 1"}))
    shown = found.apps["shop"].containers["web"]
    assert (found.apps["shop"].state, shown.state) == ("degraded", "restarting")
    assert "exited with 1" in shown.reason
    assert shown.next_at is not None and shown.next_at > NOW - 1
    assert shown.instances[0].exit_code == 1


def test_a_container_that_gave_up_is_failed() -> None:
    policy = SHOP.containers["web"].restart_policy.model_copy(update={"max_attempts": 3})
    want = SHOP.model_copy(
        update={"containers": {"web": SHOP.containers["web"].model_copy(update={"restart_policy": policy})}}
    )
    crashed = instance(want, "web", **ended(137, signal=9, oom=True), streak=3)
    crashed = replace(crashed, started_at=NOW - 2)
    found = status(crashed, want=spec(want), past=history(good(want)))
    shown = found.apps["shop"].containers["web"]
    assert shown.state == "failed"
    assert "gave up after 3" in shown.reason
    assert shown.instances[0].oom


@pytest.mark.parametrize(
    ("code", "state", "converged"), [(0, "completed", True), (1, "exited", False), (143, "exited", False)]
)
def test_a_job_that_ended_well_is_completed_and_one_that_failed_degrades(
    code: int, state: str, converged: bool
) -> None:
    job = app("job", run=container())
    found = status(instance(job, "run", **ended(code)), want=spec(job), past=history(good(job)))
    assert found.apps["job"].containers["run"].state == state
    assert found.converged is converged


def test_a_container_stopped_by_hand_is_held_against_the_commit() -> None:
    past = history(good(SHOP), holds={"shop/web": Hold("stopped", NOW, "ann")})
    found = status(*shop(**ended(0)), past=past, plan=Plan(drift={"shop/web": "stopped by ann"}))
    assert found.apps["shop"].state == "held"
    assert found.apps["shop"].containers["web"].reason == "stopped by ann"
    assert not found.converged


def test_a_container_that_waits_for_another_app_names_it() -> None:
    found = status(instance(SHOP, "api"), plan=Plan(waiting={Subject.parse("shop/web"): "waits for app databases"}))
    assert found.apps["shop"].state == "waiting"
    assert found.apps["shop"].containers["web"].state == "waiting"
    assert "databases" in found.apps["shop"].containers["web"].reason


def test_an_app_that_cannot_be_staged_is_failed_while_its_containers_run_on() -> None:
    failure = Failure("d", "image 'shop/web:9': not in the store", 1, NOW, None)
    past = history(good(SHOP), failures={Subject.parse("shop"): failure})
    found = status(
        *shop(), past=past, plan=Plan(waiting={Subject.parse("shop"): f"{failure.error} (waits for a change)"})
    )
    assert found.apps["shop"].state == "failed"
    assert "not in the store" in found.apps["shop"].reason
    assert found.apps["shop"].containers["web"].state == "running"


def test_a_failure_that_was_overcome_is_not_shown() -> None:
    past = history(good(SHOP), failures={Subject.parse("shop"): Failure("d", "image missing", 1, NOW, None)})
    assert status(*shop(), past=past).apps["shop"].state == "converged"


def test_an_app_that_is_staged_again_stays_failed_and_its_containers_wait() -> None:
    stage = StageGeneration(app="shop", spec=SHOP, reason="the app is new")
    past = History(failures={Subject.parse("shop"): Failure(stage.tried, "image missing", 2, NOW, NOW - 1)})
    shown = status(past=past, plan=Plan(actions=(stage,))).apps["shop"]
    assert (shown.state, shown.reason) == ("failed", "image missing")
    assert shown.containers["web"].state == "waiting"


def test_a_start_that_failed_is_tried_again_or_given_up() -> None:
    def with_retry(at: float | None) -> str:
        past = history(good(SHOP), failures={Subject.parse("shop/web"): Failure("d", "port 80 is taken", 2, NOW, at)})
        plan = Plan(waiting={Subject.parse("shop/web"): "port 80 is taken (tried 2 times)"})
        return status(instance(SHOP, "api"), past=past, plan=plan).apps["shop"].containers["web"].state

    assert with_retry(NOW + 5) == "restarting"
    assert with_retry(None) == "failed"


def test_a_file_that_does_not_load_keeps_its_app_and_unsets_converged() -> None:
    problem = Problem("shop.toml", 3, "unknown key", key="containers.web.imge")
    want = Spec(broken={"shop.toml": "shop"}, problems=(problem,))
    found = status(*shop(), want=want)
    assert found.apps["shop"].state == "invalid"
    assert found.apps["shop"].containers["web"].state == "running"
    assert not found.converged
    assert found.problems == (str(problem),)


def test_an_app_that_left_the_revision_is_removing_until_nothing_of_it_is_left() -> None:
    found = status(*shop(), want=Spec())
    assert found.apps["shop"].state == "removing"
    assert status(want=Spec(), past=History()).converged


def test_what_is_missing_on_the_host_degrades_an_app() -> None:
    found = status(*shop(faults=("its veth is gone",)))
    assert found.apps["shop"].state == "degraded"
    assert "veth" in found.apps["shop"].reason


def test_an_orphan_to_remove_unsets_converged() -> None:
    orphan = Receipt("netns", "", "x")
    found = status(*shop(), plan=Plan(actions=(RemoveOrphan(app="", receipt=orphan, reason="belongs to nothing"),)))
    assert not found.converged
    assert "belongs to nothing" in found.blockers[0]


@pytest.mark.parametrize(
    ("subject", "owner"),
    [
        ("shop", "shop"),
        ("shop/web", "shop"),
        ("network shop/front", "shop"),
        ("volume shop/data", "shop"),
        ("network bridge", ""),
        ("firewall", ""),
        ("netns x/y", ""),
        ("endpoint x/shop/front", ""),
        ("volume driver 'nfs'", ""),
    ],
)
def test_a_subject_belongs_to_its_app_or_to_the_node(subject: str, owner: str) -> None:
    assert Subject.parse(subject).app == owner
    assert Subject.parse(subject) == subject


def test_a_preview_of_nothing_is_empty() -> None:
    assert plan_json((Plan(),)) == {
        "empty": True,
        "rounds": 0,
        "apps": {},
        "waiting": {},
        "drift": {},
        "problems": [],
        "foreign": {},
        "findings": [],
        "hints": [],
        "images": {},
    }


def test_a_preview_says_what_others_did_to_the_host() -> None:
    found = plan_json((Plan(),), findings=(TAKEN,))["findings"]
    assert found == [
        {"subject": "network shop/front", "text": "a route", "remedy": "remove it", "breaks": True},
    ]


def test_stop_remove_and_start_of_a_container_are_one_step_named_replace() -> None:
    why = "image app:1 → app:2; restarts shop/web"
    old = InstanceId("old")
    rounds = (
        Plan(actions=(StageGeneration(app="shop", spec=SHOP, reason="changed"),)),
        Plan(actions=(StopInstance(app="shop", container="web", instance=old, signal="TERM", grace=1, reason=why),)),
        Plan(actions=(RemoveInstance(app="shop", container="web", instance=old, reason="it ended"),)),
        Plan(actions=(start(),), waiting={Subject.parse("shop/api"): "waits for web"}),
        Plan(waiting={Subject.parse("shop/api"): "waits for a person"}),
    )
    found = plan_json(rounds)
    assert [(step["verb"], step["object"]) for step in found["apps"]["shop"]] == [("stage", ""), ("replace", "web")]
    assert found["apps"]["shop"][1]["reason"] == why
    assert found["waiting"] == {"shop/api": "waits for a person"}
    assert not found["empty"]


def test_a_live_change_shows_its_fields() -> None:
    change = Change("memory", "64MiB", "128MiB", Live())
    update = UpdateInstance(
        app="shop", container="web", instance=InstanceId("x"), generation=2, changes=(change,), reason="memory"
    )
    [step] = plan_json((Plan(actions=(update,)), Plan()))["apps"]["shop"]
    assert step["changes"] == ("memory 64MiB → 128MiB (applied live)",)


def test_an_exit_that_nobody_saw_has_no_code() -> None:
    found = status(*shop(phase="lost", pid=None, exit=Exit(None)))
    assert found.apps["shop"].containers["web"].instances[0].exit_code is None


def test_apps_with_equal_container_names_are_told_apart() -> None:
    found = status(*shop(), instance(BACK, "web"), want=spec(SHOP, BACK), past=history(good(SHOP), good(BACK)))
    assert found.apps["back"].containers["db"].state == "missing"
    assert len(found.apps["shop"].containers["web"].instances) == 1


def test_a_container_that_waits_after_a_reboot_says_for_what_as_the_plan_does() -> None:
    web, api = shop(phase="lost", pid=None)
    found = status(web, api, plan=Plan(waiting={Subject.parse("shop/web"): "waits for network shop/front"}))
    shown = found.apps["shop"].containers["web"]
    assert (shown.state, shown.reason) == ("waiting", "waits for network shop/front")


def test_a_start_that_is_under_way_is_not_called_interrupted() -> None:
    begun = Observed(instances=shop(phase="creating", pid=None), busy=frozenset({Subject.parse("shop/web")}))
    plan = decide(spec(SHOP), begun, history(good(SHOP)), NOW)
    assert not [action for action in plan.actions if action.subject == "shop/web"]
