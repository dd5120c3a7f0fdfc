"""Serve `holdfast.questions` as HTTP over a unix socket, to the CLI and to anyone in the agent's group.

Bodies are JSON; an error is `{"error": line, "class": name, "exit_code": number}`, so that the caller gets the very
error that was raised here.
"""

from holdfast.api.server import PER_USER, answers, listen, serving

__all__ = ["PER_USER", "answers", "listen", "serving"]
