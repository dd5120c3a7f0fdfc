"""Talk to registries."""
