"""The built-in drivers. They use what any third-party driver may use, and come in by the same entry points."""
