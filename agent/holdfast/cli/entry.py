"""Run a command, and turn errors into lines and exit codes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

import click

from holdfast import __version__
from holdfast.cli import render
from holdfast.cli.command import Group
from holdfast.errors import HoldfastError

BUG = 70  # EX_SOFTWARE
USAGE = 64  # EX_USAGE; click's own 2 means "there are changes" here
INTERRUPTED = 130


ELSEWHERE = {  # commands of docker and podman → what to use here
    "images": "holdfast image list",
    "pull": "holdfast image pull",
    "push": "holdfast image push",
    "rmi": "holdfast image remove",
    "build": "images are built with the app that declares them in [images.NAME]: holdfast apply, or sync",
    "ps": "holdfast status",
    "login": "skopeo login --authfile FILE REGISTRY, see [images] authfile of agent.toml",
}


MODULES = {  # → its commands; it is imported when one of them is called
    "agent": "agent shutdown",
    "bundle": "bundle",
    "check": "check",
    "containers": "commit exec export inspect logs release restart start stats stop",
    "converge": "apply sync",
    "doctor": "doctor",
    "events": "events",
    "images": "image",
    "networks": "network",
    "plan": "plan",
    "plugins": "plugin",
    "program": "completion schema version",
    "status": "status",
    "system": "system",
    "volumes": "volume",
}
COMMANDS = {name: module for module, names in MODULES.items() for name in names.split()}


class Top(Group):
    """All commands; knows what docker's commands are called here."""

    imported = COMMANDS

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in ELSEWHERE and not ctx.resilient_parsing:
            raise click.UsageError(f"no such command '{args[0]}' ({ELSEWHERE[args[0]]})")
        return super().resolve_command(ctx, args)


@click.group(cls=Top, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="holdfast %(version)s", help="Print the version.")
def holdfast() -> None:
    """Keep this host in the state that was committed to git.

    Containers are named APP/NAME, or NAME alone where that is unique.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Called by the console script."""
    try:
        code = run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone; Python would report it again at exit, when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if arguments is None:
        leave(code)
    return code


def leave(code: int) -> None:
    """End the process at once if threads are left that Python would wait for, such as those of a plugin."""
    if any(not each.daemon and each is not threading.main_thread() for each in threading.enumerate()):
        sys.stderr.flush()
        os._exit(code)


def run(arguments: Sequence[str] | None) -> int:
    try:
        result = holdfast.main(arguments, prog_name="holdfast", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.ClickException as error:
        render.echo(f"holdfast: {usage_line(error)}", err=True)
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except HoldfastError as error:
        render.echo(f"holdfast: {error}", err=True)
        return error.exit_code
    except ExceptionGroup as group:
        return told(group)
    except BrokenPipeError:
        raise
    except Exception as error:
        return bug(error)
    return result if isinstance(result, int) else 0


def bug(error: Exception) -> int:
    """Print the traceback of an error that nobody expected."""
    from traceback import format_exception

    told = "".join(format_exception(error))
    render.echo(f"{told}holdfast: this is a bug; please report it with the lines above", err=True)
    return BUG


def usage_line(error: click.ClickException) -> str:
    """What click says about a wrong call, in our form: one line, lower case, and where to read on."""
    message = error.format_message().replace("\n", " ").rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return message[:1].lower() + message[1:] + (f" (see '{context.command_path} --help')" if context else "")


def told(group: ExceptionGroup[Exception]) -> int:
    """Print every deliberate error of a group, a line each; anything else in it is a bug."""
    expected, bugs = group.split(HoldfastError)
    if bugs is not None:
        return bug(group)
    code = 0
    for error in leaves(expected):
        render.echo(f"holdfast: {error}", err=True)
        code = code or error.exit_code
    return code


def leaves(group: ExceptionGroup[HoldfastError] | None) -> list[HoldfastError]:
    """The errors of a group and of the groups in it."""
    found: list[HoldfastError] = []
    for error in group.exceptions if group else ():
        found.extend(leaves(error) if isinstance(error, ExceptionGroup) else [error])
    return found
