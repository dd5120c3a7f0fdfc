"""agent, shutdown: what systemd runs."""

from __future__ import annotations

import click

from holdfast.cli import render
from holdfast.cli.command import command, config_path, settings
from holdfast.errors import TryAgain


@command("agent")
def agent() -> int:
    """Run the agent in the foreground.

    SIGTERM and SIGINT end it and leave the containers running. SIGHUP makes it read agent.toml again.
    """
    from holdfast.cli.log import log_to_stderr
    from holdfast.daemon.agent import run_agent

    log_to_stderr()
    return run_agent(config_path())


@command("shutdown")
@click.option("--now", is_flag=True, help="Do not ask systemd whether the host is shutting down.")
def shutdown(now: bool) -> int:
    """Stop all containers because the host is shutting down.

    Each gets its own stop signal and grace period, dependents first, all within shutdown_timeout of agent.toml. After
    the next boot they run again, except finished jobs, containers with restart = "no" and held ones. Does nothing
    unless systemd is shutting the host down, or --now is given. The agent must not be running.
    """
    from holdfast.cli.log import log_to_stderr
    from holdfast.daemon.once import shut_down

    if not now and not host_goes_down():
        render.echo("the host is not shutting down: nothing is stopped")
        return 0
    log_to_stderr()
    failed = shut_down(settings())
    for line in failed:
        render.echo(f"holdfast: {line}", err=True)
    return TryAgain.exit_code if failed else 0


def host_goes_down() -> bool:
    """Whether systemd is on its way to shutdown.target, as at a reboot, a power-off or a kexec (systemctl(1))."""
    import subprocess

    try:
        asked = subprocess.run(
            ["systemctl", "is-system-running"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return False
    return asked.stdout.strip() == "stopping"
