"""events: what happened, when and why."""

from __future__ import annotations

from contextlib import nullcontext

import click

from holdfast.cli import render
from holdfast.cli.command import client, command, reach
from holdfast.cli.since import MOMENT
from holdfast.questions import Json


@command("events")
@click.option("-f", "--follow", is_flag=True, help="Go on as things happen.")
@click.option(
    "-n", "--tail", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="How many."
)
@click.option("--since", type=MOMENT, help="Only what happened since then.")
@click.option("--json", "json_", is_flag=True, help="Print each event as one line of JSON.")
def events(follow: bool, tail: int, since: float | None, json_: bool) -> None:
    """Show what the agent did and found, and why."""
    with nullcontext(client()) if follow else reach() as node:
        for event in node.events(limit=tail, follow=follow):
            if event is None or (since is not None and event["at"] < since):
                continue
            render.echo(render.json_text(event) if json_ else line(event))
            for said in () if json_ else event.get("output", ()):
                render.note(str(said), indent=4)


def line(event: Json) -> str:
    """One event as a person reads it: when, what kind, about what, in words."""
    kind = str(event["kind"])
    colour = render.BAD if "fail" in kind or event.get("ok") is False else None
    when = render.paint(render.clock(event["at"]), render.QUIET)
    parts = (when, render.paint(f"{kind:<9}", colour), str(event["subject"]), str(event["message"]))
    return "  ".join(filter(None, parts))
