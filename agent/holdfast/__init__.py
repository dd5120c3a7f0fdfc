"""holdfast holds one Linux host fast to the state committed in git."""

__version__ = "0.1.0"
