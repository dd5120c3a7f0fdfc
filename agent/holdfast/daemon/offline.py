"""Answer for a node whose agent does not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from holdfast.config import Config
from holdfast.daemon.compose import STORE, node_of, reconciler_of, refused
from holdfast.errors import Conflict, NoAgent
from holdfast.node import Node
from holdfast.node.answers import Answers
from holdfast.questions import Json, Question


@contextmanager
def open_node(config: Config, *, makes: bool = False) -> Iterator[Offline]:
    """Answer for a node whose agent does not run: from what it keeps, and from the host itself.

    makes: whether something may be put into a root that no agent has used yet. Otherwise an empty one that lasts as
    long as the question stands in for it.
    """
    with ExitStack() as stack:
        used, why = config, refused(config)
        if not makes and _unused(config.root):
            empty = stack.enter_context(TemporaryDirectory(prefix="holdfast-"))
            used = config.model_copy(update={"root": Path(empty)})
        node = stack.enter_context(node_of(used))
        node.context.records_exits = False
        yield Offline(used, node, why)


def _unused(root: Path) -> bool:
    try:
        return not (root / STORE).exists()
    except PermissionError:
        return False  # opening it raises the error


class Offline(Answers):
    """Answers what can be asked without an agent."""

    def __init__(self, config: Config, node: Node, refused: str = "") -> None:
        """refused: why an agent would not start."""
        super().__init__(node.context)
        self._refused = refused
        self._reconciler = reconciler_of(config, node)
        self._node = node

    def ask(self, question: Question, given: dict[str, Any]) -> Any:
        """Refuse what only an agent can do."""
        raise NoAgent(f"{question.name}: no agent runs (start it with 'holdfast agent')")

    def status(self) -> Json:
        """Return the status, as read now."""
        spec = self._reconciler.wanted()
        observed = self._node.observe(spec=spec)
        plans = self._reconciler.preview()
        made = self._reconciler.seen(spec, observed, self.context.store.history(), plans[0])
        note = "the agent does not run: nothing is being put right"
        return {**made.status.json(), "agent": {"note": f"{note}; {self._refused}" if self._refused else note}}

    def plan(self) -> Json:
        """Return what an agent would do. Raises Conflict if it would not start."""
        if self._refused:
            raise Conflict(f"plan: {self._refused} (another name in agent.toml)")
        return self._reconciler.preview_json()
