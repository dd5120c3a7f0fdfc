"""From the process to a command and back to an exit code: the one place where errors become lines."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Sequence

import click

from holdfast.cli import (
    agent,
    bundle,
    check,
    containers,
    doctor,
    events,
    images,
    networks,
    outdated,
    render,
    state,
    system,
    volumes,
)
from holdfast.cli.command import Group
from holdfast.errors import HoldfastError

BUG = 70  # EX_SOFTWARE
USAGE = 64  # EX_USAGE; click's own 2 means "there are changes" here
INTERRUPTED = 130


ELSEWHERE = {  # words of docker and podman, and what to write here
    "images": "holdfast image list",
    "pull": "holdfast image pull",
    "push": "holdfast image push",
    "rmi": "holdfast image remove",
    "build": "an image is built with the app that declares it in [images.NAME]: holdfast apply, or sync",
    "ps": "holdfast status",
    "login": "skopeo login --authfile FILE REGISTRY, see [images] authfile of agent.toml",
}


class Top(Group):
    """All commands; knows where those are that docker has here."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in ELSEWHERE and not ctx.resilient_parsing:
            raise click.UsageError(f"no such command '{args[0]}' ({ELSEWHERE[args[0]]})")
        return super().resolve_command(ctx, args)


@click.group(cls=Top, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="holdfast", message="holdfast %(version)s", help="Print the version.")
def holdfast() -> None:
    """Hold this host fast to what was committed.

    Containers are addressed as APP/NAME, or as NAME where that is unique.
    """


for module in (check, state, containers, events, images, bundle, volumes, networks, system, doctor, agent):
    for command in module.COMMANDS:
        holdfast.add_command(command)
images.image.add_command(outdated.outdated)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Called by the console script."""
    try:
        code = run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone; Python would say so once more at exit, when it flushes.
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
    except Exception:
        render.echo(
            traceback.format_exc() + "holdfast: this is a bug; please report it with the lines above", err=True
        )
        return BUG
    return result if isinstance(result, int) else 0


def usage_line(error: click.ClickException) -> str:
    """What click has to say about a call, in our form: one line, lower case, and where to read on."""
    message = error.format_message().replace("\n", " ").rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return message[:1].lower() + message[1:] + (f" (see '{context.command_path} --help')" if context else "")


def told(group: ExceptionGroup[Exception]) -> int:
    """Print every deliberate error of a group, a line each; anything else in it is a bug."""
    expected, bugs = group.split(HoldfastError)
    if bugs is not None:
        render.echo("".join(traceback.format_exception(group)), err=True)
        return BUG
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
