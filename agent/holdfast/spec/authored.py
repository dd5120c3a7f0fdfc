"""The tables of a state file as a person writes them. `resolve` turns them into the nouns of `model`.

Most keys are declared in `model` and `parts`, and pass through. Here are those that become something else. Keys are
Compose's wherever it has a word for the thing. The JSON Schema and docs/reference.md come from these types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from holdfast.grammar import images, kernel, network
from holdfast.keys import Checked, Items, NonEmpty, OrOne, Short, Table, Text, or_text
from holdfast.spec import forms, model
from holdfast.spec.parts import Attachment, Mount, RestartTable
from holdfast.spec.values import STRINGS, Absolute, Address, AppNetwork, Id, Mode, Name, OnChange, Reference

Ports = Annotated[Text, Checked(network.ports_text, {"title": "port or range", "examples": ["8000-8010"]})]
Tmpfs = Annotated[str, Checked(lambda v: forms.tmpfs(v) and v, {"description": "TARGET[:size=64m,mode=1777]"})]
Restart = Annotated[str, Checked(lambda v: forms.restart(v) and v, {"examples": ["always", "on-failure:5"]})]


_UPDATES = ("update", "rolling")


class AppTable(Table):
    """The app that the file describes."""

    not_yet: ClassVar = (*_UPDATES, "window", "rollback")

    name: Name | None = Field(None, description="its name; default: the file's name without .toml")
    depends_on: Items[Name] = Field((), description="apps that must be up before it starts")
    when: model.When = Field(model.When(), description="which nodes it is for; absent: every node")
    network: AppNetwork | None = Field(
        None,
        description="which network containers join that name none: `default`, the app's own, or `bridge`, which all "
        "such apps share; absent: as agent.toml says",
    )


class PortTable(Table):
    """One published port, or a range of them."""

    target: Ports = Field(description="the port of the container, or a range")
    published: Ports = Field(description="the port of the host, or a range of the same length")
    host_ip: Address | None = Field(None, description="the host's address; absent: every address")
    protocol: Literal["tcp", "udp"] = Field("tcp", description="the protocol of the port")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        host, inner = self._ranges()
        if len(host) != len(inner):
            yield "", f"{len(host)} host ports for {len(inner)} container ports (expected the same number)"

    def _ranges(self) -> tuple[range, range]:
        return network.ports(self.published), network.ports(self.target)

    def port(self) -> model.Port:
        """The port as the rest of the program knows it."""
        host, inner = self._ranges()
        host_ip = "" if self.host_ip in (None, "0.0.0.0") else str(self.host_ip)
        first = {"host_port": host.start, "container_port": inner.start}
        return model.Port(host_ip=host_ip, protocol=self.protocol, count=len(host), **first)


class ConfigUse(Table):
    """A config of this app, mounted into the container."""

    source: Name = Field(description="a name of [configs]")
    target: Absolute = Field(
        default_factory=lambda read: f"/{read['source']}", description="where it is in the container; default: /NAME"
    )
    mode: Mode | None = Field(None, description="the permissions in octal; absent: readable by all")
    uid: Id | None = Field(None, description="the owner; absent: root")
    gid: Id | None = Field(None, description="the group; absent: root")
    on_change: OnChange = Field("restart", description="what to do when the content changes")


class ContainerTable(model.ContainerKeys):
    """One container."""

    not_yet: ClassVar = ("healthcheck", "replicas", "scale", "deploy", "secrets", "update_config", *_UPDATES)
    hints: ClassVar = {
        "network_mode": 'networks = ["none"] or ["host"]',
        "container_name": "the name in [containers.NAME]",
        "mem_limit": "memory in [containers.NAME.resources]",
        "memory": "memory in [containers.NAME.resources]",
        "mem_reservation": "memory_reservation in [containers.NAME.resources]",
        "memswap_limit": "memory_swap in [containers.NAME.resources]",
        "cpus": "cpus in [containers.NAME.resources]",
        "cpu_shares": "cpu_weight in [containers.NAME.resources]",
        "cpuset": "cpuset in [containers.NAME.resources]",
        "pids_limit": "pids in [containers.NAME.resources]",
        "oom_score_adj": "oom_score_adj in [containers.NAME.resources]",
        "security_opt": "seccomp, apparmor or no_new_privileges",
        "pull_policy": "pull",
        "build": 'image = "images.NAME", and [images.NAME]',
        "env": "environment",
        "workdir": "working_dir",
        "env_file": "environment",
        "size": 'storage_opt = { size = "…" }',
        "expose": "nothing: containers of one network reach every port of each other",
        "links": "networks: containers of one network find each other by name",
    }

    ports: Items[Annotated[PortTable, or_text(forms.port, "[HOST_IP:]HOST:CONTAINER[/PROTOCOL]")]] = Field(
        (), description="ports that are published on the host"
    )
    networks: Annotated[dict[Reference, Attachment], Short(forms.named, (STRINGS,))] | None = Field(
        None, description="the networks that it joins; absent: the app's own, `default`"
    )
    volumes: Items[Annotated[Mount, or_text(forms.volume, "SOURCE:TARGET[:ro]")]] = Field(
        (), description="volumes, files and directories that are mounted into it"
    )
    tmpfs: Annotated[Items[Tmpfs], OrOne] = Field((), description="file systems in memory, empty at each start")
    configs: Items[Annotated[ConfigUse, or_text(lambda name: {"source": name}, "a name of [configs]")]] = Field(
        (), description="configs of this app that are mounted into it"
    )
    restart: Restart | None = Field(
        None,
        description="when it runs again after it has ended: `no`, `on-failure[:N]`, `always` or `unless-stopped`; "
        "absent: only after a reboot",
    )
    restart_policy: RestartTable | None = Field(None, description="the long form of restart")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.image is not None and self.rootfs is not None:
            yield "image", "and rootfs exclude each other (expected one of them)"
        if self.rootfs is not None and not (self.command or self.entrypoint):
            yield "rootfs", "does not say what to run (expected command or entrypoint as well)"
        yield from self._wrong_fetching()
        if self.restart is not None and self.restart_policy is not None:
            yield "restart", "and restart_policy exclude each other (expected one of them)"
        if self.seccomp not in ("default", "unconfined") and not self.seccomp.startswith("/"):
            yield "seccomp", f"'{self.seccomp}' is not known (expected default, unconfined or an absolute path)"
        yield from self._wrong_networks()
        for key in self.sysctls:
            asked = {"ipc": self.ipc == "host" and 'ipc = "host"', "net": "host" in (self.networks or ()) and _HOST}
            if shared := asked.get(kernel.namespace_of(key)):
                yield "sysctls", f"'{key}' belongs to the host with {shared} (leave one of them out)"

    def _wrong_fetching(self) -> Iterator[tuple[str, str]]:
        """pull and update_image are about images that a registry has."""
        source = "a rootfs" if self.rootfs is not None else forms.not_of_a_registry(self.image or "")
        for key in ("pull", "update_image"):
            if source and key in self.model_fields_set:
                yield key, f"does not apply to {source} (expected an image of a registry, or leave it out)"
        if source or self.image is None or self.update_image is None:
            return
        if "@" in self.image:
            yield "update_image", "the image is pinned by its digest (expected a tag alone)"
        elif self.update_image.tag_pattern and not images.is_version(self.image):
            yield "update_image", f"tag_pattern: '{self.image}' has no version as its tag (expected one as :1.27.3)"

    def _wrong_networks(self) -> Iterator[tuple[str, str]]:
        if self.networks is None:
            return
        if not self.networks:
            yield "networks", 'is empty (expected ["none"] for no network at all; absent: the app\'s own)'
        for alone in ("none", "host"):
            if alone not in self.networks:
                continue
            if len(self.networks) > 1:
                yield "networks", f"'{alone}' can't be combined with other networks (expected it alone)"
            if self.networks[alone] != Attachment():
                yield "networks", f"'{alone}' takes no settings (expected networks = [\"{alone}\"])"
            if self.ports:
                right = "expected a network with addresses, as default"
                yield "ports", f"can't be published from network '{alone}' ({right})"


_HOST = 'networks = ["host"]'


def _not_builtin(name: str) -> str:
    if name in model.BUILTIN_NETWORKS:
        raise ValueError(f"'{name}' is built in and can't be defined (expected another name)")
    return name


class ConfigTable(Table):
    """A file, or a text, that containers mount by name."""

    file: str | None = Field(None, description="./path in the repository")
    content: str | None = Field(None, description="the text itself")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (self.file is None) == (self.content is None):
            yield "", "has neither or both of file and content (expected one of them)"
        if self.file is not None and (not self.file or self.file.startswith("/")):
            yield "file", f"'{self.file}' is not a path in the repository (expected ./path)"


class ImageTable(model.BuildKeys):
    """An image that the node builds from files of the repository, whenever these change."""

    not_yet: ClassVar = ("secrets", "ssh", "cache_from", "cache_to", "additional_contexts", "dockerfile_inline")
    hints: ClassVar = {
        "build_args": "args",
        "tag": "tags",
        "platform": "platforms",
        "file": "dockerfile",
        "containerfile": "dockerfile",
    }

    context: NonEmpty = Field(description="./path of the folder that COPY copies from")
    dockerfile: NonEmpty | None = Field(
        None, description="its path in the context; default: Dockerfile, then Containerfile"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.context.startswith(("/", "~")) or "://" in self.context:
            yield "context", f"'{self.context}' is not a path in the repository (expected ./path)"
        if self.dockerfile is not None and self.dockerfile.startswith("/"):
            yield "dockerfile", f"'{self.dockerfile}' is not a path in the context (expected one relative to it)"
        if self.push and not self.tags:
            yield "push", 'needs a name to push to (expected tags = ["REGISTRY/PATH:TAG"] as well)'
        for key, values in (("tags", self.tags), ("platforms", self.platforms)):
            twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
            if twice is not None:
                yield key, f"'{twice}' is named twice"


class StateFile(Table):
    """One state file: one app."""

    not_yet: ClassVar = ("secrets",)
    hints: ClassVar = {"services": "[containers.NAME]", "container": "[containers.NAME]", "image": "[images.NAME]"}

    app: AppTable = Field(AppTable(), description="the app itself")
    containers: dict[Name, ContainerTable] = Field({}, description="its containers")
    networks: dict[Annotated[Name, Checked(_not_builtin, {})], model.Network] = Field(
        {}, description="networks that the app defines"
    )
    volumes: dict[Name, model.Volume] = Field({}, description="volumes that the app defines")
    configs: dict[Name, ConfigTable] = Field({}, description="files and texts that containers mount")
    images: dict[Name, ImageTable] = Field({}, description="images that the node builds")
