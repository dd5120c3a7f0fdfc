"""The command `holdfast`, which asks the agent, or the node itself if no agent runs.

Exit codes are those of the error tree (`holdfast.errors`, sysexits.h), and besides these: 0 done; 2 `plan` has
changes; 70 a bug, with its traceback; 130 interrupted.
"""

import gc
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Called by the console script."""
    gc.disable()  # nothing of what is imported becomes garbage; to look for it takes a twentieth of the time
    try:  # who interrupts a command may do so while it is still being loaded
        from holdfast.cli import entry
    except KeyboardInterrupt:
        return 130
    gc.freeze()
    gc.enable()
    return entry.main(arguments)
