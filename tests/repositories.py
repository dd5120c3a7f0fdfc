"""Git repositories as somebody who commits has them, and what a source that follows them has read."""

from __future__ import annotations

import subprocess
from pathlib import Path

from holdfast.source.git import GitSource


class Repository:
    """A work tree with a branch main, as somebody who commits has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> str:
        settings = ("-c", "user.name=Ada", "-c", "user.email=ada@example", "-c", "protocol.file.allow=always")
        command = ["git", "-C", str(self.path), *settings, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, message: str, **files: str | None) -> str:
        for name, content in files.items():
            path = self.path / (name.replace("__", "/") + ".toml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_text(content)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")


def fetched(source: GitSource) -> dict[str, bytes]:
    source.refresh()
    return dict(source.current().files)


def mirror_of(tmp_path: Path) -> Path:
    (mirror,) = (tmp_path / "root/source").glob("*.git")
    return mirror
