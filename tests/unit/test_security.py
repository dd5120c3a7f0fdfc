"""What somebody who may commit state files, or hand over an archive, tries first: none of it may harm the agent.

Every case here once broke a pass, took minutes, or reached a file that is not its own.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from holdfast.errors import HoldfastError, WrongState
from holdfast.files import remove_tree
from holdfast.images.formats.archives import open_archive
from holdfast.images.incoming.load import import_rootfs, load_archive
from holdfast.images.kept.store import ImageStore
from holdfast.runtime import seccomp
from holdfast.source.directory import DirectorySource, Torn, read_file
from holdfast.source.git import GitSource
from holdfast.spec.load import load
from holdfast.spec.model import NodeFacts, Spec
from holdfast.store import Store
from tars import unpack

WEB = '[containers.web]\nimage = "app:1"\n'
GOOD = b'[containers.db]\nimage = "db:1"\n'


def loaded(text: str) -> Spec:
    """A revision of two files: what is wrong in one must not keep the other from loading, nor take long."""
    began = time.process_time()
    spec = load({"bad.toml": text.encode(), "good.toml": GOOD}, NodeFacts(name="n"))
    assert time.process_time() - began < 5
    assert "good" in spec.apps
    return spec


@pytest.mark.parametrize(
    "text",
    [
        f"{WEB}shm_size = {'9' * 5000}",
        f"{WEB}shm_size = -{'9' * 400}",
        f"{WEB}shm_size = '{'9' * 4000}.5k'",
        f"{WEB}stop_grace_period = '{'9' * 400}s'",
        f"{WEB}[containers.web.resources]\ncpus = inf",
        f"{WEB}restart_policy = {{ policy = 'always', factor = inf }}",
        f"{WEB}environment = {{ A = 'x\\u0000y' }}".replace("'x\\u0000y'", '"x\\u0000y"'),
        f"{'a.' * 3000}a = 1",
        f"[{'a.' * 200_000}a]",
        f"{WEB}labels.{'a.' * 60}a = 1",
        f"a = {'[' * 100_000}",
    ],
    ids=["digits", "negative", "size", "duration", "infinite", "factor", "nul", "key", "header", "labels", "lists"],
)
def test_values_that_nothing_can_hold_break_their_own_file_only(text: str) -> None:
    spec = loaded(text)

    assert "bad" not in spec.apps
    assert [problem.path for problem in spec.problems] == ["bad.toml"]


@pytest.mark.parametrize("mark", ["${", "${:-", "${}"])
def test_marks_without_an_end_are_told_at_once(mark: str) -> None:
    spec = loaded(f"{WEB}command = '{mark * 20_000}'")

    assert 0 < len(spec.problems) <= 201
    assert sum(len(str(problem)) for problem in spec.problems) < 1_000_000


def test_a_file_of_nothing_but_faults_is_told_without_taking_for_ever() -> None:
    spec = loaded(WEB + "".join(f"k{index} = 1\n" for index in range(20_000)))

    assert len(spec.problems) == 200
    assert "19801 more problems" in str([str(problem) for problem in spec.problems])


def test_a_tree_deeper_than_any_recursion_is_removed(tmp_path: Path) -> None:
    nested(tmp_path / "tree", depth=1200)
    outside = tmp_path / "outside"
    outside.write_text("kept")
    (tmp_path / "tree" / "link").symlink_to(outside)

    remove_tree(tmp_path / "tree")

    assert list(tmp_path.iterdir()) == [outside]


def nested(folder: Path, depth: int) -> None:
    """Directories within each other, as only a program that changes into each can make them."""
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=handle)
        inner = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)


@pytest.mark.parametrize(
    "text",
    [
        f'{WEB}[containers.web.networks.n]\naliases = ["x\\n10.0.0.9 bank.example"]\n[networks.n]',
        f'{WEB}[containers.web.networks.n]\naliases = ["a b"]\n[networks.n]',
        f'{WEB}[networks.n]\nsubnet = "0.0.0.0/0"',
        f'{WEB}[networks.n]\nsubnet = "127.0.0.0/8"',
        f'{WEB}[networks.n]\nsubnet = "169.254.169.0/24"',
        f'{WEB}[networks.n]\nsubnet = "239.1.0.0/16"',
        f'{WEB}sysctls = {{ "net.//.kernel.core_pattern" = "|/x" }}',
        f'{WEB}sysctls = {{ "net..kernel" = "1" }}',
        f'{WEB}volumes = ["/srv/a\\nb:/x"]',
        f"{WEB}ports = {[f'10.0.{i}.1:1-65535:1-65535' for i in range(250)]}",
    ],
    ids=["line", "words", "all", "loopback", "metadata", "multicast", "sysctl", "dots", "path", "ports"],
)
def test_values_that_would_reach_beyond_the_container_are_refused(text: str) -> None:
    assert "bad" not in loaded(text).apps


@pytest.mark.parametrize(
    ("subnet", "allowed"),
    [
        ("10.90.1.0/24", True),
        ("172.31.255.0/24", True),
        ("192.168.7.0/24", True),
        ("203.0.113.0/24", False),
        ("8.8.8.0/24", False),
        ("100.64.0.0/24", False),
        ("172.32.0.0/24", False),
        ("172.0.0.0/8", False),
        ("192.168.0.0/15", False),
    ],
)
def test_networks_take_private_addresses_only(subnet: str, allowed: bool) -> None:
    spec = loaded(f'{WEB}[networks.n]\nsubnet = "{subnet}"')

    assert ("bad" in spec.apps) is allowed
    if not allowed:
        (problem,) = spec.problems
        assert "networks.n.subnet" in str(problem)
        assert f"'{subnet}' is outside what [network] allowed_subnets of agent.toml allows" in str(problem)


def test_agent_toml_may_allow_networks_other_addresses_and_no_private_ones() -> None:
    facts = NodeFacts(name="n", subnets=("203.0.113.0/24",))

    def apps(subnet: str) -> bool:
        return "a" in load({"a.toml": f'{WEB}[networks.n]\nsubnet = "{subnet}"'.encode()}, facts).apps

    assert apps("203.0.113.128/25")
    assert not apps("10.90.1.0/24")


@pytest.mark.parametrize("rule", ["cap-add", "devices", "seccomp-unconfined", "new-privileges", "privileged"])
def test_privileged_is_no_way_around_the_rules_that_it_includes(rule: str) -> None:
    facts = NodeFacts(name="n", forbid=frozenset({rule}))

    (problem,) = load({"a.toml": f"{WEB}privileged = true".encode()}, facts).problems

    assert f"the rule '{rule}'" in str(problem)


def test_what_agent_toml_gives_all_containers_breaks_no_rule_and_stays_dropped_where_it_is_dropped() -> None:
    facts = NodeFacts(name="n", forbid=frozenset({"cap-add"}), cap_add=("CAP_NET_RAW",))

    def added(text: str) -> tuple[str, ...]:
        spec = load({"a.toml": f"{WEB}{text}".encode()}, facts)
        assert not spec.problems
        return spec.apps["a"].containers["web"].cap_add

    assert added("") == ("CAP_NET_RAW",)
    assert added('cap_drop = ["NET_RAW"]') == added('cap_drop = ["ALL"]') == ()


def test_an_apparmor_profile_of_ones_own_is_as_good_as_none() -> None:
    facts = NodeFacts(name="n", forbid=frozenset({"apparmor-unconfined"}))
    assert load({"a.toml": WEB.encode()}, facts).problems == ()
    for text in ('apparmor = "unconfined"', 'apparmor = "mine"', "privileged = true"):
        assert load({"a.toml": f"{WEB}{text}".encode()}, facts).problems


def test_a_seccomp_profile_of_ones_own_is_as_good_as_none() -> None:
    facts = NodeFacts(name="n", forbid=frozenset({"seccomp-unconfined"}))

    assert load({"a.toml": f'{WEB}seccomp = "/var/lib/x/profile.json"'.encode()}, facts).problems


@pytest.mark.parametrize("content", ["[]", '{"syscalls": 1, "defaultAction": "x"}', "[" * 100_000, None])
def test_a_file_that_is_no_seccomp_profile_is_told_and_never_waited_for(content: str | None, tmp_path: Path) -> None:
    path = Path("/dev/zero")
    if content is not None:
        path = tmp_path / "profile.json"
        path.write_text(content)

    with pytest.raises(WrongState, match="seccomp profile"):
        seccomp.profile(str(path), ())


# -- sources -------------------------------------------------------------------------------------------------


def link_bomb(folder: Path, leaf: str) -> None:
    """Nine folders, each of which links to the next one six times: ten million paths, none of them in a circle."""
    for level in range(9):
        (folder / f"l{level}").mkdir()
        for link in range(6):
            (folder / f"l{level}" / f"k{link}").symlink_to(f"../l{level + 1}")
    (folder / "l9").mkdir()
    (folder / "l9" / leaf).write_text("x")


def committed(folder: Path) -> GitSource:
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    return GitSource(str(folder), folder.parent / "root")


@pytest.mark.parametrize("leaf", ["file", ".git~"])
def test_links_do_not_make_a_small_tree_endless(leaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.source.revision.MAX_VISITS", 20_000)  # the real one takes a while
    folder = tmp_path / "state"
    folder.mkdir()
    link_bomb(folder, leaf)

    with pytest.raises(WrongState, match="entries"):
        DirectorySource(folder).current()
    with pytest.raises(WrongState, match="entries"):
        committed(folder).refresh()


def test_folders_too_deep_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    nested(folder, depth=1500)
    (folder / "good.toml").write_bytes(GOOD)

    try:
        assert list(DirectorySource(folder).current().files) == ["good.toml"]
    finally:
        remove_tree(folder)  # pytest, which would take it away much later, gives up at this depth


def test_a_commit_that_lists_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.source.snapshot.LONGEST_LISTING", 1 << 20)  # the real one takes a while

    def git(*command: str, feed: bytes = b"") -> str:
        done = subprocess.run(["git", "-C", str(tmp_path), *command], input=feed, check=True, stdout=subprocess.PIPE)
        return done.stdout.decode().strip()

    git("init", "-q", "-b", "main")
    tree = git("mktree", feed=f"100644 blob {git('hash-object', '-w', '--stdin')}\tf\n".encode())
    for _ in range(7):
        tree = git("mktree", feed="".join(f"040000 tree {tree}\t{name}\n" for name in "abcdefghij").encode())
    commit = git("-c", "user.name=a", "-c", "user.email=b", "commit-tree", tree, "-m", "x")
    git("update-ref", "refs/heads/main", commit)

    with pytest.raises(WrongState, match="listing"):
        GitSource(str(tmp_path), tmp_path / "root").refresh()


def test_a_folder_that_became_a_link_is_not_read_through(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("x")
    (tmp_path / "folder").symlink_to("outside")

    with pytest.raises(Torn):
        read_file(str(tmp_path / "folder" / "secret"))


def test_the_store_is_its_owners_alone(tmp_path: Path) -> None:
    Store(tmp_path / "root" / "state.db").close()

    assert (tmp_path / "root").stat().st_mode & 0o77 == 0
    assert (tmp_path / "root" / "state.db").stat().st_mode & 0o77 == 0


# -- archives ------------------------------------------------------------------------------------------------


def header(name: str, kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def entry(name: str = "a", **fields: object) -> bytes:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member)
    return stream.getvalue()


HOSTILE = {
    "a header of 8 GiB": header("p", tarfile.XHDTYPE, 8 << 30),
    "a name of 8 GiB": header("p", tarfile.GNUTYPE_LONGNAME, 8 << 30),
    "headers without end": header("p", tarfile.XHDTYPE, 0) * 3000,
    "a time that is none": entry(pax_headers={"mtime": "inf"}),
    "a time beyond all": entry(pax_headers={"mtime": "1e30"}),
    "an owner that is none": entry(uid=1 << 40),
    "a device that is none": entry(type=tarfile.CHRTYPE, devmajor=0o777777, devminor=0o777777),
    "a name too long": entry("a" * 300),
    "a link to nothing": entry(type=tarfile.SYMTYPE, linkname=""),
    "more zeros than a disk": entry(pax_headers={"GNU.sparse.map": f"0,{1 << 60}", "GNU.sparse.size": str(1 << 60)}),
}


@pytest.mark.parametrize("archive", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused_in_one_line(archive: bytes, tmp_path: Path) -> None:
    with pytest.raises(WrongState, match="unpack layer"):
        unpack(archive + bytes(2048), tmp_path / "l")


@pytest.mark.parametrize("layer", ["../../secret", "/etc/hostname"])
def test_a_manifest_names_no_file_outside_of_its_folder(layer: str, tmp_path: Path) -> None:
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps([{"Config": layer, "Layers": [], "RepoTags": ["a:1"]}]))

    with pytest.raises(WrongState, match="leads out of it"), open_archive(folder, tmp_path, "amd64"):
        pass


def test_a_file_that_never_ends_is_no_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    store = ImageStore(tmp_path / "images")

    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(HoldfastError, match="no regular file"):
            import_rootfs(store, path, "a:1")
        with pytest.raises(HoldfastError, match="no regular file"):
            load_archive(store, path)
