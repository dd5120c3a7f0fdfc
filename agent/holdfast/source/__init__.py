"""Where the state comes from: a plain directory or a git branch → Revision. Called by `reconcile` and `daemon`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.source.revision import Revision, Source, SourceState, Watch

if TYPE_CHECKING:
    from holdfast.config import StateSource

__all__ = ["Revision", "Source", "SourceState", "Watch", "make_source"]


def make_source(state: StateSource, root: Path, *, debounce: float = 0.02) -> Source:
    """Make the source that `state` in agent.toml names.

    root: the agent's, where a git mirror is kept. debounce: seconds of quiet after a plain write in a directory.
    """
    # Imported here: a host with a plain directory needs no git, one with git no inotify.
    if state.git:
        from holdfast.source.git import GitSource

        return GitSource(state.git, root, branch=state.branch, path=state.path, interval=state.interval)
    from holdfast.source.directory import DirectorySource

    return DirectorySource(state.directory, debounce)
