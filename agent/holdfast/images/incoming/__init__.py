"""Bring images into the store."""
