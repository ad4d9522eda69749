"""`vodpoller reload`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from vodpoller.cli.configuration import config_option
from vodpoller.cli.exits import EXIT_CONFIG, EXIT_FAILURE
from vodpoller.cli.failure import fail
from vodpoller.config.lenient import read_leniently
from vodpoller.status_socket import ask, socket_of_process, socket_path

BEYOND_STOP_SECS: Final = 35.0  # for trying the new configuration and building it


@click.command()
@config_option
@click.option(
    "--pid",
    type=click.IntRange(1),
    envvar="MAINPID",  # which systemd sets for ExecReload=
    show_envvar=True,
    help="The process id of the daemon; finds it even if journal.path was changed.",
)
def reload(config_path: Path, *, pid: int | None) -> None:
    """Make the running daemon read its configuration again, or print what is wrong with it.

    If something is wrong, the daemon continues with the former configuration. In both cases it reopens its files and
    reads its secrets again.

    Exit code 0: the reload is done. 78: the configuration was refused. 1: no daemon runs, or it did not answer in time.
    """
    if not pid and not config_path.exists():  # the default journal may belong to another daemon
        fail([f"{config_path}: the file does not exist"], EXIT_CONFIG)
    journal, daemon = read_leniently(config_path, env=os.environ)
    path = (socket_of_process(pid) if pid else None) or socket_path(journal.path)
    _print_result(_ask_reload(path, daemon.shutdown_secs + BEYOND_STOP_SECS))


def _ask_reload(path: Path, within_secs: float) -> Mapping[str, Any]:
    try:
        answer = ask(path, {"command": "reload"}, timeout_secs=within_secs)
    except PermissionError:
        fail([f"{path}: only root and the user that runs vodpoller may ask the daemon: try `sudo`"], EXIT_FAILURE)
    except (OSError, ValueError) as error:
        fail(
            [f"{path}: the daemon did not report the result: {error}; see `vodpoller status` and the log"], EXIT_FAILURE
        )
    if answer is None:
        fail(
            [f"{path}: no daemon listens there (if journal.path was changed, give the daemon's process id: --pid)"],
            EXIT_FAILURE,
        )
    return answer


def _print_result(answer: Mapping[str, Any]) -> None:
    match answer:
        case {"result": "done", "stuck": [*stuck]} if stuck:
            click.echo(f"reloaded; the process executed itself again, because a thread hung: {', '.join(stuck)}")
        case {"result": "done", "changed": False}:
            click.echo("the configuration has not changed; files were reopened and secrets read again")
        case {"result": "done"}:
            click.echo("reloaded: the daemon now uses the new configuration")
        case {"result": "refused", "problems": [*problems]}:
            fail([*problems, "the daemon continues with the former configuration"], EXIT_CONFIG)
        case _:
            fail(answer.get("problems") or [str(answer.get("error", answer))], EXIT_FAILURE)
