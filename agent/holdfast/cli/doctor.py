"""doctor: check this host and suggest fixes."""

from __future__ import annotations

from holdfast.cli import options, render
from holdfast.cli.command import command, settings
from holdfast.errors import HoldfastError, UnfitHost


@command("doctor")
@options.as_json
def doctor(json_: bool) -> None:
    """Check this host and suggest fixes. Changes nothing.

    Exits 0 if nothing is bad, 69 otherwise.
    """
    from dataclasses import asdict

    from holdfast.cli.checkup import Check, checkup
    from holdfast.config import Config

    config = Config()
    try:
        config = settings()
        first = Check("settings", "ok", f"name {config.name}, root {config.root}, run_root {config.run_root}")
    except HoldfastError as error:
        first = Check("settings", "bad", str(error), "correct agent.toml; the checks below assume its defaults")
    checks = [asdict(each) for each in (first, *checkup(config))]
    render.listing(checks, COLUMNS, json=json_, notes=lambda each: [f"→ {each['remedy']}"] if each["remedy"] else [])
    bad = [each["subject"] for each in checks if each["verdict"] == "bad"]
    if bad:
        raise UnfitHost(f"doctor: this host can't run containers yet: {', '.join(bad)}")
    if not json_:
        render.echo("nothing is in the way")


COLUMNS = {
    "CHECK": lambda each: each["subject"],
    "": lambda each: render.state(each["verdict"]),
    "FOUND": lambda each: each["detail"],
}
