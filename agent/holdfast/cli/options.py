"""Options that several commands take, each declared once."""

from __future__ import annotations

from pathlib import Path

import click

from holdfast.cli import render
from holdfast.cli.since import DURATION
from holdfast.cli.targets import complete_target

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
TIMEOUT = 300.0  # seconds

as_json = click.option("--json", "json_", is_flag=True, help="Print JSON.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
force = click.option("-f", "--force", is_flag=True, help="Do not ask for confirmation.")
output = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write.  [default: standard output]",
)
changes = click.option(
    "-c",
    "--change",
    "changes",
    multiple=True,
    metavar="'CMD [\"sh\"]'",
    help="Set CMD, ENV, USER and the like; can be repeated.",
)
pause = click.option(
    "--pause/--no-pause", default=True, show_default=True, help="Whether to freeze the processes meanwhile."
)
timeout = click.option(
    "--timeout",
    type=DURATION,
    default=TIMEOUT,
    show_default="5m",
    help="How long to wait at most. Pulling and building images does not count.",
)
connect_timeout = click.option(
    "--connect-timeout",
    type=DURATION,
    default=None,
    help="How long to wait for a registry that does not answer.  [default: connect_timeout of agent.toml, 60s]",
)
target = click.argument("target", metavar="APP/NAME", shell_complete=complete_target)


def agreed(question: str) -> bool:
    """Ask a person; print what a no means."""
    if click.confirm(render.plain(question)):
        return True
    render.echo("nothing is removed")
    return False
