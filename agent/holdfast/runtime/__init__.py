"""Runs containers: OCI configuration, conmon with crun or runc, and what a container needs of the host."""
