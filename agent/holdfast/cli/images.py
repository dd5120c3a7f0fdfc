"""image …: what containers can be made of, in the words of `docker image` and `podman image`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import click

from holdfast.cli import render
from holdfast.cli.bars import followed
from holdfast.cli.client import Client
from holdfast.cli.command import Group, agreed, json_option, reach
from holdfast.errors import HoldfastError, UnfitHost, WrongCall

Json = Mapping[str, Any]
SOURCE = click.Path(exists=True, path_type=Path)
TARGET = click.Path(dir_okay=False, path_type=Path)
NAMELESS = "<none>"
FILTERS = ("dangling", "reference")
BUILT = "localhost/images/"  # how names begin that hold the key of a build
SHORT = 12  # digits of a digest that tell images apart


class Named(click.ParamType[str]):
    """What names an image: anything but nothing."""

    name = "image"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if value.strip() else self.fail("it is empty (expected [HOST/]NAME[:TAG])", param, ctx)


IMAGE = Named()


@click.group("image", cls=Group)
def image() -> None:
    """Images: pulled, built, loaded, imported, committed."""


# -- looking --


@image.command("list")
@json_option()
@click.option("-a", "--all", "all_", is_flag=True, help="Also the names that hold the keys of builds.")
@click.option("--digests", is_flag=True, help="Whole digests, and those that registries gave for the tags.")
@click.option("-q", "--quiet", is_flag=True, help="Digests only, one a line.")
@click.option("--no-trunc", is_flag=True, help="Whole digests.")
@click.option(
    "-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help="dangling=BOOL, reference=PATTERN; repeats."
)
@click.argument("name", required=False)
def list_(
    json_: bool,
    all_: bool,
    digests: bool,
    quiet: bool,
    no_trunc: bool,
    filters: tuple[str, ...],
    name: str | None,
) -> None:
    """List the images of this node; one without a name is <none>, and dangling."""
    wanted = [*filters, *([f"reference={name}"] if name else ())]
    with reach() as node:
        every: Sequence[Json] = node.images()
    found = [each for each in (every if all_ else without_keys(every)) if matches(each, wanted)]
    if json_:
        render.as_json(found)
    elif quiet:
        for digest in dict.fromkeys(each["digest"] for each in found):
            render.echo(digest if no_trunc else short(digest))
    elif not found:
        render.echo("no images" + ("" if wanted else " (holdfast image pull, holdfast image load)"))
    else:
        head = ["IMAGE", *(["TOP DIGEST"] if digests else []), "DIGEST", "SIZE", "MADE", "FROM", "USED BY"]
        render.table(head, [row(each, digests, no_trunc) for each in found])


def without_keys(images: Sequence[Json]) -> list[Json]:
    """Images without the names that only say what they were built from, where they have others."""
    named = {each["digest"] for each in images if each["ref"] and not each["ref"].startswith(BUILT)}
    return [each for each in images if each["digest"] not in named or not each["ref"].startswith(BUILT)]


def row(each: Json, digests: bool, no_trunc: bool) -> list[str]:
    digest = each["digest"] if no_trunc or digests else short(each["digest"])
    made = render.ago(each.get("created") or None)
    users = " ".join(each.get("used_by") or ())
    first = [each["ref"] or NAMELESS, *([str(each.get("top") or "")] if digests else [])]
    return [*first, digest, render.size(each.get("size")), made, str(each.get("source") or ""), users]


def short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:SHORT]


def matches(each: Json, filters: Iterable[str]) -> bool:
    """Whether an image passes all filters. Raises WrongCall for one that is none."""
    from fnmatch import fnmatchcase

    for entry in filters:
        key, _, value = entry.partition("=")
        if key == "dangling" and value in ("true", "false", "1", "0"):
            if (not each["ref"]) != (value in ("true", "1")):
                return False
        elif key == "reference" and value:
            tagless = each["ref"].rpartition(":")[0]
            if not any(fnmatchcase(name, value) for name in (each["ref"], tagless)):
                return False
        else:
            raise WrongCall(f"filter {entry!r}: not known (expected {' or '.join(FILTERS)}, as in dangling=true)")
    return True


@image.command("inspect")
@click.argument("refs", type=IMAGE, metavar="IMAGE...", nargs=-1, required=True)
def inspect(refs: tuple[str, ...]) -> None:
    """Print all that is known of images, as `docker image inspect` does: a JSON list."""
    with reach() as node:
        render.as_json([node.image(ref) for ref in refs])


@image.command("history")
@json_option()
@click.option("--no-trunc", is_flag=True, help="Whole instructions and digests.")
@click.option("-q", "--quiet", is_flag=True, help="Digests of the layers only.")
@click.argument("ref", type=IMAGE, metavar="IMAGE")
def history(ref: str, json_: bool, no_trunc: bool, quiet: bool) -> None:
    """Show how an image was made: its steps, the newest first, and the size of their layers."""
    with reach() as node:
        found: Sequence[Json] = node.image_history(ref)
    if json_:
        render.as_json(found)
    elif quiet:
        for each in found:
            render.echo((each["layer"] if no_trunc else short(each["layer"])) or "<none>")
    else:
        render.table(
            ["LAYER", "MADE", "SIZE", "COMMENT", "BY"],
            [
                [
                    (each["layer"] if no_trunc else short(each["layer"])) or NAMELESS,
                    render.ago(each["created"] or None),
                    render.size(each["size"]),
                    each["comment"],
                    instruction(each["created_by"], no_trunc),
                ]
                for each in found
            ],
        )


def instruction(text: str, whole: bool) -> str:
    """What made a step, on one line."""
    line = " ".join(text.split())
    return line if whole or len(line) <= 60 else line[:59] + "…"


# -- taking in --


@image.command("pull")
@click.option("-q", "--quiet", is_flag=True, help="Say only what came of it.")
@click.argument("refs", type=IMAGE, metavar="IMAGE...", nargs=-1, required=True)
def pull(refs: tuple[str, ...], quiet: bool) -> None:
    """Fetch images from registries: what is here already is not fetched again."""
    with reach(makes=True) as node:
        for ref in refs:
            try:
                told(followed(node.pull_image(ref), quiet=quiet)["image"])
            except KeyboardInterrupt:
                if isinstance(node, Client):
                    after = "\n" if sys.stderr.isatty() else ""  # the terminal has written ^C
                    more = "the agent goes on pulling it (see 'holdfast status')"
                    render.echo(f"{after}holdfast: pull '{ref}': {more}", err=True)
                raise click.Abort from None


@image.command("push")
@click.option("-q", "--quiet", is_flag=True, help="Say only what came of it.")
@click.argument("ref", type=IMAGE, metavar="IMAGE")
@click.argument("to", metavar="[DESTINATION]", default="")
def push(ref: str, to: str, quiet: bool) -> None:
    """Send an image to a registry, under its own name or another."""
    with reach() as node:
        told(followed(node.push_image(ref, to), quiet=quiet)["pushed"])


@image.command("import")
@click.argument("tar", type=click.Path(exists=True, path_type=Path, allow_dash=True))
@click.argument("ref", type=IMAGE, metavar="NAME[:TAG]")
@click.option(
    "-c", "--change", "changes", multiple=True, metavar="'CMD [\"sh\"]'", help="Set CMD, ENV, USER …; may repeat."
)
def import_(tar: Path, ref: str, changes: tuple[str, ...]) -> None:
    """Make an image of one layer out of a root file system's tar archive (- reads standard input)."""
    with reach(makes=True) as node, on_disk(tar) as path:
        told(node.import_image(str(path.resolve()), ref, changes))


@image.command("load")
@click.option("-i", "--input", "source", type=SOURCE, metavar="PATH", help="As the argument, as Docker has it.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing.")
@click.argument("path", type=click.Path(exists=True, path_type=Path, allow_dash=True), required=False)
def load(path: Path | None, source: Path | None, quiet: bool) -> None:
    """Take in the images of an OCI layout (directory or archive) or a docker-archive; - reads standard input."""
    if path is not None and source is not None:
        raise WrongCall("load: two archives are named (expected one PATH, or --input PATH)")
    with reach(makes=True) as node, on_disk(path or source or Path("-")) as place:
        for found in node.load_image(str(place.resolve())):
            if not quiet:
                told(found)


@contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """A path that the agent can open: standard input is written to a file first."""
    if str(path) != "-":
        yield path
        return
    import tempfile

    if sys.stdin.isatty():
        raise WrongCall("read standard input: it is a terminal (name a file, or let a pipe lead here)")
    with tempfile.NamedTemporaryFile(prefix="holdfast-", dir="/var/tmp") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy, 1 << 20)
        copy.flush()
        try:
            yield Path(copy.name)
        except HoldfastError as error:
            raise type(error)(str(error).replace(copy.name, "standard input")) from error


@image.command("tag")
@click.argument("ref", type=IMAGE, metavar="IMAGE")
@click.argument("names", type=IMAGE, metavar="NAME[:TAG]...", nargs=-1, required=True)
def tag(ref: str, names: tuple[str, ...]) -> None:
    """Give an image one more name."""
    with reach(makes=True) as node:
        for name in names:
            node.tag_image(ref, name)


def told(found: Json) -> None:
    render.echo(f"{found['ref']}  {found['digest']}")


# -- handing out --


@image.command("save")
@click.option("-o", "--output", type=TARGET, metavar="FILE", help="Where to; else standard output.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["oci-archive", "docker-archive"]),
    default="oci-archive",
    show_default=True,
    help="What to write.",
)
@click.argument("refs", type=IMAGE, metavar="IMAGE...", nargs=-1, required=True)
def save(refs: tuple[str, ...], output: Path | None, format_: str) -> None:
    """Write images to one archive, which skopeo, podman and Docker read."""
    with reach() as node:
        written(output, lambda out: node.save_images(refs, format_, out))


@image.command("export")
@click.option("-o", "--output", type=TARGET, metavar="FILE", help="Where to; else standard output.")
@click.argument("ref", type=IMAGE, metavar="IMAGE")
def export(ref: str, output: Path | None) -> None:
    """Write the root file system of an image as a tar archive."""
    with reach() as node:
        written(output, lambda out: node.export_image(ref, out))


def written(output: Path | None, write: Callable[[IO[bytes]], object]) -> None:
    """Have a file written: whole, or not at all; without one, standard output, unless that is a terminal."""
    if output is None:
        if sys.stdout.isatty():
            raise WrongCall("write an archive to standard output: it is a terminal (-o FILE)")
        sys.stdout.flush()
        write(cast(IO[bytes], sys.stdout.buffer))
        sys.stdout.buffer.flush()
        return
    if output.exists() and not output.is_file():  # a device or a fifo is written to, not replaced
        with output.open("wb") as out:
            write(out)
        return
    temporary = output.with_name(f".{output.name}.{os.urandom(4).hex()}.partial")
    try:
        with temporary.open("xb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(output)
    except OSError as error:
        raise UnfitHost(f"write '{output}': {(error.strerror or str(error)).lower()}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


# -- taking away --


@image.command("remove")
@click.argument("refs", type=IMAGE, metavar="IMAGE...", nargs=-1, required=True)
def remove(refs: tuple[str, ...]) -> None:
    """Forget names, and what only they need on disk; of a digest, all names."""
    failures: list[Exception] = []
    with reach() as node:
        for ref in refs:
            try:
                node.remove_image(ref)
            except HoldfastError as error:
                failures.append(error)
            else:
                render.echo(f"removed {ref}")
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ExceptionGroup("remove images", failures)


@image.command("prune")
@click.option("-a", "--all", "all_", is_flag=True, help="Also images with names that nobody uses.")
@click.option("-f", "--force", is_flag=True, help="Don't ask.")
def prune(all_: bool, force: bool) -> None:
    """Delete images without a name that nobody uses, and layers of pulls that broke off."""
    which = "every image that nobody uses" if all_ else "every image without a name that nobody uses"
    if not force and not agreed(f"delete {which}, and layers of pulls that broke off?"):
        return
    with reach() as node:
        every = node.images()
        freed = node.prune_images(all_)
    removed(freed["images"], every)
    if count := len(freed["layers"]):
        render.echo(f"removed {count} {'layer' if count == 1 else 'layers'} that no image needs")
    render.echo(f"freed {render.size(freed['freed'])}")


def removed(digests: Iterable[str], before: Iterable[Json]) -> None:
    """A line for each image that went, with the names that it had before."""
    names: dict[str, list[str]] = {}
    for each in before:
        if each["ref"]:
            names.setdefault(each["digest"], []).append(each["ref"])
    for digest in digests:
        render.echo("  ".join([f"removed {digest}", *names.get(digest, ())]))


COMMANDS = [image]
