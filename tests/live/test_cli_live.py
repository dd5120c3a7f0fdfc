"""The commands, as a person types them, against an agent and its containers."""

from __future__ import annotations

import grp
import json
import os
import pty
import select
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest

from ground import patient, wait_for
from holdfast.drivers import Host
from holdfast.runtime.logs import LINE
from live.agent import HOLDFAST, LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

SLEEPER = """
image = "busybox:1"
init = true
command = "sleep 1000"
networks = ["none"]
"""
TALKER = r"""
image = "busybox:1"
networks = ["none"]
init = true
command = ["sh", "-c", "echo one; echo two >&2; echo three; while [ ! -e /tmp/more ]; do sleep 0.05; done; echo four; sleep 1000"]
"""  # noqa: E501


def follow(agent: LiveAgent, *args: str) -> subprocess.Popen[str]:
    """A command that SIGINT ends, also where the tests run in the background of a shell, which has it ignored."""
    command = ["env", "--default-signal=INT", HOLDFAST, *args, "--config", str(agent.config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process: subprocess.Popen[str], words: str, timeout: float = 20) -> str:
    """What a process prints up to the line with these words; the process is ended then."""
    assert process.stdout is not None
    told, deadline = "", time.monotonic() + patient(timeout)
    with process.stdout as stream:
        while words not in told and time.monotonic() < deadline:
            if select.select([stream], [], [], 0.1)[0]:
                told += os.read(stream.fileno(), 65536).decode()
        process.send_signal(signal.SIGINT)
        process.wait(patient(10))
    assert words in told
    return told


def test_logs_tell_what_was_written_by_tail_by_time_and_as_it_comes(agent: LiveAgent) -> None:
    agent.write("shop.toml", f"[containers.web]{TALKER}")
    agent.converge()

    def told() -> tuple[list[str], list[str]]:
        done = agent.cli("logs", "shop/web")
        return done.stdout.splitlines(), done.stderr.splitlines()

    agent.wait(lambda: told() == (["one", "three"], ["two"]), "all was written, in whatever order conmon reads it")
    assert agent.cli("logs", "--since", "1h", "web").stdout.splitlines() == ["one", "three"]
    assert agent.cli("logs", "--tail", "0", "web").stdout == ""
    process = follow(agent, "logs", "-f", "web")
    agent.exec("web", "touch", "/tmp/more")
    assert read_until(process, "four").splitlines()[-1] == "four"
    assert agent.cli("logs", "--tail", "1", "web").stdout == "four\n"


def kept(agent: LiveAgent) -> int:
    """How many bytes the log files of shop/web have at one moment: while none is renamed."""

    def listed() -> dict[str, os.stat_result]:
        place = agent.host.root / "logs/shop"
        return {file.name: file.stat() for file in place.glob("web.log*")}

    def seen() -> list[dict[int, int]]:
        with suppress(FileNotFoundError):
            one, two = listed(), listed()
            if {name: each.st_ino for name, each in one.items()} == {name: each.st_ino for name, each in two.items()}:
                return [{each.st_ino: each.st_size for each in one.values()}]
        return []

    (sizes,) = wait_for(seen, "no file is renamed")
    return sum(sizes.values())


def test_logs_never_take_more_than_is_allowed_and_an_endless_line_is_read_at_once(agent: LiveAgent) -> None:
    flood = "head -c 60000000 /dev/zero | tr '\\0' a; echo; echo end; sleep 1000"
    agent.write(
        "shop.toml",
        f"[containers.web]{SLEEPER}".replace('"sleep 1000"', json.dumps(["sh", "-c", flood]))
        + 'logging = { max_size = "1MiB", max_files = 3 }\n',
    )
    most = 0

    def written() -> bool:
        nonlocal most
        most = max(most, kept(agent))
        return agent.cli("logs", "--tail", "1", "web", check=False).stdout == "end\n"

    agent.sync()
    agent.wait(written, "all was written")
    assert 1 << 20 < most <= 3 << 20
    rest = agent.cli("logs", "--tail", "2", "web").stdout
    assert rest.endswith("a\nend\n")
    assert len(rest) <= 2 * LINE


def test_logs_bound_while_no_agent_runs(agent: LiveAgent) -> None:
    flood = "until [ -e /tmp/go ]; do sleep 0.05; done; yes | head -c 9000000; sleep 1000"
    agent.write(
        "shop.toml",
        f"[containers.web]{SLEEPER}".replace('"sleep 1000"', json.dumps(["sh", "-c", flood]))
        + 'logging = { max_size = "256KiB", max_files = 2 }\n',
    )
    agent.converge()
    agent.stop()
    log = agent.host.root / "logs/shop/web.log"
    first, most = log.stat().st_ino, 0
    agent.cli("exec", "web", "touch", "/tmp/go")

    def looked() -> bool:
        nonlocal most
        most = max(most, kept(agent))
        with suppress(FileNotFoundError):  # conmon is renaming it
            return log.stat().st_ino != first
        return False

    agent.wait(looked, "a new file was begun")
    assert max(most, kept(agent)) <= 512 << 10


def test_lines_without_an_end_are_shown_at_once_and_end_with_their_run(agent: LiveAgent) -> None:
    command = '["sh", "-c", "printf run; sleep 1000"]'
    agent.write("shop.toml", f"[containers.web]{SLEEPER}".replace('"sleep 1000"', command))
    agent.converge()
    process = follow(agent, "logs", "-f", "web")
    assert read_until(process, "run") == "run"
    agent.cli("restart", "web")
    agent.wait(lambda: agent.cli("logs", "web").stdout == "run\nrun", "both runs have a line")
    assert json.loads(agent.cli("logs", "--json", "--tail", "1", "web").stdout)["target"] == "shop/web"


def test_logs_of_an_app_are_merged_by_time_with_names(agent: LiveAgent) -> None:
    words = {"a": "one", "b": "two", "c": "three"}
    command = 'command = ["sh", "-c", "until [ -e /tmp/go ]; do sleep 0.02; done; echo {}; sleep 1000"]'

    def has_written(name: str, text: str) -> bool:
        return agent.cli("logs", name).stdout == text

    containers = (
        f"[containers.{name}]{SLEEPER}".replace('command = "sleep 1000"', command.format(word))
        for name, word in words.items()
    )
    agent.write("shop.toml", "".join(containers))
    agent.converge()
    for name, word in words.items():
        agent.exec(name, "touch", "/tmp/go")
        agent.wait(partial(has_written, name, f"{word}\n"), "it has written")
    assert agent.cli("logs", "shop").stdout == "shop/a  one\nshop/b  two\nshop/c  three\n"
    assert agent.cli("logs", "b", "shop/c").stdout == "shop/b  two\nshop/c  three\n"
    assert read_until(follow(agent, "logs", "-f", "shop/"), "three").strip().endswith("shop/c  three")


def test_exec_hands_on_exit_code_input_user_and_terminal(agent: LiveAgent) -> None:
    agent.write("shop.toml", f"[containers.web]{SLEEPER}")
    agent.converge()
    assert agent.cli("exec", "web", "sh", "-c", "exit 42", check=False).returncode == 42
    assert agent.cli(
        "exec", "-u", "nobody", "-w", "/tmp", "-e", "A=b", "web", "sh", "-c", "id -u; pwd; echo $A"
    ).stdout == ("65534\n/tmp\nb\n")
    environment = {**os.environ, "HOLDFAST_CONFIG": str(agent.config)}
    echoed = subprocess.run(
        [HOLDFAST, "exec", "-i", "web", "cat"],
        input="through",
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert echoed.stdout == "through"
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [HOLDFAST, "exec", "-it", "web", "sh", "-c", "tty; exit 3"],
        stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.wait(patient(20)) == 3
    assert b"/dev/" in os.read(leader, 4096)
    os.close(leader)
    os.close(follower)
    agent.cli("exec", "-d", "web", "sh", "-c", "touch /tmp/detached; exec sleep 1000")
    agent.wait(lambda: "detached" in agent.exec("web", "ls", "/tmp"), "the detached command has begun")
    agent.cli("stop", "web")
    stopped = agent.cli("exec", "web", "true", check=False)
    assert stopped.returncode not in (0, 70)
    assert "shop/web" in stopped.stderr


NOT_RUN = {
    ("nothere",): (127, "exec 'nothere': not found in PATH"),
    ("/no/such",): (127, "exec '/no/such': no such file"),
    ("/tmp/script",): (127, "exec '/tmp/script': '/tmp/script' needs '/no/interpreter', which is not there"),
    ("/etc",): (126, "exec '/etc': is a directory"),
    ("/etc/hosts",): (126, "exec '/etc/hosts': '/etc/hosts' is not executable (chmod +x)"),
    ("/tmp/text",): (126, "exec '/tmp/text': '/tmp/text' is neither a program nor a script that begins with '#!'"),
    ("-w", "/nowhere", "--", "true"): (126, "exec 'true': working directory '/nowhere': no such directory"),
}


def test_exec_of_what_can_not_be_run_is_one_line_and_the_shells_exit_code(agent: LiveAgent) -> None:
    agent.write("shop.toml", f"[containers.web]{SLEEPER}")
    agent.converge()
    agent.exec("web", "sh", "-c", "printf '#!/no/interpreter\n' > /tmp/script; echo x > /tmp/text; chmod +x /tmp/*")
    for words, (code, told) in NOT_RUN.items():
        options, argv = (words[:2], words[2:]) if words[0] == "-w" else ((), words)
        done = agent.cli("exec", *options, "web", *argv, check=False)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith(f"holdfast: {told}")
        assert done.stderr.count("\n") == 1


def test_exec_as_a_user_is_who_the_running_container_says(agent: LiveAgent) -> None:
    agent.write("shop.toml", f'[containers.web]{SLEEPER}group_add = ["3000"]\n')
    agent.converge()
    accounts = "root:x:0:0::/root:/bin/sh\njoe:x:1002:1002::/home/joe:/bin/sh\n"
    agent.exec("web", "sh", "-c", f"printf '{accounts}' > /etc/passwd; echo extra:x:2000:joe > /etc/group")
    for user in ("joe", "1002"):
        said = agent.cli("exec", "-u", user, "web", "sh", "-c", "echo $HOME; id -u; id -G").stdout.split()
        assert (said[:2], set(said[2:])) == (["/home/joe", "1002"], {"1002", "2000", "3000"})
    agent.exec("web", "sh", "-c", "rm /etc/passwd; ln -s /proc/1/root/../../../../etc/shadow /etc/passwd")
    done = agent.cli("exec", "-u", "joe", "web", "true", check=False)
    assert "not in the container's /etc/passwd" in done.stderr
    agent.exec("web", "rm", "/etc/passwd")  # who looks for what is left on the host would follow it


def test_everything_can_be_looked_at(agent: LiveAgent) -> None:
    agent.write(
        "shop.toml",
        f'[containers.web]{SLEEPER}volumes = ["data:/data"]\n[volumes.data]\n'.replace('networks = ["none"]', ""),
    )
    agent.converge()
    assert json.loads(agent.cli("inspect", "--json", "web").stdout)["instances"][0]["phase"] == "running"
    (network,) = json.loads(agent.cli("network", "list", "--json").stdout)
    assert network["id"] == "shop/default"
    assert network["subnet"] in agent.cli("network", "inspect", "shop/default").stdout
    (volume,) = json.loads(agent.cli("volume", "list", "--json").stdout)
    assert (volume["id"], volume["orphan"]) == ("shop/data", False)
    assert volume["path"] in agent.cli("volume", "inspect", "shop/data").stdout
    (image,) = json.loads(agent.cli("image", "list", "--json").stdout)
    assert image["ref"] == "busybox:1"
    refused = agent.cli("image", "remove", "busybox:1", check=False)
    assert refused.returncode != 0
    assert "shop/web" in refused.stderr
    assert agent.cli("doctor", check=False).returncode in (0, 69)
    read_until(follow(agent, "status", "--watch"), "converged")
    process = follow(agent, "events", "-f")
    agent.cli("stop", "web")
    read_until(process, "stopped by hand")
    agent.remove("shop.toml")
    agent.converge()
    agent.cli("image", "remove", "busybox:1")
    assert agent.cli("image", "list").stdout.startswith("no images")


def test_the_socket_is_for_root_and_the_group_that_agent_toml_names(
    new_agent: Callable[[Host], LiveAgent], site: Host
) -> None:
    agent = new_agent(site)
    group = grp.getgrgid(65534)
    agent.configure(more=f'group = "{group.gr_name}"')
    agent.start()
    found = (site.run_root / "agent.sock").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, group.gr_gid, 0o660)


def test_a_plugin_that_can_not_be_imported_is_shown_and_the_rest_works(
    new_agent: Callable[[Host], LiveAgent], site: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = new_agent(site)
    place = agent.home / "site"
    info = place / "broken_driver-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-driver\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[holdfast]\nbroken = broken_driver\n")
    (place / "broken_driver.py").write_text('raise RuntimeError("it was built for another world")\n')
    monkeypatch.setenv("PYTHONPATH", str(place))
    agent.start()
    agent.image("busybox:1")
    agent.write("shop.toml", f"[containers.web]{SLEEPER}")
    status = agent.converge()
    (failed,) = status["plugins"]
    assert failed["name"] == "broken"
    assert "another world" in failed["error"]
    for command in (["plugin", "list"], ["status"]):
        told = agent.cli(*command).stdout
        assert "broken" in told
        assert "another world" in told
