"""What a plan is made of: actions, imperative and complete, each with the reason a person reads.

`Action` is the union of them all. Whoever does something for each kind ends its `match` with `assert_never`, so that
mypy names every place where a new one is missing: here, in the planner, `preview.expect` and `machine.perform`.

Subjects are what two actions must not do at once: an app (`shop`), a container (`shop/web`), a network
(`network shop/front`), or the node's derived files (`firewall`, `names`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from holdfast.observed import FirewallWant, InstanceId, Receipt, Subject, container_of
from holdfast.spec.model import App, Network, Volume, digest_of


@dataclass(frozen=True, slots=True)
class Live:
    """Done to the container while it runs."""

    def __str__(self) -> str:
        return "applied live"


@dataclass(frozen=True, slots=True)
class Record:
    """Noted: only the agent reads it, the process knows nothing of it."""

    def __str__(self) -> str:
        return "noted, nothing restarts"


@dataclass(frozen=True, slots=True)
class Signal:
    """Put in place while it runs; then the process is told by a signal."""

    name: str

    def __str__(self) -> str:
        return f"sends {self.name}"


@dataclass(frozen=True, slots=True)
class Replace:
    """It takes a new container."""

    def __str__(self) -> str:
        return "replaces it"


Effect = Live | Record | Signal | Replace


@dataclass(frozen=True, slots=True)
class Change:
    """One field that differs: its key path, both values as a person reads them, and what changing it takes.

    target: where a file is mounted whose content differs, "" for all else.
    """

    field: str
    old: str
    new: str
    effect: Effect
    target: str = ""

    def __str__(self) -> str:
        return f"{self.field} {self.old} → {self.new}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Action:
    """The common part. app is "" for what belongs to the node; its lane is the node's own.

    past: what an event of it is called once it is done. is_news: whether there is an event of it when it went well.
    Each has `words` besides: verb and object as a person says them; the object leaves out the app.
    """

    past: ClassVar[str]
    is_news: ClassVar[bool] = True

    app: str
    reason: str

    @property
    def subject(self) -> Subject:
        return Subject("app", self.app)

    @property
    def verb(self) -> str:
        return type(self).__name__

    @property
    def tried(self) -> str:
        """What a failure is remembered by: another value is another try, without the wait of the earlier one."""
        return self.verb


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGeneration(_Action):
    """Resolve images, store mounted files, let every driver check; nothing that runs is touched.

    images: container → what a registry has for it by now (name, tag and digest), where that is to be run instead of
    what is here under the name that is committed. revision: that the app is of. files: the contents of that revision
    (`Spec.blobs`).
    """

    past: ClassVar[str] = "staged"

    spec: App
    images: Mapping[str, str] = field(default_factory=dict)
    revision: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tried(self) -> str:
        return " ".join((self.spec.digest, *(self.images[name] for name in sorted(self.images))))

    @property
    def words(self) -> tuple[str, str]:
        return "stage", ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureNetwork(_Action):
    """Make a network, mend it, or let it grow. hosts: how many containers join it."""

    past: ClassVar[str] = "made"

    network: str
    spec: Network
    hosts: int = 0

    @property
    def tried(self) -> str:
        return f"{self.spec.digest} for {self.hosts}"

    @property
    def subject(self) -> Subject:
        return Subject.of("network", self.network)

    @property
    def words(self) -> tuple[str, str]:
        return "create network", _short(self.network)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveNetwork(_Action):
    """Take away a network that nothing is attached to any more."""

    past: ClassVar[str] = "removed"

    network: str

    @property
    def subject(self) -> Subject:
        return Subject.of("network", self.network)

    @property
    def words(self) -> tuple[str, str]:
        return "remove network", _short(self.network)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartInstance(_Action):
    """Bring up a container of a staged generation: a new instance, or (instance set) a known one again.

    streak: restarts in a row without a stable run, this one included; 0 for a first start.
    """

    past: ClassVar[str] = "started"

    container: str
    generation: int
    instance: InstanceId | None = None
    streak: int = 0

    @property
    def subject(self) -> Subject:
        return container_of(self.app, self.container)

    @property
    def tried(self) -> str:
        return f"StartInstance {self.generation}"

    @property
    def words(self) -> tuple[str, str]:
        return ("start" if self.instance is None else "restart"), self.container


@dataclass(frozen=True, slots=True, kw_only=True)
class StopInstance(_Action):
    """stop_signal, then grace seconds, then SIGKILL; the instance stays, exited."""

    past: ClassVar[str] = "stopped"

    container: str
    instance: InstanceId
    signal: str
    grace: float

    @property
    def subject(self) -> Subject:
        return container_of(self.app, self.container)

    @property
    def tried(self) -> str:
        return f"StopInstance {self.instance}"

    @property
    def words(self) -> tuple[str, str]:
        return "stop", self.container


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateInstance(_Action):
    """Bring a running instance to a generation without touching its process (or with a signal at the most)."""

    past: ClassVar[str] = "updated"

    container: str
    instance: InstanceId
    generation: int
    changes: tuple[Change, ...] = ()

    @property
    def subject(self) -> Subject:
        return container_of(self.app, self.container)

    @property
    def tried(self) -> str:
        return f"UpdateInstance {self.generation} {' '.join(map(str, self.changes))}"

    @property
    def words(self) -> tuple[str, str]:
        return "update", self.container


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveInstance(_Action):
    """Take away an instance that does not run, with everything it has a receipt for."""

    past: ClassVar[str] = "removed"

    container: str
    instance: InstanceId

    @property
    def subject(self) -> Subject:
        return container_of(self.app, self.container)

    @property
    def tried(self) -> str:
        return f"RemoveInstance {self.instance}"

    @property
    def words(self) -> tuple[str, str]:
        return "remove", self.container


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureVolume(_Action):
    """Have the driver of a volume bring it to what is asked for by now, or mend it."""

    past: ClassVar[str] = "updated"

    volume: str
    spec: Volume

    @property
    def tried(self) -> str:
        return f"EnsureVolume {digest_of(self.spec.driver_opts)}"

    @property
    def subject(self) -> Subject:
        return Subject.of("volume", self.volume)

    @property
    def words(self) -> tuple[str, str]:
        return "update volume", _short(self.volume)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveVolume(_Action):
    """Delete a volume and its data: its app is gone and said on_remove = "delete"."""

    past: ClassVar[str] = "deleted"

    volume: str

    @property
    def subject(self) -> Subject:
        return Subject.of("volume", self.volume)

    @property
    def words(self) -> tuple[str, str]:
        return "delete volume", _short(self.volume)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkGood(_Action):
    """Note that every container of an app runs as its generation says."""

    past: ClassVar[str] = "good"
    is_news: ClassVar[bool] = False

    generation: int

    @property
    def words(self) -> tuple[str, str]:
        return "note as good", f"generation {self.generation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetApp(_Action):
    """Drop the generations, holds and failures of an app that is gone."""

    past: ClassVar[str] = "forgotten"

    @property
    def words(self) -> tuple[str, str]:
        return "forget", ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteFirewall(_Action):
    """Replace the agent's own table in one transaction."""

    past: ClassVar[str] = "written"

    want: FirewallWant

    @property
    def subject(self) -> Subject:
        return Subject("firewall")

    @property
    def tried(self) -> str:
        return digest_of(asdict(self.want))

    @property
    def words(self) -> tuple[str, str]:
        return "write firewall", ""


@dataclass(frozen=True, slots=True)
class Names:
    """What a hosts file says of others: (address, names) lines, and their digest."""

    digest: str
    lines: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteNames(_Action):
    """Bring hosts files up to date, in place."""

    past: ClassVar[str] = "written"
    is_news: ClassVar[bool] = False

    hosts: Mapping[InstanceId, Names]

    @property
    def subject(self) -> Subject:
        return Subject("names")

    @property
    def words(self) -> tuple[str, str]:
        return "write names", ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveOrphan(_Action):
    """Take away something that carries the root's id and has no receipt."""

    past: ClassVar[str] = "removed"

    receipt: Receipt

    @property
    def subject(self) -> Subject:
        kind, id = self.receipt.kind, self.receipt.id
        return Subject(kind) if kind == "firewall" else Subject.of(kind, id)

    @property
    def words(self) -> tuple[str, str]:
        return f"remove orphan {self.receipt.kind}", self.receipt.id


Action = (
    StageGeneration
    | EnsureNetwork
    | RemoveNetwork
    | StartInstance
    | StopInstance
    | UpdateInstance
    | RemoveInstance
    | EnsureVolume
    | RemoveVolume
    | MarkGood
    | ForgetApp
    | WriteFirewall
    | WriteNames
    | RemoveOrphan
)


def _short(qualified: str) -> str:
    return qualified.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Plan:
    """What can be done now, side by side, and why the rest waits.

    waiting: subject → why nothing is done about it now. drift: what a person holds against the commit, in words.
    wake_at: when to look again though nothing happens.
    """

    actions: tuple[Action, ...] = ()
    waiting: Mapping[Subject, str] = field(default_factory=dict)
    drift: Mapping[str, str] = field(default_factory=dict)
    wake_at: float | None = None

    @property
    def empty(self) -> bool:
        return not self.actions


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one action did. retry: whether the same may help later."""

    action: Action
    ok: bool
    took: float
    at: float
    error: str = ""
    retry: bool = True
    detail: Mapping[str, Any] = field(default_factory=dict)
