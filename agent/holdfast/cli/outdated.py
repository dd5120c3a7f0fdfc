"""image outdated: what registries have by now, beside what runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.cli import render
from holdfast.cli.command import command, json_option, reach
from holdfast.errors import TryAgain

NEWER = 2


@command("outdated")
@json_option()
def outdated(json_: bool) -> int:
    """Ask the registries whether they have newer images than what was staged.

    Exits 0 when nothing is newer, 2 when something is, 75 when a registry could not tell.
    """
    with reach() as node:
        found = node.outdated()
    if json_:
        render.as_json(found)
    else:
        rows = [row(each) for each in found if each["newer"]]
        if rows:
            render.table(["CONTAINER", "IMAGE", "STAGED", "NEWER", "DIGEST", "FOLLOWS"], rows)
        elif not any(each["error"] for each in found):
            render.echo("every image is what its registry has")
    errors = [f"{each['target']}: {each['error']}" for each in found if each["error"]]
    if errors:
        raise TryAgain("\n".join(dict.fromkeys(errors)))
    return NEWER if any(each["newer"] for each in found) else 0


def row(each: Mapping[str, Any]) -> list[str]:
    follows = {"apply": "is applied", "notify": "is told"}.get(each["policy"], "")
    staged, newer = (str(each[key]).removeprefix("sha256:")[:12] for key in ("digest", "newer_digest"))
    return [each["target"], each["image"], staged, each["newer"], newer, follows]
