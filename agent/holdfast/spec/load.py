"""The files of a revision → Spec: every app of this node that loads, and everything that is wrong with the rest.

Three steps: read each state file by itself (kept in a Cache while its text stays the same), hold all of them against
each other, then collect the files that are mounted. Called by `reconcile` with each revision and by `holdfast check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any

from holdfast.keys import text_of
from holdfast.spec import links
from holdfast.spec.authored import StateFile
from holdfast.spec.builds import Builds, Folder
from holdfast.spec.edits import edited_draft, looks_alike
from holdfast.spec.interpolate import interpolated
from holdfast.spec.model import App, Build, NodeFacts, Problem, Spec, When, digest_of_file
from holdfast.spec.resolve import Draft, app_name, draft_of
from holdfast.tables import MOST_FAULTS, Fault, read_table
from holdfast.toml import Document, Unreadable, dotted
from holdfast.words import shown

VARS_FILE = "vars.toml"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one state file came to by itself: its app's likely name, a draft (None if it is not TOML), problems."""

    raw: bytes
    name: str
    draft: Draft | None
    problems: tuple[Problem, ...] = ()


@dataclass(slots=True)
class Cache:
    """What a caller keeps from one `load` to the next, so that only changed files are read again.

    It answers for one set of facts at a time, and is not for several threads at once. around: the facts, and what
    else `load` got with the files. shared: the facts with the vars of the repository. alone: whether each state file
    is sound, and none builds an image or is itself mounted, so that an edit of one may concern no other.
    """

    around: tuple[Any, ...] = (None,)
    files: Mapping[str, bytes] = field(default_factory=dict)
    spec: Spec = field(default_factory=Spec)
    readings: dict[str, Reading] = field(default_factory=dict)
    digests: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    shared: NodeFacts = field(default_factory=lambda: NodeFacts(name=""))
    alone: bool = False


def load(
    files: Mapping[str, bytes],
    facts: NodeFacts,
    *,
    cache: Cache | None = None,
    executable: frozenset[str] = frozenset(),
    left_out: Mapping[str, str] = MappingProxyType({}),
    ignored: frozenset[str] = frozenset(),
    in_force: Mapping[str, App] = MappingProxyType({}),
) -> Spec:
    """Read a revision: relative path → content. Never raises for what a file holds; that is in Spec.problems.

    Every *.toml is an app, whatever folder it is in, but for vars.toml at the top (vars for all files; agent.toml's
    own win), for what begins with a dot, and for what lies in the context of an image that another file builds. Apps
    that `when` gives to other nodes are checked and left out. executable: those of files that are programs. left_out:
    path → why the revision lacks it; who needs it is told. ignored: what it lacks for its name; hints say where that
    may not be meant. in_force: what this node has of each app now; where two files want one thing, the app that has
    it keeps it.
    """
    cache = cache if cache is not None else Cache()
    around = facts, executable, dict(left_out), ignored
    if cache.around == around:
        if cache.files == files:
            return cache.spec
        if cache.alone and files.keys() == cache.files.keys() and _take_edits(cache, files, executable):
            return cache.spec
    shared, faulty = _with_vars(files, left_out, facts)
    same_vars = cache.around[0] == facts and cache.files.get(VARS_FILE) == files.get(VARS_FILE)
    old = cache.readings if same_vars else {}
    readings = {path: _reading(path, files[path], shared, old.get(path)) for path in sorted(filter(is_state, files))}
    needed = [wanted for reading in readings.values() if reading.draft for wanted in reading.draft.wanted.values()]
    lacking = {**left_out, **{path: _unread(path) for path in ignored if any(_is_in(each, path) for each in needed)}}
    folder = Folder(files, executable, lacking, {path: each for path, each in cache.digests.items() if path in files})
    linked = _outside_contexts(readings) | dict(_lacking(readings, folder, in_force))
    drafts, builds, broken, problems = _linked(linked, folder, facts, faulty, in_force)
    blobs: dict[str, bytes] = {}
    apps: dict[str, App] = {}
    for draft in drafts:
        path, name = draft.app.path, draft.app.name
        unchanged = path in old and old[path].draft is draft
        before = cache.spec.apps.get(name) if unchanged else None
        apps[name] = _finished(draft, folder, builds.images_of(draft.app, blobs), blobs, before)
    problems.sort(key=lambda problem: (problem.path, problem.line))
    hints = (*_hints(files, readings), *_hints_of_ignored(ignored, readings, builds))
    spec = Spec(apps, broken, tuple(problems), blobs, hints)
    cache.around, cache.files, cache.spec = around, dict(files), spec
    cache.readings, cache.digests, cache.shared = readings, dict(folder.digests), shared
    building = any(reading.draft.images for reading in readings.values() if reading.draft)
    mounted = any(_is_in(path, wanted) for wanted in {*needed} for path in readings)
    cache.alone = not (problems or broken or building or mounted)
    return spec


def _take_edits(cache: Cache, files: Mapping[str, bytes], executable: frozenset[str]) -> bool:
    """Bring the cache to files of which only state files differ; False, and nothing is done, where an edit may
    concern other files than its own."""
    folder = Folder(files, executable, {}, {})
    readings: dict[str, Reading] = {}
    apps = dict(cache.spec.apps)
    for path, raw in files.items():
        if (before := cache.files[path]) is raw or before == raw:
            continue
        known = cache.readings.get(path)
        if known is None or known.draft is None:
            return False
        reading = _reading(path, raw, cache.shared, known)
        if reading.problems or reading.draft is None or not looks_alike(known.draft, reading.draft):
            return False
        readings[path] = reading
        if (app := apps.get(reading.name)) is not None and app.path == path:
            apps[reading.name] = _finished(reading.draft, folder, {}, {}, None)
    cache.files, cache.spec = dict(files), replace(cache.spec, apps=apps)
    cache.readings.update(readings)
    return True


def _faultless(path: str, facts: NodeFacts, document: Document, data: Mapping[str, Any]) -> Draft | None:
    """The draft of some of a state file's data; None if anything is wrong with it."""
    faults: list[Fault] = []
    table, faults = read_table(StateFile, interpolated(data, facts, faults), faults)
    if table is None or faults:
        return None
    draft, found = draft_of(path, table, document, facts)
    return None if found else draft


def is_yaml(path: str) -> bool:
    """Say whether a path has the ending of a YAML file."""
    return path.endswith((".yaml", ".yml"))


def _hints(files: Mapping[str, bytes], readings: Mapping[str, Reading]) -> Iterator[str]:
    """Name YAML files that no state file mounts or builds from: somebody may expect them to be read."""
    drafts = [reading.draft for reading in readings.values() if reading.draft is not None]
    used = {wanted for draft in drafts for wanted in draft.wanted.values()}
    used |= {image.context for draft in drafts for image in draft.images.values()}
    for path in sorted(filter(is_yaml, files)):
        steps = path.split("/")
        above = ["/".join(steps[:length]) for length in range(len(steps) + 1)]
        if used.isdisjoint(above) and not any(step.startswith(".") for step in steps):
            yield f"{path}: {NOT_YAML}"


def _hints_of_ignored(ignored: frozenset[str], readings: Mapping[str, Reading], builds: Builds) -> Iterator[str]:
    """Name files that are ignored for their name and may be missed: in mounts, in contexts, hidden TOML files."""
    drafts = [reading.draft for reading in readings.values() if reading.draft is not None]
    mounted = {wanted for draft in drafts for wanted in draft.wanted.values()}
    contexts = [image for draft in drafts for image in draft.images.values()]
    for path in sorted(ignored):
        if (name := path.rpartition("/")[2]) == ".git" or name.startswith(".."):
            continue
        if folder := next((each for each in sorted(mounted) if _is_in(path, each) and path != each), None):
            yield f"{path}: {_unread(path)}: it is missing from '{folder}', which is mounted (expected another name)"
        elif image := next((each for each in contexts if path.startswith(each.prefix) and each.context), None):
            if not builds.spares(image, path):
                yield f"{path}: {_unread(path)}: no build from '{image.context}' has it (expected another name)"
        elif is_state(path.removesuffix(name) + name.lstrip(".")) and name.startswith("."):
            yield f"{path}: {_unread(path)}: it is not read (expected NAME.toml)"


def _unread(path: str) -> str:
    name = path.rpartition("/")[2]
    hidden = name.startswith(".") and name.endswith(".toml")
    return "a hidden TOML file" if hidden else "a name of editors' temporary files"


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def needs_of(path: str, raw: bytes, facts: NodeFacts) -> set[str]:
    """Return the files and folders of a revision that a state file mounts or builds from."""
    draft = _reading(path, raw, facts, None).draft
    if draft is None:
        return set()
    built_from = {path for image in draft.images.values() for path in (image.context, *image.dockerfiles)}
    return {*draft.wanted.values(), *built_from}


NOT_YAML = "this is YAML, and state files are TOML: it is not read (expected NAME.toml)"


def is_state(path: str) -> bool:
    """Say whether a path of the revision is a state file."""
    hidden = any(step.startswith(".") and step != ".." for step in path.split("/"))
    return path.endswith(".toml") and path != VARS_FILE and not hidden


def _outside_contexts(readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """Leave out the readings of TOML files that only belong to a program that an image is built from.

    A file that has any table of a state file is one wherever it lies: no context makes an app vanish.
    """
    folders = _contexts(readings)
    return {
        path: reading
        for path, reading in readings.items()
        if not path.startswith(folders) or reading.draft is None or _TABLES & reading.draft.document.data.keys()
    }


def _contexts(readings: Mapping[str, Reading]) -> tuple[str, ...]:
    """Return the folders that images are built from."""
    return tuple(
        image.prefix
        for path, reading in readings.items()
        for image in (reading.draft.images.values() if reading.draft else ())
        if not path.startswith(image.prefix)  # beside its own Dockerfile, a state file may have neighbours
    )


def _lacking(
    readings: Mapping[str, Reading], folder: Folder, in_force: Mapping[str, App]
) -> Iterator[tuple[str, Reading]]:
    """Return state files that the revision leaves out as files that do not load; else their apps would be removed.

    What lies in a folder that is left out is known by the apps that were read from there.
    """
    read_before = {app.path for app in in_force.values()}
    contexts = _contexts(readings)
    named = {path for path in folder.left_out if is_state(path) and not path.startswith(contexts)}
    for path in sorted((named | read_before) - folder.files.keys()) if folder.left_out else ():
        if why := folder.lacks(path):
            yield path, Reading(b"", app_name(path, None), None, (Problem(path, 1, why),))


_TABLES = frozenset(StateFile.model_fields)


def _with_vars(
    files: Mapping[str, bytes], left_out: Mapping[str, str], facts: NodeFacts
) -> tuple[NodeFacts, tuple[Problem, ...]]:
    """Return the facts with the variables of the repository; those of the node win."""
    if VARS_FILE in left_out:
        return facts, (Problem(VARS_FILE, 1, f"is not in this revision: it is {left_out[VARS_FILE]}"),)
    if VARS_FILE not in files:
        return facts, ()
    try:
        document = Document(files[VARS_FILE])
    except Unreadable as error:
        return facts, (Problem(VARS_FILE, error.line, str(error), column=error.column),)
    good: dict[str, str] = {}
    faults: list[Fault] = []
    for key, value in document.data.items():
        try:
            if not isinstance(text := text_of(value), str):
                right = "expected a string, number or boolean"
                raise ValueError(f"{shown(value)} is not a value of a variable ({right})")  # noqa: TRY004
            good[key] = text
        except ValueError as error:
            faults.append(Fault((key,), str(error)))
    return replace(facts, vars={**good, **facts.vars}), tuple(_problems(VARS_FILE, document, faults))


def _reading(path: str, raw: bytes, facts: NodeFacts, before: Reading | None) -> Reading:
    """Read one state file: what of it is as before is not read again."""
    if before is not None and before.raw == raw:
        return before
    if before is not None and before.draft is not None and not before.problems:
        draft = edited_draft(before.draft, raw, partial(_faultless, path, facts))
        if draft is not None:
            return replace(before, raw=raw, draft=draft)
    try:
        document = Document(raw)
    except Unreadable as error:
        problem = Problem(path, error.line, str(error), column=error.column)
        return Reading(raw, app_name(path, None), None, (problem,))
    faults: list[Fault] = []
    data = interpolated(document.data, facts, faults)
    table, draft = None, None
    if len(faults) <= MOST_FAULTS:
        table, faults = read_table(StateFile, data, faults)
    if table is not None:
        draft, found = draft_of(path, table, document, facts)
        faults.extend(found)
    return Reading(raw, app_name(path, document), draft, tuple(_problems(path, document, faults)))


def _problems(path: str, document: Document, faults: Iterable[Fault]) -> Iterator[Problem]:
    listed = list(faults)
    for fault in listed[:MOST_FAULTS]:
        yield Problem(path, document.line(fault.path), fault.message, key=dotted(document.written(fault.path)))
    if len(listed) > MOST_FAULTS:
        yield Problem(path, 1, f"{len(listed) - MOST_FAULTS} more problems (correct these first)")


def _linked(
    readings: Mapping[str, Reading],
    folder: Folder,
    facts: NodeFacts,
    problems: Iterable[Problem],
    in_force: Mapping[str, App],
) -> tuple[list[Draft], Builds, dict[str, str], list[Problem]]:
    """The readings held against each other: this node's drafts that stand, their images, what is broken, and why."""
    found = list(problems)
    # With faulty vars, ${vars.x:-default} would silently become its default.
    uncertain = bool(found)
    names = {app.path: name for name, app in in_force.items()}  # it stays when its file does not load any more
    broken = {
        path: names.get(path, reading.name)
        for path, reading in readings.items()
        if reading.problems or (uncertain and b"${vars." in reading.raw)
    }
    found += [problem for reading in readings.values() for problem in reading.problems]
    drafts = [reading.draft for reading in readings.values() if reading.draft is not None]
    here = [draft for draft in drafts if matches(draft.when, facts)]

    def refuse(findings: Iterable[links.Finding]) -> None:
        for draft, fault in findings:
            broken[draft.app.path] = names.get(draft.app.path, draft.app.name)
            found.extend(_problems(draft.app.path, draft.document, [fault]))

    refuse(links.duplicate_names(here))
    mine = {draft.app.name: draft for draft in here}
    others = {draft.app.name: draft for draft in drafts} | mine
    unknown = frozenset(broken.values())
    around_here = links.Neighbours(mine, frozenset(others) - frozenset(mine), unknown)
    around_others = links.Neighbours(others, frozenset(), unknown)
    builds, builds_of_others = Builds(mine, folder), Builds(others, folder)
    for draft in drafts:
        missing = links.missing_files(draft, folder.lacks, lambda path: bool(below(folder.files, path)))
        refuse(islice(missing, MOST_FAULTS))
        refuse(links.cycles_of_containers(draft))
        is_here = mine.get(draft.app.name) is draft
        around = around_here if is_here else around_others
        refuse(islice(links.dangling(draft, around), MOST_FAULTS))
        if draft.images and draft is others.get(draft.app.name):
            refuse(islice((builds if is_here else builds_of_others).faults(draft, around), MOST_FAULTS))
    refuse(builds.taken_tags())
    refuse(builds.rings())
    refuse(links.cycles_of_apps(mine))
    refuse(builds.orphans(set(broken.values())))
    claims, networks = links.Claims(), links.networks_of(here)
    standing = [draft for draft in here if draft.app.path not in broken]
    # Those that are broken come last: they are told what is taken, and take nothing from the others.
    standing.sort(key=lambda draft: links.newcomer(draft.app, in_force.get(draft.app.name)))  # and by path, as before
    for draft in [*standing, *(draft for draft in here if draft.app.path in broken)]:
        refuse(claims.claim(draft, networks))
    return [draft for draft in here if draft.app.path not in broken], builds, broken, found


def matches(when: When, facts: NodeFacts) -> bool:
    """Say whether an app is for this node."""
    named = not when.nodes or any(fnmatchcase(facts.name, glob) for glob in when.nodes)
    return named and all(facts.labels.get(key) == value for key, value in when.labels.items())


def below(files: Mapping[str, bytes], path: str) -> list[str]:
    """Return the file at a path, or all files of the directory there."""
    if path in files:
        return [path]
    prefix = f"{path}/" if path else ""
    return [name for name in files if name.startswith(prefix)]


def _finished(
    draft: Draft, folder: Folder, images: dict[str, Build], blobs: dict[str, bytes], before: App | None
) -> App:
    """Complete the draft's app with its images and the digests of its files; contents go to blobs."""
    files = folder.files
    contents = {path: files[path] for wanted in draft.wanted.values() for path in below(files, wanted)}
    contents |= draft.inline
    digests = {p: digest_of_file(contents[p], executable=p in folder.executable) for p in sorted(contents)}
    blobs.update((digests[path], content) for path, content in contents.items())
    if before is not None and before.files == digests and before.images == images:
        return before  # its own digest is computed already
    return draft.app.model_copy(update={"files": digests, "images": images}) if digests or images else draft.app
