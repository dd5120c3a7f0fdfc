"""The command `holdfast`: arguments → calls on the agent, or on the node itself when no agent runs.

Exit codes are those of the error tree (`holdfast.errors`, sysexits.h), and besides these: 0 done; 2 `plan` has
changes; 70 a bug, with its traceback; 130 interrupted.
"""

from holdfast.cli.entry import main

__all__ = ["main"]
