"""plan: what will be done, and why."""

from __future__ import annotations

from holdfast.cli import options, render
from holdfast.cli.command import command, reach
from holdfast.cli.status import finding
from holdfast.errors import HoldfastError
from holdfast.questions import Json

CHANGES = 2


@command("plan")
@options.as_json
def plan(json_: bool) -> int:
    """Show what the agent would do now, and why. Changes nothing.

    Exits 0 if there is nothing to do, 2 if there are changes or something is tried again later, 1 on any error,
    also in a state file.
    """
    try:
        with reach() as node:
            found = node.plan()
    except HoldfastError as error:
        render.echo(f"holdfast: {error}", err=True)
        return 1
    if json_:
        render.as_json(found)
    else:
        show_plan(found)
    if found["problems"]:
        return 1
    return 0 if found["empty"] and not found["waiting"] else CHANGES


def show_plan(found: Json) -> None:
    for app, steps in found["apps"].items():
        render.echo(render.paint(app or "the node", None, bold=True))
        for step in steps:
            show_step(step)
            if "StageGeneration" in step["actions"]:
                for need in found["images"].get(app, ()):
                    render.note(needed(need), indent=6)
    for title, colour in (("waiting", render.BUSY), ("drift", render.BUSY), ("foreign", render.QUIET)):
        if lines := found[title]:
            render.echo(render.paint(title, colour))
            for subject, why in lines.items():
                render.note(f"{subject}: {why}", indent=2, colour=None)
    for title, lines in (("state files", found["problems"]), ("this host", map(finding, found["findings"]))):
        for number, line in enumerate(lines):
            if number == 0:
                render.echo(render.paint(title, render.BAD))
            render.note(line, indent=2, colour=None)
    for line in found["hints"]:
        render.note(line, indent=2)
    if found["empty"]:
        render.echo("nothing to do now" if found["waiting"] else "nothing to do")
    else:
        render.echo(f"\n{render.counted(sum(len(steps) for steps in found['apps'].values()), 'change')}")


def needed(need: Json) -> str:
    """An image that is to be pulled or built, and how much has to come."""
    if need["verb"] == "build":
        return f"build {need['image']}"
    size = "size unknown" if need["size"] is None else render.size(need["size"])
    return f"pull {need['image']}  {size}" + (f": {need['error']}" if need["error"] else "")


MARKS = {
    "start": ("+", render.GOOD),
    "create": ("+", render.GOOD),
    "stage": ("·", render.QUIET),
    "stop": ("-", render.BAD),
    "remove": ("-", render.BAD),
    "delete": ("-", render.BAD),
    "forget": ("-", render.BAD),
}


def show_step(step: Json) -> None:
    """One line: a mark, verb and object, and the reason in the colour of remarks."""
    mark, colour = MARKS.get(step["verb"].split()[0], ("~", render.BUSY))
    told = f"{step['verb']} {step['object']}".strip()
    reasons = step["changes"] or [step["reason"]]
    head = f"  {mark} {told}"
    if len(reasons) == 1 and len(head) + len(reasons[0]) + 2 <= render.width():
        render.echo(render.paint(head, colour) + "  " + render.paint(reasons[0], render.QUIET))
        return
    render.echo(render.paint(head, colour))
    for reason in reasons:
        render.note(reason, indent=6)
