"""A commit in a bare repository → Revision: one `ls-tree`, one `cat-file`, links followed within the commit."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType

from holdfast.errors import TryAgain, WrongState
from holdfast.source.gitcommand import Git
from holdfast.source.revision import MAX_DEPTH, NO_LFS, Revision, check_size, check_visits, is_lfs_pointer, is_noise

LINK, PROGRAM, SUBMODULE = "120000", "100755", "160000"
NOWHERE = "a symbolic link that leads nowhere within the commit, or to a folder in itself, or in too many"
MOST_LINKS = 40
LONGEST_LINK = 4096  # PATH_MAX: what is longer leads nowhere, and is not worth the memory
LONGEST_LISTING = 16 << 20  # bytes of git-ls-tree(1): a few trees that name each other often list without end


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of git-ls-tree(1); size is 0 for a submodule."""

    mode: str
    id: str
    size: int


def read_commit(git: Git, commit: str, path: str, url: str) -> Revision:
    """Read the files under path of a commit.

    Raises WrongState when the path is gone or not a folder, or holds too much; TryAgain when git fails.
    """
    author, at, message = git.run("log", "-1", "--format=%an <%ae>%x00%ct%x00%s", commit).decode(
        errors="replace"
    ).rstrip("\n").split("\0", 2)  # fmt: skip
    entries = list_commit(git, commit)
    short = {name: entry.id for name, entry in entries.items() if entry.mode == LINK and entry.size < LONGEST_LINK}
    targets = read_blobs(git, sorted(set(short.values())))
    links = {name: targets[id].decode(errors="replace") for name, id in short.items()}
    tree = Tree(entries, links)
    top = tree.follow(path) if path else ""
    if top is None or (path and top not in tree.folders):
        raise WrongState(f"read '{url}': folder '{path}' is not in commit {commit[:10]} ({message}): what runs stays")
    found: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    ignored: set[str] = set()
    for seen, real in walk(tree, top, "", (top,), ignored, count()):
        entry = tree.entries.get(real)
        if entry is None:
            left_out[seen] = NOWHERE
        elif entry.mode == SUBMODULE:
            left_out[seen] = "a git submodule, and submodules are not followed (commit the files themselves)"
        else:
            found[seen] = entry
    check_size(url, sum(entry.size for entry in found.values()), len(found))
    blobs = read_blobs(git, sorted({entry.id for entry in found.values()}))
    files = {name: blobs[entry.id] for name, entry in sorted(found.items())}
    for name in [name for name, data in files.items() if is_lfs_pointer(data)]:
        del files[name]
        left_out[name] = NO_LFS
    return Revision(
        id=commit,
        files=MappingProxyType(files),
        left_out=MappingProxyType(left_out),
        author=_plain(author),
        message=_plain(message),
        at=float(at),
        executable=frozenset(name for name in files if found[name].mode == PROGRAM),
        ignored=frozenset(ignored),
    )


def _plain(text: str) -> str:
    """Text without control characters: whoever commits must not steer the terminal of whoever reads."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def list_commit(git: Git, commit: str) -> dict[str, Entry]:
    """Every file, link and submodule of a commit, by path."""
    entries: dict[str, Entry] = {}
    for line in git.run("ls-tree", "-r", "-z", "-l", "--full-tree", commit, most=LONGEST_LISTING).split(b"\0")[:-1]:
        head, name = line.split(b"\t", 1)
        mode, _, id, size = head.decode().split()
        entries[name.decode(errors="surrogateescape")] = Entry(mode, id, 0 if size == "-" else int(size))
    return entries


def read_blobs(git: Git, ids: list[str]) -> dict[str, bytes]:
    """The content of blobs, through one git-cat-file(1): `id type size`, newline, content, newline."""
    if not ids:
        return {}
    output = memoryview(git.run("cat-file", "--batch", feed="".join(f"{id}\n" for id in ids).encode()))
    blobs: dict[str, bytes] = {}
    at = 0
    for id in ids:
        end = at + len(id) + 1 + len("blob ")
        newline = bytes(output[end : end + 24]).find(b"\n") + end
        if bytes(output[at:end]) != f"{id} blob ".encode():
            raise TryAgain(f"read '{git.repository}': object {id} is missing (remove the mirror, it is fetched anew)")
        size = int(bytes(output[end:newline]))
        blobs[id] = bytes(output[newline + 1 : newline + 1 + size])
        at = newline + 1 + size + 1
    return blobs


class Tree:
    """The paths of a commit, with its symbolic links resolvable."""

    def __init__(self, entries: Mapping[str, Entry], links: Mapping[str, str]) -> None:
        self.entries = entries
        self.links = links
        self.folders: dict[str, list[str]] = {"": []}  # folder → paths of what is in it
        for path in entries:
            self._place(path)

    def _place(self, path: str) -> None:
        while path:
            folder = posixpath.dirname(path)
            known = folder in self.folders
            self.folders.setdefault(folder, []).append(path)
            if known:
                return
            path = folder

    def follow(self, path: str) -> str | None:
        """Where path leads within the commit, without links; None when that is outside of it or nowhere."""
        pending = path.split("/")[::-1]
        here, links = "", 0
        while pending:
            name = pending.pop()
            if name == ".." and not here:
                return None
            step = posixpath.join(here, name)
            target = self.links.get(step)
            if name == "..":
                here = posixpath.dirname(here)
            elif name in ("", "."):
                continue
            elif target is None:
                here = step
            elif target.startswith("/") or (links := links + 1) > MOST_LINKS:
                return None
            else:
                pending.extend(target.split("/")[::-1])
        return here if here in self.entries or here in self.folders else None


def walk(
    tree: Tree, folder: str, prefix: str, chain: tuple[str, ...], ignored: set[str], visits: Iterator[int]
) -> Iterator[tuple[str, str]]:
    """Yield (path as seen, path in the commit, "" if there is none) of all that is under folder."""
    for path in tree.folders[folder]:
        check_visits(folder or "/", next(visits))
        name = posixpath.basename(path)
        if is_noise(name):
            ignored.add(prefix + name)
            continue
        real = tree.follow(path) if path in tree.links else path
        if real is None or real in chain or (real in tree.folders and len(chain) >= MAX_DEPTH):
            yield prefix + name, ""
        elif real in tree.folders:
            yield from walk(tree, real, f"{prefix}{name}/", (*chain, real), ignored, visits)
        else:
            yield prefix + name, real
