"""Turn the archive of a layer into a directory, and back again."""
