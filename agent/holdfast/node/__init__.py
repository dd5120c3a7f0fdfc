"""The machine behind three verbs: check, observe, apply."""
