"""The `[images.*]` of all state files → what must be built for each app: contexts, Dockerfiles, bases, keys.

A key is made of all that a build depends on, and of nothing else: another commit that leaves these alone builds
nothing. Called by `load`, once for each revision.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from holdfast.grammar.images import built
from holdfast.spec.dockerfile import Use, images_in
from holdfast.spec.dockerignore import Ignore
from holdfast.spec.links import Finding, Neighbours, place, turns, unknown
from holdfast.spec.model import App, Build, digest_of, digest_of_file
from holdfast.spec.resolve import Draft, ImageDraft
from holdfast.tables import Fault
from holdfast.toml import KeyPath

IGNORE = ".dockerignore"
MOST_TOLD = 5  # of what a folder lacks


@dataclass(frozen=True, slots=True)
class Folder:
    """The files of a revision. left_out: path → why it is not in files.

    digests: path → (content, its sha256), of files whose digest was needed before.
    """

    files: Mapping[str, bytes]
    executable: frozenset[str]
    left_out: Mapping[str, str]
    digests: MutableMapping[str, tuple[bytes, str]]

    def below(self, folder: str) -> Iterator[str]:
        """Return the paths of all files in a folder."""
        prefix = f"{folder}/" if folder else ""
        return (path for path in self.files if path.startswith(prefix))

    def lacks(self, path: str, spared: Callable[[str], bool] = lambda path: False) -> str:
        """Say what the revision lacks of a file or folder, and why; "" if nothing. spared: what nobody needs."""
        prefix = f"{path}/" if path else ""
        found = [
            (each, why)
            for each, why in sorted(self.left_out.items())
            if (each == path or each.startswith(prefix) or path.startswith(f"{each.rstrip('/')}/"))
            and not spared(each)
        ]
        if not found:
            return ""
        if len(found) == 1 and not found[0][0].startswith(prefix):  # it, or a folder that it is in
            return f"is not in this revision: '{found[0][0]}' is {found[0][1]}"
        several = ", ".join(f"'{each}', {why}" for each, why in found[:MOST_TOLD])
        return f"is not whole in this revision, it lacks: {several}" + ("; and more" if found[MOST_TOLD:] else "")

    def digest(self, path: str) -> str:
        """Return the sha256 (hex) of a file."""
        content = self.files[path]
        known = self.digests.get(path)
        if known is None or known[0] is not content:
            known = self.digests[path] = (content, digest_of_file(content))
        return known[1]


class Builds:
    """The images of these apps, held against each other. drafts: by app name."""

    def __init__(self, drafts: Mapping[str, Draft], folder: Folder) -> None:
        self.drafts, self.folder = drafts, folder
        self.images = {
            f"{app}/{name}": image for app, draft in drafts.items() for name, image in draft.images.items()
        }
        tagged = ((_full(tag), name) for name, image in self.images.items() for tag in image.table.tags)
        self.tags = dict(reversed([*tagged]))  # the first one counts
        self._bases: dict[str, tuple[tuple[Use, str], ...]] = {}
        self._made: dict[str, Build] = {}

    def faults(self, draft: Draft, around: Neighbours) -> Iterator[Finding]:
        """Find what is wrong with the images of one file: contexts, Dockerfiles, and what these start from."""
        for name, image in draft.images.items():
            at: KeyPath = ("images", name)
            try:
                if wrong := self._wrong_context(image) or self._lack(image):
                    yield draft, Fault((*at, "context"), wrong)
                    continue
                path = self._dockerfile(image)
                bases = self.bases(f"{draft.app.name}/{name}")
            except ValueError as error:
                yield draft, Fault((*at, "dockerfile"), str(error))
                continue
            for use, qualified in bases:
                if wrong := unknown(qualified, draft, "image", around):
                    yield draft, Fault((*at, "dockerfile"), f"{path}:{use.line}: '{use.name}': {wrong}")

    def taken_tags(self) -> Iterator[Finding]:
        """Find names that two images have: the first by the state file's path keeps it."""
        owners: dict[str, tuple[Draft, KeyPath]] = {}
        for draft in sorted(self.drafts.values(), key=lambda draft: draft.app.path):
            for name, image in draft.images.items():
                for index, tag in enumerate(image.table.tags):
                    path: KeyPath = ("images", name, "tags", index)
                    owner = owners.setdefault(_full(tag), (draft, path))
                    if owner != (draft, path):
                        yield draft, Fault(path, f"'{tag}' is taken by {place(*owner)} (expected another name)")

    def rings(self) -> Iterator[Finding]:
        """Find images that are built from each other; every file concerned gets a finding."""
        edges = {name: [base for _, base in self._sound_bases(name) if base in self.images] for name in self.images}
        for turned in turns(edges):
            app, _, name = turned[0].partition("/")
            wrong = f"a cycle: {' → '.join(turned)} (one of them must start from another image)"
            yield self.drafts[app], Fault(("images", name, "dockerfile"), wrong)

    def orphans(self, broken: Iterable[str]) -> Iterator[Finding]:
        """Find files that need an image of an app that does not load, because nobody knows what that image is."""
        lost, needed = set(broken), list(self._needed())
        while found := [each for each in needed if each[2] in lost and each[0].app.name not in lost]:
            for draft, where, app in found:
                yield draft, Fault(where, f"app '{app}', whose image this is, does not load (correct that one first)")
            lost |= {draft.app.name for draft, _, _ in found}

    def _needed(self) -> Iterator[tuple[Draft, KeyPath, str]]:
        """Yield each place where a file needs an image of an app."""
        for draft in self.drafts.values():
            for name, container in draft.app.containers.items():
                if image := built(container.image or ""):
                    yield draft, ("containers", name, "image"), image.partition("/")[0]
            for name in draft.images:
                for _, base in self._sound_bases(f"{draft.app.name}/{name}"):
                    yield draft, ("images", name, "dockerfile"), base.partition("/")[0]

    def images_of(self, app: App, blobs: dict[str, bytes]) -> dict[str, Build]:
        """Return everything that must be built for an app that loads; contents go to blobs."""
        wanted = [image for container in app.containers.values() if (image := built(container.image or ""))]
        wanted += [f"{app.name}/{name}" for name, image in self.drafts[app.name].images.items() if image.table.push]
        found: dict[str, Build] = {}
        pending = wanted[::-1]
        while pending:
            qualified = pending.pop()
            if qualified not in found:
                found[qualified] = self._build(qualified, blobs)
                pending.extend(found[qualified].bases.values())
        return dict(sorted(found.items()))

    def bases(self, qualified: str) -> tuple[tuple[Use, str], ...]:
        """Return what a Dockerfile names of the images of state files, as written and as qualified names.

        Raises ValueError where the Dockerfile is missing or can't be read.
        """
        if qualified not in self._bases:
            image, app = self.images[qualified], qualified.partition("/")[0]
            path = self._dockerfile(image)
            try:
                text = self.folder.files[path].decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"'{path}': byte {error.start} is not UTF-8") from None
            uses = ((use, self._meant(use.name, app)) for use in images_in(text, image.table.args))
            self._bases[qualified] = tuple((use, meant) for use, meant in uses if meant)
        return self._bases[qualified]

    def _sound_bases(self, qualified: str) -> tuple[tuple[Use, str], ...]:
        try:
            return self.bases(qualified)
        except ValueError:
            return ()

    def _meant(self, name: str, app: str) -> str:
        """Return the qualified name of an image that a Dockerfile of an app names; "" for one of a registry."""
        ours = built(name)
        if ours:
            return ours if "/" in ours else f"{app}/{ours}"
        return self.tags.get(_full(name), "")

    def _lack(self, image: ImageDraft) -> str:
        """Say what the revision lacks of a context; what .dockerignore leaves out is not needed."""
        ignore, prefix = self._ignore(image), image.prefix
        lack = self.folder.lacks(image.context, lambda path: ignore.leaves_out(path.removeprefix(prefix).rstrip("/")))
        return f"'{image.context}' {lack}" if lack else ""

    def spares(self, image: ImageDraft, path: str) -> bool:
        """Say whether .dockerignore leaves a path out of an image's context."""
        try:
            return self._ignore(image).leaves_out(path.removeprefix(image.prefix))
        except ValueError:  # a problem, which is told as such
            return True

    def _wrong_context(self, image: ImageDraft) -> str:
        if image.context in self.folder.files:
            return f"'{image.context}' is a file (expected a folder)"
        if next(self.folder.below(image.context), None) is not None:
            return ""
        lack = self.folder.lacks(image.context) or "is not in this revision (expected a folder)"
        return f"'{image.context}' {lack}"

    def _dockerfile(self, image: ImageDraft) -> str:
        """Return the path of the Dockerfile. Raises ValueError."""
        found = next((path for path in image.dockerfiles if path in self.folder.files), None)
        if found is None:
            raise ValueError(f"'{image.dockerfiles[0] if image.dockerfiles else ''}' is not in this revision")
        return found

    def _ignore(self, image: ImageDraft) -> Ignore:
        """Read what the context leaves out: DOCKERFILE.dockerignore, else .dockerignore. Raises ValueError."""
        own = f"{self._dockerfile(image)}{IGNORE}"
        path = own if own in self.folder.files else f"{image.prefix}{IGNORE}"
        try:
            return Ignore(self.folder.files.get(path, b"").decode(errors="surrogateescape"))
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from None

    def _build(self, qualified: str, blobs: dict[str, bytes]) -> Build:
        if known := self._made.get(qualified):
            return known
        image, bases = self.images[qualified], self.bases(qualified)
        folder, table, ignore, prefix = self.folder, image.table, self._ignore(image), image.prefix
        paths = [path for path in folder.below(image.context) if not ignore.leaves_out(path.removeprefix(prefix))]
        dockerfile = self._dockerfile(image)
        blobs.update((folder.digest(path), folder.files[path]) for path in [*paths, dockerfile])
        listing = {p.removeprefix(prefix): [folder.digest(p), p in folder.executable] for p in sorted(paths)}
        # Names that are not UTF-8 are surrogates here, which only the ASCII form can carry.
        content = json.dumps(listing, sort_keys=True, separators=(",", ":")).encode()
        blobs[digest_of_file(content)] = content
        # buildah before 1.30 looks a name up as it is written, later ones with its variables replaced.
        meant = {name: base for use, base in bases for name in (use.name, use.written)}
        parts = {
            "tree": digest_of_file(content),
            "instructions": folder.digest(dockerfile),
            "args": table.args,
            "target": table.target,
            "platforms": table.platforms,
            "labels": table.labels,
            "network": "none" if table.network == "none" else "host",  # default has this key, too: images stay
        }
        keys = {name: self._build(base, blobs).key for name, base in meant.items()}
        self._made[qualified] = made = table.passed_to(
            Build,
            key=digest_of({**parts, "bases": keys}),
            context=image.context,
            dockerfile=dockerfile,
            tree=parts["tree"],
            instructions=parts["instructions"],
            bases=meant,
        )
        return made


def _full(name: str) -> str:
    """Complete a name with its tag, as Docker does."""
    short = re.sub(r"^(index\.)?docker\.io/(library/)?", "", name)
    return short if ":" in short.rpartition("/")[2] else f"{short}:latest"
