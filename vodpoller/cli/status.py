"""`vodpoller status`."""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vodpoller import __version__
from vodpoller.cli.configuration import config_option, load_config
from vodpoller.cli.exits import EXIT_FAILURE
from vodpoller.cli.failure import fail
from vodpoller.cli.letters import open_letters
from vodpoller.cli.output import make_console
from vodpoller.config.lenient import read_leniently
from vodpoller.config.model import Config
from vodpoller.logs import printable
from vodpoller.status import SilentStatus, StoredStatus
from vodpoller.status_socket import ask, socket_path

STATUS_SECS: Final = 5.0  # the daemon reads its journal before it answers


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--strict", is_flag=True, help="Dead letters count as a problem, too.")
def status(config_path: Path, *, as_json: bool, strict: bool) -> None:
    """Print whether events flow and, if not, why: from the running daemon, or from the journal if no daemon runs.

    Exit code 0: all is well. 1: no daemon runs, a source cannot be pulled, a sink is down, the journal cannot be
    written, events are stored for a sink that the configuration no longer has, a temporary key cannot be renewed, or
    the last reload was refused.
    """
    # If the file cannot be used any more, a daemon may still run with its former configuration: it is asked first.
    if not config_path.exists():
        load_config(config_path, needs_key=False)  # prints the problem and exits
    answer, trouble = _ask_status(read_leniently(config_path, env=os.environ)[0].path, strict=strict)
    report = answer or _status_of_journal(load_config(config_path, needs_key=False), trouble, strict=strict)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print_status(report)
    if report["problems"]:
        sys.exit(EXIT_FAILURE)


def _ask_status(journal_path: Path, *, strict: bool) -> tuple[Mapping[str, Any] | None, str]:
    """The status that the daemon answers, or None and the reason; the reason is empty if no daemon listens."""
    path = socket_path(journal_path)
    trouble = ""
    try:
        answer = ask(path, {"command": "status", "strict": strict}, timeout_secs=STATUS_SECS)
    except PermissionError:
        fail([f"{path}: only root and the user that runs vodpoller may ask the daemon: try `sudo`"], EXIT_FAILURE)
    except (OSError, ValueError) as error:
        answer, trouble = None, str(error)
    if answer is not None:
        if "problems" in answer:
            return answer, ""
        trouble = str(answer.get("error", "its answer is not a status"))
    return None, trouble


def _status_of_journal(config: Config, trouble: str, *, strict: bool) -> Mapping[str, Any]:
    """The part of the status that is known from the journal.

    Args:
        config: The configuration whose journal is read.
        trouble: Why a daemon that listens gave no status; empty if no daemon listens.
        strict: Whether dead letters count as a problem.
    """
    with open_letters(config) as letters:
        is_in_use = letters.is_in_use()
        marks = letters.noted_times()
        stored = [StoredStatus(**asdict(found)) for found in letters.backlogs()]
    remedy = "`systemctl status vodpoller` and `journalctl -u vodpoller -e` show more"
    if trouble:
        cause = f"it runs, but does not answer with its status: {trouble}"
        remedy += "; if it hangs, or was updated since it started, restart it"
    elif is_in_use:
        cause = (
            "a process has the journal open, but does not answer: the daemon is starting or stopping, or it is a"
            " `vodpoller once` or `replay`"
        )
    else:
        cause = "no daemon runs with this journal"
        remedy = f"`systemctl start vodpoller`; if it does not keep running, {remedy}"
    return SilentStatus(
        running=is_in_use,
        cause=cause,
        remedy=remedy,
        version=__version__,
        started_at=marks.get("started"),
        last_pull_at=marks.get("pull"),
        last_confirm_at=marks.get("confirm"),
        at=time.time(),
        sinks=list(config.sinks),
        stored=stored,
        path=str(config.journal.path),
        limit_bytes=config.journal.max_bytes,
    ).as_json(strict=strict)


def _print_status(report: Mapping[str, Any]) -> None:
    console = make_console()
    for problem in report["problems"]:
        what, cause, remedy = (printable(problem[name]) for name in ("what", "cause", "remedy"))
        console.print(Text.assemble(("PROBLEM", "bold red"), f" {what}: {cause}"), soft_wrap=True)
        console.print(f"  {remedy}", soft_wrap=True)
    if report["pid"] is not None:
        console.print(f"vodpoller {report['version']} has run since {report['started_at']}, process {report['pid']}")
        _print_parts(console, report)
    else:
        console.print(f"Last start: {report['started_at'] or 'never'}; last pull: {report['last_pull_at'] or 'never'}")
    if report["stored"]:
        table = Table("sink", "state", "events", "oldest since")
        for row in report["stored"]:
            table.add_row(printable(row["sink"]) or "(none)", row["state"], f"{row['events']:,}", row["oldest_at"])
        console.print(table)
    else:
        console.print("Nothing is stored: every event that was pulled has been delivered.")
    journal = report["journal"]
    taken = (
        "" if journal["stored_bytes"] is None else f"{journal['stored_bytes']:,} of {journal['limit_bytes']:,} bytes, "
    )
    console.print(
        f"journal {printable(journal['path'])}: {taken}last confirm {journal['last_confirm_at'] or 'never'}",
        soft_wrap=True,
    )


def _print_parts(console: Console, report: Mapping[str, Any]) -> None:
    sources = Table("source", "type", "last answer", "error")
    for row in report["sources"]:
        error = printable(row["error"]) if row["error"] else ""
        next_pull = f" (next try {row['next_pull_at']})" if row["next_pull_at"] else ""
        answered_at = row["last_callback_at"] if row["type"] == "callback" else row["last_pull_at"]
        sources.add_row(printable(row["name"]), row["type"], answered_at or "never", error + next_pull)
    sinks = Table("sink", "state", "queued", "next try", "error")
    for row in report["sinks"]:
        if row["down_since"]:
            state = f"down since {row['down_since']}"
        else:
            state = f"paused until {row['paused_until']}" if row["paused_until"] else "accepts"
        queued, next_try = f"{row['queued']:,}", row["next_try_at"] or ""
        sinks.add_row(printable(row["name"]), state, queued, next_try, printable(row["error"]))
    key = report.get("credentials") or {}
    if key.get("expires_at"):
        console.print(f"key of {printable(key['role'])}, until {key['expires_at']}", soft_wrap=True)
    for table in (sources, sinks):
        for column in table.columns:
            column.overflow = "fold"
        console.print(table)
