"""doctor: what this host has and lacks, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from holdfast.cli import render
from holdfast.cli.command import command, json_option, reach, settings
from holdfast.errors import HoldfastError, UnfitHost

if TYPE_CHECKING:
    from holdfast.cli.checkup import Check

SHOWN = 3  # objects that are not ours, by name


@command("doctor")
@json_option()
def doctor(json_: bool) -> None:
    """Say what this host has and lacks, and what to do.

    Changes nothing.

    Exits 0 when nothing is bad, 69 otherwise.
    """
    from holdfast.cli.checkup import Check, checkup

    checks: list[Check] = []
    config = None
    try:
        config = settings()
        checks.append(Check("settings", "ok", f"name {config.name}, root {config.root}, run_root {config.run_root}"))
    except HoldfastError as error:
        checks.append(Check("settings", "bad", str(error), "correct agent.toml; what follows assumes its defaults"))
    checks.extend(checkup(config))
    checks.extend(node())
    if json_:
        render.as_json([asdict(check) for check in checks])
    else:
        rows = [[check.subject, render.state(check.verdict), check.detail] for check in checks]
        render.table(
            ["CHECK", "", "FOUND"], rows, notes=[[f"→ {check.remedy}"] if check.remedy else [] for check in checks]
        )
    bad = [check.subject for check in checks if check.verdict == "bad"]
    if bad:
        raise UnfitHost(f"doctor: this host can't run containers yet: {', '.join(bad)}")
    if not json_:
        render.echo("nothing is in the way")


def node() -> Iterator[Check]:
    """What the agent, or without one the node itself, knows."""
    from holdfast.cli.checkup import Check

    try:
        with reach() as answers:
            status = answers.status()
            found = [*plugins(answers.plugins()), *not_ours(status["foreign"]), state(status["source"])]
    except HoldfastError as error:
        found = [Check("plugins", "warn", str(error))]
    yield from found


def plugins(found: Sequence[Mapping[str, str]]) -> Iterator[Check]:
    """What is wrong with plugins, and what this node depends on and is not installed."""
    from holdfast.cli.checkup import Check

    wrong = [each for each in found if each["state"] != "ok"]
    for each in wrong:
        yield Check(f"plugin {each['name']}", "warn", f"{each['state']}: {each['error']}")
    if not wrong:
        yield Check("plugins", "ok", ", ".join(each["name"] for each in found))


def not_ours(foreign: Mapping[str, str]) -> Iterator[Check]:
    """What bears the agent's name and was made for another root, or by somebody else: in one line, however many."""
    from holdfast.cli.checkup import Check

    if foreign:
        shown = "; ".join(f"{subject}: {why}" for subject, why in list(foreign.items())[:SHOWN])
        more = f"; {len(foreign) - SHOWN} more in `holdfast status`" if len(foreign) > SHOWN else ""
        yield Check("not ours", "warn", shown + more, "remove it by hand if nobody needs it")


def state(found: Mapping[str, str]) -> Check:
    """Whether the state can be read."""
    from holdfast.cli.checkup import Check

    return (
        Check("state", "warn", found["error"])
        if found["error"]
        else Check("state", "ok", f"read from {found['url']}")
    )


COMMANDS = [doctor]
