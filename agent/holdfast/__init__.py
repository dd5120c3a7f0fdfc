"""holdfast keeps a Linux host in the state that is committed in git."""

__version__ = "0.1.0"
