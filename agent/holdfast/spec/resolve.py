"""One checked state file → a Draft: its App in the nouns of `model`, and what only the whole revision can tell.

Everything that a single file decides is decided here: qualified names, paths, local references, privileges. `links`
looks at the drafts of all files together, `load` calls both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.grammar import images, names
from holdfast.spec import forms, model
from holdfast.spec.authored import ConfigUse, ContainerTable, ImageTable, StateFile
from holdfast.spec.policy import broken_build_rules, broken_rules, foreign_subnet, outside_roots
from holdfast.spec.volumes import taken_over
from holdfast.tables import Fault, WrongOptions, read_options
from holdfast.toml import Document, KeyPath
from holdfast.words import suggestion


@dataclass(frozen=True, slots=True)
class ImageDraft:
    """An image to build, as its table has it: what it is made of is still to be looked up in the revision.

    context: a folder of the revision, "" is all of it. dockerfiles: where the Dockerfile may be, as paths of the
    revision, the first that is there is taken.
    """

    context: str
    dockerfiles: tuple[str, ...]
    table: ImageTable

    @property
    def prefix(self) -> str:
        """What the path of every file of the context starts with."""
        return f"{self.context}/" if self.context else ""


@dataclass(frozen=True, slots=True)
class Draft:
    """An App whose mounted files and references to other apps are still to be looked up.

    wanted: key path → the file or directory of the revision that is named there. inline: synthetic path → content.
    images: short name → an image that is to be built.
    A file with faults has a draft of what is left without them, so that all else of it can be checked.
    """

    app: model.App
    when: model.When
    document: Document
    wanted: Mapping[KeyPath, str] = field(default_factory=dict)
    inline: Mapping[str, bytes] = field(default_factory=dict)
    images: Mapping[str, ImageDraft] = field(default_factory=dict)

    def names(self, table: str) -> Iterable[str]:
        """Return what the file defines in a table of tables, whether it is faulty or not."""
        implied = self.app.networks if table == "networks" else ()
        return dict.fromkeys((*names_in(self.document, table), *implied))


def names_in(document: Document, table: str) -> Iterable[str]:
    found = document.data.get(table)
    return found if isinstance(found, dict) else ()


def draft_of(path: str, table: StateFile, document: Document, facts: model.NodeFacts) -> tuple[Draft, list[Fault]]:
    """Make the draft of a state file at path; return it with everything that is wrong."""
    return _Resolver(path, table, document, facts).draft()


def app_name(path: str, document: Document | None) -> str:
    """Return the name of a file's app, even if the file does not load: [app] name, or the file name without .toml."""
    app = document.data.get("app") if document else None
    written = app.get("name") if isinstance(app, dict) else None
    return written if isinstance(written, str) else path.rpartition("/")[2].removesuffix(".toml")


class _Resolver:
    """Holds what every step needs: the file's path and table, the node, and the faults so far."""

    def __init__(self, path: str, table: StateFile, document: Document, facts: model.NodeFacts) -> None:
        self.path = path
        self.table = table
        self.document = document
        self.facts = facts
        self.name = app_name(path, None) if table.app.name is None else table.app.name
        self.faults: list[Fault] = []
        self.wanted: dict[KeyPath, str] = {}

    def draft(self) -> tuple[Draft, list[Fault]]:
        self.check_name()
        for name, config in self.table.configs.items():
            if config.file is not None:
                self.file(("configs", name, "file"), config.file)
        for name, network in self.table.networks.items():
            if network.subnet is not None and (wrong := foreign_subnet(network.subnet, self.facts)):
                self.fault(("networks", name, "subnet"), wrong)
            self.driver(("networks", name), "driver", "network", network.driver, network.driver_opts)
        for name, volume in self.table.volumes.items():
            self.driver(("volumes", name), "driver", "volume", volume.driver, volume.driver_opts)
        own = {name: self.container(name, table) for name, table in self.table.containers.items()}
        app = model.App(
            name=self.name,
            path=self.path,
            depends_on=self.table.app.depends_on,
            containers={name: with_others(name, own) for name in own},
            networks=self.own_networks(own),
            volumes=self.table.volumes,
        )
        drafts = ((name, self.image_draft(name, table)) for name, table in self.table.images.items())
        images = {name: image for name, image in drafts if image is not None}
        return Draft(app, self.table.app.when, self.document, self.wanted, self.inline(), images), self.faults

    def check_name(self) -> None:
        try:
            names.name(self.name)
        except ValueError as error:
            self.fault((), f"{error}; the app has the file's name: rename it, or write name in [app]")
        if self.name in self.table.app.depends_on:
            self.fault(("app", "depends_on", self.name), f"'{self.name}' depends on itself (leave it out)")

    def driver(self, at: KeyPath, key: str | int, kind: str, name: str, options: Mapping[str, Any] = {}) -> None:
        """Check that some plugin offers a driver, and that it takes the options, if the plugins are known."""
        known = (self.facts.drivers or {}).get(kind)
        if known is None:
            return
        if name not in known:
            expected = f" (expected {' or '.join(sorted(known))}, or its plugin to be installed)"
            self.fault(
                (*at, key), f"no plugin offers the {kind} driver '{name}'{suggestion(name, known) or expected}"
            )
        elif table := known[name]:
            try:
                read_options(table, options)
            except WrongOptions as error:
                self.faults += [Fault((*at, "driver_opts", *each.path), each.message) for each in error.faults]

    def fault(self, path: KeyPath, message: str) -> None:
        self.faults.append(Fault(path, message))

    def inline(self) -> dict[str, bytes]:
        contents = {name: config.content for name, config in self.table.configs.items()}
        return {self.inline_path(name): text.encode() for name, text in contents.items() if text is not None}

    def inline_path(self, config: str) -> str:
        """Return where an inline config is kept: below the state file, where the revision can't have a file."""
        return f"{self.path}/configs/{config}"

    def image_draft(self, name: str, table: ImageTable) -> ImageDraft | None:
        at: KeyPath = ("images", name)
        for key, message in broken_build_rules(table.network, self.facts):
            self.fault((*at, key) if key else at, message)
        context = resolved(self.path, table.context)
        named = ("Dockerfile", "Containerfile") if table.dockerfile is None else (table.dockerfile,)
        found = [resolved(f"{context}/_" if context else "_", each) for each in named]
        if context is None or None in found:
            key, written = ("context", table.context) if context is None else ("dockerfile", named[0])
            self.fault((*at, key), f"'{written}' {_LEAVES}")
            return None
        return ImageDraft(context, tuple(filter(None, found)), table)

    def container(self, name: str, table: ContainerTable) -> model.Container:
        at: KeyPath = ("containers", name)
        intact = set(self.document.data["containers"][name]) <= table.model_fields_set
        if table.image is None and table.rootfs is None and intact:
            self.fault((*at, "image"), "is missing (expected an image, or a rootfs)")
        container = table.passed_to(
            model.Container,
            image=self.image(table.image),
            ports=tuple(port.port() for port in table.ports),
            networks=self.networks(table),
            mounts=tuple(self.mounts(at, table)),
            restart_policy=restart_policy(table),
            depends_on=self.depends_on(at, table),
        )
        for key, place in (("rootfs", table.rootfs), ("image", images.archive_path(table.image or ""))):
            if place and (wrong := outside_roots(place, self.facts)):
                self.fault((*at, key), wrong)
        for index, policy in enumerate(table.resources.policy):
            self.driver((*at, "resources", "policy"), index, "policy", policy)
        for key, message in broken_rules(container, self.facts):
            self.fault((*at, key), message)
        return self.with_defaults(container)

    def with_defaults(self, container: model.Container) -> model.Container:
        """Add the capabilities that agent.toml gives to all containers, except what the container drops."""
        given = tuple(name for name in self.facts.cap_add if not {name, "ALL"} & set(container.cap_drop))
        added = tuple(dict.fromkeys((*container.cap_add, *given)))
        return container.model_copy(update={"cap_add": added}) if given else container

    def own_networks(self, containers: Mapping[str, model.Container]) -> dict[str, model.Network]:
        """Return what the file defines, and the default network if a container joins it."""
        joined = {network for container in containers.values() for network in container.networks}
        implied = {model.DEFAULT_NETWORK} if self.network(model.DEFAULT_NETWORK) in joined else set()
        missing = implied - set(names_in(self.document, "networks"))
        return dict.fromkeys(missing, model.Network()) | self.table.networks

    def networks(self, table: ContainerTable) -> dict[str, model.Attachment]:
        if table.networks is None:
            return {self.network(self.table.app.network or self.facts.network): model.Attachment()}
        return {self.network(network): given for network, given in table.networks.items()}

    def image(self, written: str | None) -> str | None:
        """Return a reference as it is, or `images.app/name` for what the state files build."""
        ours = None if written is None else images.built(written)
        return written if ours is None else f"images.{self.qualified(ours)}"

    def qualified(self, reference: str, always_there: Iterable[str] = ()) -> str:
        """Return `app/name` of what an app defines; names that are always there stay as they are."""
        return reference if "/" in reference or reference in always_there else f"{self.name}/{reference}"

    def network(self, reference: str) -> str:
        return self.qualified(reference, model.BUILTIN_NETWORKS)

    def depends_on(self, at: KeyPath, table: ContainerTable) -> dict[str, str]:
        for other in table.depends_on:
            self.check_container((*at, "depends_on", other), other, 'depends_on = ["{}"] in [app]')
        for index, other in enumerate(table.volumes_from):
            where = (*at, "volumes_from", index)
            self.check_container(where, other, "that app's volume in volumes, as app/NAME:TARGET")
        return {**dict.fromkeys(table.volumes_from, "started"), **table.depends_on}

    def check_container(self, path: KeyPath, other: str, right: str) -> None:
        """Check that a container is one of this file. right: how to ask for what another app, {}, has."""
        app, slash, _ = other.rpartition("/")
        known = names_in(self.document, "containers")
        if slash:
            self.fault(path, f"'{other}' is a container of another app (expected {right.format(app)})")
        elif other not in known:
            self.fault(path, f"no container is called '{other}'{suggestion(other, known) or _HERE}")

    def mounts(self, at: KeyPath, table: ContainerTable) -> Iterator[model.Mount]:
        """Yield the mounts of volumes, tmpfs and configs, in this order; each target once."""
        taken: dict[str, KeyPath] = {}
        for path, target, mount in self.all_mounts(at, table):
            if target in taken:
                self.fault(path, f"target '{target}' is taken by another mount of this container (expected another)")
            taken.setdefault(target, path)
            if mount is not None:
                yield mount

    def all_mounts(self, at: KeyPath, table: ContainerTable) -> Iterator[tuple[KeyPath, str, model.Mount | None]]:
        for index, given in enumerate(table.volumes):
            path: KeyPath = (*at, "volumes", index)
            yield path, given.target, given.model_copy(update={"source": self.source(path, given)})
        for index, text in enumerate(table.tmpfs):
            mount = model.Mount(kind="tmpfs", **forms.tmpfs(text))
            yield (*at, "tmpfs", index), mount.target, mount
        for index, use in enumerate(table.configs):
            path = (*at, "configs", index)
            yield path, use.target, self.config(path, use)

    def source(self, path: KeyPath, mount: model.Mount) -> str:
        """Return what the source of a mount stands for."""
        match mount.kind:
            case "volume":
                return self.qualified(mount.source)
            case "file":
                return self.file(path, mount.source)
            case "bind":
                source = names.absolute(mount.source)
                if wrong := outside_roots(source, self.facts):
                    self.fault(path, wrong)
                return source
            case kind if kind not in model.BUILTIN_MOUNTS:
                self.driver(path, "type", "mount", kind, mount.driver_opts)
        return mount.source

    def config(self, path: KeyPath, use: ConfigUse) -> model.Mount | None:
        config = self.table.configs.get(use.source)
        if config is None:
            known = names_in(self.document, "configs")
            if use.source not in known:
                self.fault(path, f"no config is called '{use.source}'{suggestion(use.source, known) or _HERE}")
            return None
        source = self.inline_path(use.source) if config.file is None else resolved(self.path, config.file) or ""
        return use.passed_to(model.Mount, kind="file", source=source, read_only=True)

    def file(self, path: KeyPath, source: str) -> str:
        """Return the path of the revision that a path relative to the state file means."""
        found = resolved(self.path, source)
        if not found:
            whole = "is the whole of the repository's state (expected a path inside it)"
            self.fault(path, f"'{source}' {_LEAVES if found is None else whole}")
        if found is not None:
            self.wanted[path] = found
        return found or ""


def with_others(name: str, containers: Mapping[str, model.Container]) -> model.Container:
    """Give a container the mounts that it has from others, directly or through them; its own come first."""
    want = containers[name]
    mounts = {mount.target: mount for mount in want.mounts}
    seen = {name}

    def take(others: Mapping[str, str], access: str) -> None:
        for other, inner in others.items():
            if other in seen or other not in containers:
                continue
            seen.add(other)
            narrowed = "ro" if "ro" in (access, inner) else "rw"
            for mount in containers[other].mounts:
                if mount.kind != "tmpfs":
                    mounts.setdefault(mount.target, taken_over(mount, narrowed))
            take(containers[other].volumes_from, narrowed)

    take(want.volumes_from, "rw")
    return want.model_copy(update={"mounts": tuple(mounts.values())}) if want.volumes_from else want


_HERE = " in this file (expected one that it defines)"
_LEAVES = "leaves the repository's state (expected a path inside it)"


def resolved(state_file: str, path: str) -> str | None:
    """Turn a path relative to a state file into a path of the revision ("" is the top); None if it leaves that."""
    steps = state_file.split("/")[:-1]
    for step in path.split("/"):
        if step == ".." and not steps:
            return None
        if step == "..":
            steps.pop()
        elif step not in ("", "."):
            steps.append(step)
    return "/".join(steps)


def restart_policy(table: ContainerTable) -> model.RestartPolicy:
    """Return the restart policy that a container asks for, in the short form or the long one."""
    if table.restart is not None:
        written = forms.restart(table.restart)
        return model.RestartPolicy(**written, once=written["policy"] == "no")
    if table.restart_policy is not None:
        return table.restart_policy.passed_to(model.RestartPolicy, once=table.restart_policy.policy == "no")
    return model.RestartPolicy()
