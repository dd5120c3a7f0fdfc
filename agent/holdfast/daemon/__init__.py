"""The processes that act on a node: composed of its parts, they run as a daemon, once, or only to answer.

`compose` puts a node together and makes sure that nobody else acts on it; `agent` is the daemon, `once` converges or
shuts down once, `offline` answers when no agent runs.
"""
