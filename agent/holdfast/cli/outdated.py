"""image outdated: what registries have now, beside what runs."""

from __future__ import annotations

from holdfast.cli import options, render
from holdfast.cli.command import command, reach
from holdfast.errors import TryAgain

NEWER = 2


@command("outdated")
@options.as_json
def outdated(json_: bool) -> int:
    """Ask the registries for newer images than those that were staged.

    Exits 0 if nothing is newer, 2 if something is, 75 if a registry did not answer.
    """
    with reach() as node:
        found = node.outdated()
    newer = [each for each in found if each["newer"]]
    errors = [f"{each['target']}: {each['error']}" for each in found if each["error"]]
    if json_:
        render.as_json(found)
    else:
        render.listing(newer, COLUMNS, empty="" if errors else "every image is what its registry has")
    if errors:
        raise TryAgain("\n".join(dict.fromkeys(errors)))
    return NEWER if newer else 0


FOLLOWS = {"apply": "is applied", "notify": "is reported"}  # by update_image
COLUMNS = {
    "CONTAINER": lambda each: each["target"],
    "IMAGE": lambda each: each["image"],
    "STAGED": lambda each: render.digest(str(each["digest"])),
    "NEWER": lambda each: each["newer"],
    "DIGEST": lambda each: render.digest(str(each["newer_digest"])),
    "FOLLOWS": lambda each: FOLLOWS.get(each["policy"], ""),
}
