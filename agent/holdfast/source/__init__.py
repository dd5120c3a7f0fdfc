"""Where the state comes from: a plain directory or a git branch → Revision. Called by `reconcile` and `daemon`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.source.revision import Revision, Source, SourceState, Watch

if TYPE_CHECKING:
    from holdfast.config import StateSource

__all__ = ["EARLIER", "Known", "Revision", "Source", "SourceState", "Watch", "known_of", "make_source"]

Known = Mapping[str, Any]
#: What is remembered of a revision that an earlier version accepted: it did not note where that was read from.
EARLIER: Known = {"url": None, "lies_on": {"": ("", "")}}


def make_source(state: StateSource, root: Path, *, debounce: float = 0.02, known: Known | None = None) -> Source:
    """Make the source that `state` in agent.toml names.

    root: the agent's, where a git mirror is kept. debounce: seconds of quiet after a plain write in a directory.
    known: what is remembered of the last revision (`known_of`), wherever that came from.
    """
    # Imported here: a host with a plain directory needs no git, one with git no inotify.
    if state.git:
        from holdfast.source.git import GitSource

        return GitSource(state.git, root, branch=state.branch, path=state.path, interval=state.interval)
    from holdfast.source.directory import DirectorySource

    source = DirectorySource(state.directory, debounce)
    if known and known["url"] in (None, source.state().url):
        source.remember({folder: (point, what) for folder, (point, what) in known["lies_on"].items()})
    return source


def known_of(revision: Revision) -> Known:
    """What has to be remembered of a revision, for a process that comes later; JSON-able."""
    return {"url": revision.url, "lies_on": {folder: list(mount) for folder, mount in revision.lies_on.items()}}
