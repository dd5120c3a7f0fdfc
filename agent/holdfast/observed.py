"""What exists on the host, and what happened before: besides the Spec, a plan is made from these two values.

`node` makes Observed from the kernel, the runtime and the receipts; `store` makes History.
All of it is frozen and JSON-able. Times are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any, Literal, NewType

from holdfast.grammar import signals
from holdfast.grammar.network import port_text
from holdfast.spec.model import App, Container, Mount, Resources
from holdfast.spec.volumes import of_slot

InstanceId = NewType("InstanceId", str)
Json = Mapping[str, Any]

Kind = Literal["rootfs", "volume", "network", "endpoint", "netns", "firewall", "run"]
Phase = Literal["creating", "running", "exited", "lost"]


class Subject(str):
    """What an action acts on, as people write it: `shop`, `shop/web`, `network shop/front`, `firewall`.

    It knows its parts, so that nobody takes it apart. kind: app, container, network, volume, image, or what the
    node's own things are called. app: "" for what belongs to the node. name: below the app; of the node's things, all
    that follows the kind.
    """

    kind: str
    app: str
    name: str

    def __new__(cls, kind: str, app: str = "", name: str = "") -> Subject:
        """Put it together from its parts."""
        within = "/".join(filter(None, (app, name)))
        self = super().__new__(cls, within if kind in ("app", "container") else f"{kind} {within}".strip())
        self.kind, self.app, self.name = kind, app, name
        return self

    def __getnewargs__(self) -> tuple[str, str, str]:  # type: ignore[override]
        return self.kind, self.app, self.name

    @classmethod
    def of(cls, kind: str, id: str) -> Subject:
        """A thing by its id, as `app/name`; without a slash it belongs to the node."""
        app, slash, name = id.partition("/")
        return cls(kind, app, name) if slash and kind in OF_APPS else cls(kind, "", id)

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Read what was written down, or what a driver tells of."""
        kind, space, id = text.partition(" ")
        if space:
            return cls.of(kind, id)
        app, slash, name = text.partition("/")
        if text in OF_THE_NODE:
            return cls(text)
        return cls("container" if slash else "app", app, name)


OF_APPS = ("network", "volume", "image")  # kinds whose things are called after an app
OF_THE_NODE = ("firewall", "names")


@lru_cache(maxsize=65_536)
def container_of(app: str, name: str) -> Subject:
    """Return a container as a subject. It is asked for several times for each container in every pass."""
    return Subject("container", app, name)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a driver's `ensure` made and its `remove` will need.

    kind and id name the thing (a volume `app/name`, an endpoint `instance/network`, …); owner is the instance that
    it was made for, or "" for things that instances share. data is the driver's own, JSON-able and enough on its
    own to remove the thing after a restart of the agent. What other rooms may read of data is said by the
    contract of the kind in `drivers`. root: the id of the root that the thing says it was made for;
    "" where it does not say, or is made for an instance, whose id says it. version: of the form of data, as its
    driver counts (`drivers.Versioned`); the agent writes it down.
    """

    kind: Kind
    driver: str
    id: str
    owner: str = ""
    data: Json = field(default_factory=dict)
    root: str = ""
    version: int = 1

    @property
    def of_root(self) -> str:
        """The id of the root that it belongs to, as far as it says so itself; "" for what says nothing."""
        marked, dash, _ = self.owner.partition("-")
        return marked if dash else self.root


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. code: 128 + signal after a signal, as in a shell; None: nobody saw it.

    signal: the one that ended it, where that is known (our own stop, want of memory): the code alone proves nothing,
    because a program may exit with 143 by itself. oom: it was killed for want of memory. asked: by our own stop.
    host_went_down: that stop was for a shutdown of the host.
    """

    code: int | None
    signal: int | None = None
    oom: bool = False
    at: float = 0.0
    asked: bool = False
    host_went_down: bool = False

    def __str__(self) -> str:
        if self.code is None:
            return "ended unseen"
        if self.oom:
            return f"was killed for want of memory (OOM), exit code {self.code}"
        if self.signal is not None and (name := signals.name_of(self.signal)):
            return f"was ended by {name}, exit code {self.code}"
        guess = signals.name_of(self.code - 128)
        return f"exited with {self.code}" + (f" ({guess} if a signal)" if guess else "")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a container may use. None: no limit. memory_swap: memory and swap together. pids: processes."""

    memory: int | None = None
    memory_swap: int | None = None
    cpus: float | None = None
    pids: int | None = None

    @classmethod
    def asked(cls, resources: Resources) -> Limits:
        """The limits that a state file asks for, before a cgroup policy adds any."""
        memory, swap, pids = resources.memory, resources.memory_swap, resources.pids
        return cls(memory, None if swap == -1 else swap, resources.cpus, None if pids == -1 else pids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One container run: its intent (want, image, files), its state, and what is wrong with it.

    image: digest of what it runs. image_volumes: what it has mounted beyond want.mounts; None for one that an
    earlier version made, which keeps what such volumes would hold in its writable layer.
    files: mount target → digest of the revision content mounted there.
    slot: which of the container's instances it is, from 1: a successor takes the slot that is free, and with it the
    addresses and the volumes that its image declares. restarts: how often it was started again; streak: how many of
    these in a row without a stable run.
    patched: the plugins that were asked to adjust its configuration; None where that is not known.
    faults: what of it is gone so that only a new start puts it right; drifted: what was altered but can be put
    right while it runs. Both in words; a healthy instance has neither. names: digest of the hosts file it has.
    """

    id: InstanceId
    app: str
    container: str
    generation: int
    want: Container
    image: str
    image_volumes: tuple[Mount, ...] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    phase: Phase = "creating"
    created_at: float = 0.0
    started_at: float | None = None
    pid: int | None = None
    exit: Exit | None = None
    restarts: int = 0
    streak: int = 0
    addresses: Mapping[str, str] = field(default_factory=dict)
    names: str = ""
    patched: tuple[str, ...] | None = None
    faults: tuple[str, ...] = ()
    drifted: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    slot: int = 1

    @property
    def key(self) -> Subject:
        return container_of(self.app, self.container)

    @property
    def lease(self) -> str:
        """Whose addresses it has: those of its slot, which outlive it."""
        return f"{self.key}/{self.slot}"

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """All that is mounted into it."""
        return (*self.want.mounts, *(self.image_volumes or ()))

    @property
    def host_went_down(self) -> bool:
        """Whether it ran until the host went down, by a shutdown or without one."""
        return self.phase == "lost" or (self.exit is not None and self.exit.host_went_down)


@dataclass(frozen=True, slots=True)
class NetworkState:
    """A network that stands on the host, from its receipt; faults as of an instance."""

    id: str
    driver: str
    want: str  # digest of the NetworkWant that made it
    data: Json
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MissingDriver:
    """A driver of things in use that no plugin offers now. distribution: what offered it, "" if unknown."""

    kind: str
    driver: str
    things: tuple[str, ...]
    distribution: str = ""

    @property
    def title(self) -> str:
        return f"{self.kind} driver '{self.driver}'"

    def __str__(self) -> str:
        shown = ", ".join(self.things[:3]) + (f" and {len(self.things) - 3} more" if len(self.things) > 3 else "")
        return f"no plugin offers it, and it made {shown} (install {self.distribution or 'its plugin'} again)"


@dataclass(frozen=True, slots=True)
class VolumeState:
    """A volume that exists, used or not.

    asked: the driver_opts that it was last made or changed with; None for one that nobody has a receipt for. faults:
    what the driver finds to be otherwise than it made it, in words. defined_as: the volume whose definition it has,
    where that is another (`spec.volumes.defined_as`).
    """

    id: str
    driver: str
    data: Json = field(default_factory=dict)
    asked: Mapping[str, str] | None = None
    faults: tuple[str, ...] = ()
    defined_as: str = ""


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """One port (or `count` of them) of the host that leads to a container's address."""

    protocol: str
    host_ip: str
    host_port: int
    address: str
    container_port: int
    count: int = 1

    def __str__(self) -> str:
        return port_text(self.host_ip, self.host_port, self.container_port, self.protocol, self.count)


@dataclass(frozen=True, slots=True)
class FirewallNetwork:
    """What the firewall knows of a network: its bridge, its subnet, whether it leads out of the host."""

    id: str
    interface: str
    subnet: str
    internal: bool = False


@dataclass(frozen=True, slots=True)
class FirewallWant:
    """The whole content of the agent's own table: a function of Observed. Both tuples are sorted."""

    networks: tuple[FirewallNetwork, ...] = ()
    ports: tuple[PublishedPort, ...] = ()

    @property
    def empty(self) -> bool:
        return not self.networks and not self.ports


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that others did to the host, that drivers can't repair and a person should know.

    subject: that of the plan which it is about: `network shop/front`, `firewall`. breaks: something that should work
    certainly does not, so the node is not converged.
    """

    subject: str
    text: str
    remedy: str = ""
    breaks: bool = False

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" + (f" ({self.remedy})" if self.remedy else "")


@dataclass(frozen=True, slots=True)
class Observed:
    """The host as it was read at `at`.

    firewall: what the table holds; None when it is not there or was altered. published: the ports that it publishes,
    altered or not; None when its driver does not say. limits: what the cgroups of running instances were last seen
    to hold.
    orphans: what carries this root's id and has no receipt. foreign: what bears the agent's name, has no receipt and
    carries another root's id or none: it is left alone. busy: subjects that were being worked on meanwhile, of
    which this therefore says nothing certain. lacking: bind mounts (`lack_key`) → why they can't be made, for what
    they lie on is not mounted. over: how many of the agent's actions were over before it was read.
    missing: drivers that no plugin offers any more, of what is in use.
    """

    at: float = 0.0
    instances: tuple[Instance, ...] = ()
    networks: Mapping[str, NetworkState] = field(default_factory=dict)
    volumes: Mapping[str, VolumeState] = field(default_factory=dict)
    firewall: FirewallWant | None = None
    published: tuple[PublishedPort, ...] | None = None
    limits: Mapping[InstanceId, Limits] = field(default_factory=dict)
    orphans: tuple[Receipt, ...] = ()
    foreign: tuple[Receipt, ...] = ()
    busy: frozenset[Subject] = frozenset()
    lacking: Mapping[str, str] = field(default_factory=dict)
    over: int = 0
    missing: tuple[MissingDriver, ...] = ()
    findings: tuple[Finding, ...] = ()

    def lacks(self, mount: Mount) -> str:
        """Why a mount can't be made now, "" if it can."""
        return self.lacking.get(lack_key(mount), "") if mount.kind == "bind" else ""


def lack_key(mount: Mount) -> str:
    """Return the key of a bind mount in `Observed.lacking`."""
    return f"{mount.source} {mount.require_mount}"


GenerationState = Literal["staged", "active", "good"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """An app resolved: numbered per app, staged → active (something runs by it) → good (everything does).

    What can't be staged has no generation, but a Failure. images: container → digest of its image. newer: container →
    what it runs instead of the reference that is committed, by name, tag and digest. image_volumes: container → the
    mounts that its image asks for (`spec.volumes`); None where an earlier version staged it.
    """

    app: App
    number: int
    state: GenerationState
    revision: str = ""
    images: Mapping[str, str] = field(default_factory=dict)
    newer: Mapping[str, str] = field(default_factory=dict)
    image_volumes: Mapping[str, tuple[Mount, ...]] | None = None
    staged_at: float = 0.0

    def volumes_of(self, container: str, slot: int) -> tuple[Mount, ...] | None:
        """What an instance has mounted beyond what its state file says; None where that is not known."""
        if self.image_volumes is None:
            return None
        return of_slot(self.app.name, container, self.image_volumes.get(container, ()), slot)


def free_slot(instances: Iterable[Instance], app: str, container: str) -> int:
    """Return the lowest slot of a container that no instance has: two instances share no address or volume."""
    taken = {each.slot for each in instances if each.container == container and each.app == app}
    return next(slot for slot in count(1) if slot not in taken)


@dataclass(frozen=True, slots=True)
class Hold:
    """What a person asked for by hand. It overrules the commit until it is released."""

    kind: Literal["stopped", "started", "restarted"]
    at: float
    by: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """The last failures in a row of an action on one subject. digest: what was tried; another digest is another try.

    retry_at None: only a change helps (quarantine). code: the exit code of the error's class (`errors`).
    """

    digest: str
    error: str
    count: int
    at: float
    retry_at: float | None
    code: int = 75


@dataclass(frozen=True, slots=True)
class NewerImage:
    """What a registry had for a container when it was last asked; often that is what runs.

    image: the reference as it is committed, which the question was about. reference: the answer, by name, tag and
    digest. digest: of its manifest for this host. at: when it was found.
    """

    image: str
    reference: str
    digest: str
    at: float


@dataclass(frozen=True, slots=True)
class History:
    """What decisions need to know of the past. It survives a restart of the agent.

    generations: app → its kept generations, oldest first. holds: `app/container` → hold.
    failures: action subject → failure. newer: `app/container` → what a registry has for it by now.
    """

    generations: Mapping[str, tuple[Generation, ...]] = field(default_factory=dict)
    holds: Mapping[str, Hold] = field(default_factory=dict)
    failures: Mapping[Subject, Failure] = field(default_factory=dict)
    newer: Mapping[str, NewerImage] = field(default_factory=dict)

    def newest(self, app: str) -> Generation | None:
        """The newest generation of an app."""
        kept = self.generations.get(app)
        return kept[-1] if kept else None
