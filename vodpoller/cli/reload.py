"""`vodpoller reload`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from vodpoller.cli.configuration import config_option
from vodpoller.cli.exits import EXIT_CONFIG, EXIT_FAILURE
from vodpoller.cli.failure import fail
from vodpoller.config.glance import glance_at
from vodpoller.status_socket import ask, socket_of_process, socket_path

BEYOND_STOP_SECS: Final = 35.0  # for trying the new configuration and building it


@click.command()
@config_option
@click.option(
    "--pid",
    type=click.IntRange(1),
    envvar="MAINPID",  # which systemd sets for ExecReload=
    show_envvar=True,
    help="The daemon's process, to find it also if journal.path was changed.",
)
def reload(config_path: Path, *, pid: int | None) -> None:
    """Have the running daemon take its configuration anew, or say what is wrong with it.

    It then runs on with the former one. In each case it opens files and reads secrets anew.

    Exit code 0: it is done. 78: it was refused. 1: no daemon runs, or it did not answer in time.
    """
    if not pid and not config_path.exists():  # the default journal may be that of another daemon
        fail([f"{config_path}: there is no such file"], EXIT_CONFIG)
    journal, daemon = glance_at(config_path, env=os.environ)
    path = (socket_of_process(pid) if pid else None) or socket_path(journal.path)
    _show(_ask_reload(path, daemon.shutdown_secs + BEYOND_STOP_SECS))


def _ask_reload(path: Path, within_secs: float) -> Mapping[str, Any]:
    try:
        answer = ask(path, {"command": "reload"}, timeout_secs=within_secs)
    except PermissionError:
        fail([f"{path}: only root and the user that runs vodpoller may ask the daemon: try `sudo`"], EXIT_FAILURE)
    except (OSError, ValueError) as error:
        fail([f"{path}: the daemon did not say how it went: {error}; `vodpoller status` and its log do"], EXIT_FAILURE)
    if answer is None:
        fail([f"{path}: no daemon listens there (if journal.path was changed, name the daemon: --pid)"], EXIT_FAILURE)
    return answer


def _show(answer: Mapping[str, Any]) -> None:
    match answer:
        case {"result": "done", "stuck": [*stuck]} if stuck:
            click.echo(f"reloaded; the process executed itself anew, because a thread hung: {', '.join(stuck)}")
        case {"result": "done", "changed": False}:
            click.echo("the configuration is the same; files were reopened, secrets read again")
        case {"result": "done"}:
            click.echo("reloaded: the daemon runs with the new configuration")
        case {"result": "refused", "problems": [*problems]}:
            fail([*problems, "the daemon runs on with the former configuration"], EXIT_CONFIG)
        case _:
            fail(answer.get("problems") or [str(answer.get("error", answer))], EXIT_FAILURE)
