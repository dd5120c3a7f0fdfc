"""Runs containers: OCI configuration, conmon with crun or runc, and the store of images."""
