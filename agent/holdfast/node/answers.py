"""Answer the questions that need no running agent: about containers, volumes, networks, the disk and plugins.

Called by the API in threads, and by the CLI itself when no agent runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any, cast

from holdfast import kinds
from holdfast.errors import Conflict, HoldfastError, NotFound
from holdfast.guard import found_by
from holdfast.node import installed
from holdfast.node.images import ImageAnswers
from holdfast.node.observe import published_now
from holdfast.node.recover import remove_volume
from holdfast.node.usage import prune_build_cache, prune_logs, usage
from holdfast.node.volumes import DEFINED_AS
from holdfast.observed import Instance, Receipt, Subject
from holdfast.questions import Json, Lines, Questions
from holdfast.runtime import cgroup, users
from holdfast.runtime.execs import ExecWant, exec_process, path_of, user_of
from holdfast.runtime.inside import inside
from holdfast.runtime.logs import Wanted
from holdfast.runtime.output import output
from holdfast.status.actual import LimitsStatus, Published, by_address, limits_status, published_ports


class Answers(ImageAnswers, Questions):
    """The answers that need no running agent."""

    # -- containers --

    def instances_of(self, target: str) -> list[Instance]:
        """The instances of `app/container`, oldest first; NotFound if nothing is called that."""
        found = sorted(
            (each for each in self.context.store.instances.values() if each.key == target),
            key=lambda each: each.created_at,
        )
        if not found and not self._wanted(target):
            raise NotFound(f"container '{target}': nothing of that name is here (see 'holdfast status')")
        return found

    def inspect(self, target: str) -> Json:
        """Return all that is known of a container; limits and published ports as the kernel has them now."""
        instances, published = self.instances_of(target), by_address(published_now(self.context))
        subject, history = Subject.parse(target), self.context.store.history()
        newest, hold, failure = history.newest(subject.app), history.holds.get(target), history.failures.get(subject)
        return {
            "target": target,
            "generation": newest and newest.number,
            "hold": hold and asdict(hold),
            "failure": failure and asdict(failure),
            "instances": [self._inspected(each, published) for each in instances],
        }

    def logs_of(self, target: str) -> Json:
        """Return where the output of a container is."""
        self.instances_of(target)
        return {"paths": [str(self.context.log_path(target))]}

    def logs(
        self,
        target: Sequence[str],
        tail: int | None = None,
        since: float | None = None,
        until: float | None = None,
        follow: bool = False,
    ) -> Lines:
        """Yield the output of containers; of several, each line with the name of its container."""
        sources = [
            (each if len(target) > 1 else "", Path(path)) for each in target for path in self.logs_of(each)["paths"]
        ]
        lines = output(sources, Wanted(tail, since, until), Event() if follow else None)
        return (line.json() if line else None for line in lines)

    def events(self, after: int = 0, limit: int = 1000, follow: bool = False, beat: float = 1.0) -> Lines:
        """Yield what happened so far; only a running agent can follow."""
        return iter(self.context.store.events(after, limit))

    def exec_of(
        self,
        target: str,
        command: Sequence[str],
        user: str = "",
        env: Sequence[str] = (),
        workdir: str = "",
        tty: bool = False,
        detach: bool = False,
    ) -> Json:
        """Return what runs a command inside a container.

        Raises Conflict if the container does not run, NoProgram and NotExecutable if the command can't.
        """
        environment = dict(each.partition("=")[::2] for each in env)
        want = ExecWant(argv=command, user=user, environment=environment, workdir=workdir, tty=tty)
        running = [each for each in self.instances_of(target) if each.phase == "running"]
        instance = running[-1] if running else None
        run = self.context.run_of(instance.id) if instance else None
        if not instance or not run or not self.context.runtime.alive(run):
            raise Conflict(f"exec in '{target}': it does not run (see 'holdfast status')")
        with inside(run.pid) as look:
            first = self.context.runtime.process(instance.id)
            runs_as = users.resolve(user, instance.want.group_add, look.read_file) if user else None
            process = exec_process(first, want, runs_as, home_is_set=self._sets_home(instance))
            look.check_program(command[0], path_of(process), process["cwd"], runs_as or user_of(process))
        return {"argv": self.context.runtime.exec_argv(instance.id, process, detach=detach)}

    def _sets_home(self, instance: Instance) -> bool:
        """Whether the image or the state file says what HOME is."""
        try:
            image = self.context.base(instance.image).config.get("config") or {}
        except (HoldfastError, OSError):  # it may have been deleted
            image = {}
        return "HOME" in instance.want.environment or any(each.startswith("HOME=") for each in image.get("Env") or ())

    def stats(self) -> Sequence[Json]:
        """Return what every running container uses, and its limits."""
        running = (each for each in self.context.store.instances.values() if each.phase == "running")
        return [self._stats_of(each) for each in sorted(running, key=lambda each: each.key)]

    def _stats_of(self, instance: Instance) -> Json:
        limits = self._limits_now(instance)
        return {
            "target": instance.key,
            "instance": instance.id,
            "memory_limit": limits.observed.memory if limits.observed else None,
            "limits": asdict(limits),
            **asdict(cgroup.usage(self.context.runtime.cgroup(instance.id))),
        }

    def _limits_now(self, instance: Instance) -> LimitsStatus:
        return limits_status(instance, cgroup.limits(self.context.runtime.cgroup(instance.id)))

    def _inspected(self, instance: Instance, published: Published) -> Json:
        value = {key: item for key, item in asdict(instance).items() if key != "want"}
        return {
            **value,
            "limits": asdict(self._limits_now(instance)),
            "ports": [str(port) for port in instance.want.ports],
            "published": published_ports((instance,), published),
            "want": instance.want.model_dump(mode="json", exclude_defaults=True),
            "bundle": str(self.context.host.instance(instance.id)),
            "cgroup": self.context.runtime.cgroup(instance.id),
            "receipts": [asdict(receipt) for receipt in self.context.store.owned(instance.id)],
        }

    def _wanted(self, target: str) -> bool:
        app, _, name = target.partition("/")
        newest = self.context.store.history().newest(app)
        return newest is not None and name in newest.app.containers

    # -- volumes --

    def volumes(self) -> Sequence[Json]:
        """Return every volume, with its users; an orphan is one that no app declares."""
        declared = self._declared()
        return [
            {
                "id": id,
                "driver": receipt.driver,
                "path": receipt.data.get("path", ""),
                "used_by": self._mounted_by(id),
                "orphan": declared.isdisjoint((id, self._defined_as(id))),
            }
            for id, receipt in sorted(self._volumes().items())
        ]

    def volume(self, id: str) -> Json:
        """Return one volume."""
        return _the("volume", id, self.volumes())

    def remove_volume(self, id: str, force: bool = False) -> None:
        """Delete a volume and its data."""

        def check() -> None:
            found = self.volume(id)
            users = found["used_by"]
            if running := self._running(users):
                stop = f"holdfast stop {' '.join(running)}"
                raise Conflict(f"remove volume '{id}': mounted by {', '.join(running)} (expected: {stop})")
            if (users or not found["orphan"]) and not force:
                why = f"mounted by {', '.join(users)}, stopped" if users else "its app declares it"
                raise Conflict(f"remove volume '{id}': {why} (--force deletes the data anyway)")

        remove_volume(self.context, id, check=check)
        self.context.store.event("removed", f"volume {id}", "removed by hand, with its data")

    def prune_volumes(self) -> Sequence[str]:
        """Delete every orphan that nothing mounts."""
        doomed = [each["id"] for each in self.volumes() if each["orphan"] and not each["used_by"]]
        for id in doomed:
            self.remove_volume(id)
        return doomed

    def _volumes(self) -> dict[str, Receipt]:
        """What drivers find, and what was made by a driver that can't list its volumes or is missing now."""
        made = {each.id: each for each in self.context.store.receipts("volume") if not each.owner}
        for name, driver in self.context.plugins.of_kind(kinds.VOLUME).items():
            found = found_by(driver)
            if found is not None:
                made = {id: each for id, each in made.items() if each.driver != name}
                made |= {each.id: each for each in found if not each.owner}
        return made

    def _declared(self) -> set[str]:
        newest = [known[-1] for known in self.context.store.history().generations.values() if known]
        of_apps = {f"{each.app.name}/{name}" for each in newest for name in each.app.volumes}
        images = (mounts for each in newest for mounts in (each.image_volumes or {}).values())
        return of_apps | {mount.source for mounts in images for mount in mounts}

    def _defined_as(self, volume: str) -> str:
        kept = self.context.store.receipt("volume", volume)
        return str(kept.data.get(DEFINED_AS, "")) if kept else ""

    def _running(self, containers: Sequence[str]) -> list[str]:
        """Those containers that run or are being started."""
        intents = self.context.store.intents().items()
        begun = {subject for subject, intent in intents if intent["verb"] == "StartInstance"}
        live = {each.key for each in self.context.store.instances.values() if each.phase in ("running", "creating")}
        return [each for each in containers if each in live | begun]

    def _mounted_by(self, volume: str) -> list[str]:
        return sorted(
            each.key
            for each in self.context.store.instances.values()
            if any(mount.kind == "volume" and mount.source == volume for mount in each.mounts)
        )

    # -- networks --

    def networks(self) -> Sequence[Json]:
        """Return every network, with what is attached to it."""
        return [
            {
                "id": receipt.id,
                "driver": receipt.driver,
                **{key: value for key, value in receipt.data.items() if key not in ("want", "joined")},
                "endpoints": list(self._endpoints(receipt.id)),
            }
            for receipt in sorted(self.context.store.receipts("network"), key=lambda each: each.id)
        ]

    def network(self, id: str) -> Json:
        """Return one network."""
        return _the("network", id, self.networks())

    def _endpoints(self, network: str) -> Iterator[Json]:
        for receipt in self.context.store.receipts("endpoint"):
            instance, _, attached = receipt.id.partition("/")
            if attached == network:
                owner = self.context.store.instances.get(cast(Any, instance))
                yield {"container": owner.key if owner else instance, **receipt.data}

    # -- the disk --

    def usage(self) -> Json:
        """Return what uses the disk, and what of it can be deleted."""
        return usage(self.context, self.volumes())

    def prune(self, all: bool = False, volumes: bool = False) -> Json:
        """Delete what nobody needs; named images and volumes only if asked for."""
        sizes = {each["volume"]: each["size"] for each in self.usage()["volumes"]} if volumes else {}
        gone = list(self.prune_volumes()) if volumes else []
        logs = prune_logs(self.context)  # first, by what is known now: images may have to wait for a lock
        images = self.prune_images(all)
        freed = {
            "images": images["freed"],
            "volumes": sum(sizes.get(id, 0) for id in gone),
            "logs": logs,
            "build cache": prune_build_cache(self.context),
        }
        return {"images": images["images"], "volumes": gone, "freed": sum(freed.values()), "kinds": freed}

    # -- plugins --

    def plugins(self) -> Sequence[Json]:
        """Return the state of every plugin that was found, and of missing drivers."""
        missing = installed.missing_drivers(self.context, installed.made(self.context.store))
        return [asdict(state) for state in installed.states(self.context, missing)]

    def forget_plugin(self, name: str) -> None:
        """Start containers without a plugin that adjusted them and is not installed any more."""
        installed.forget(self.context, name)
        self.context.store.event("removed", f"plugin {name}", "containers are started without it from now on")


def _the(kind: str, id: str, known: Sequence[Json]) -> Json:
    """The one of this id."""
    for each in known:
        if each["id"] == id:
            return each
    raise NotFound(f"{kind} '{id}': there is no such {kind} (see 'holdfast {kind} list')")
