"""The state language: files of a revision → Spec. Pure: no clock, no disk, no kernel."""
