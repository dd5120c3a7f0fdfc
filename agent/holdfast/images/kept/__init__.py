"""The image store: names, manifests and layers on disk."""
