"""doctor: what this host has and lacks, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict

import click

from holdfast.cli import render
from holdfast.cli.command import command, json_option, settings
from holdfast.errors import HoldfastError, UnfitHost


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
        click.echo("nothing is in the way")


COMMANDS = [doctor]
