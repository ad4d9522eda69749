"""`vodpoller deadletters`: list, show, export and purge stored events; `replay` has a module of its own."""

import json
import sys
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import click
from rich.table import Table

from vodpoller.cli.configuration import config_option, load_config
from vodpoller.cli.exits import EXIT_FAILURE
from vodpoller.cli.failure import fail
from vodpoller.cli.lazy import LazyCommand, LazyGroup
from vodpoller.cli.letters import LETTER_ID, filter_of, filter_options, open_letters, report_missing
from vodpoller.cli.output import iso_time, make_console
from vodpoller.journal.operator import Filter, StoredEvent, as_json_value
from vodpoller.logs import printable

SHOWN_CHARS: Final = 80


@click.group(cls=LazyGroup)
def deadletters() -> None:
    """List, show, export, replay or purge stored events: dead letters, which wait for a person, or pending ones."""


deadletters.add_command(
    LazyCommand(
        "replay",
        "vodpoller.cli.replay:replay",
        "Try to deliver dead letters again: those with the given ids, those that match the options, or all.",
    )
)


@deadletters.command("list")
@filter_options
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="Maximum number of rows in the table."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line, without a limit.")
def list_letters(config_path: Path, *, limit: int, as_json: bool, **options: Any) -> None:
    """List dead letters, the oldest first."""
    wanted = filter_of(options)
    with open_letters(load_config(config_path, needs_key=False)) as letters:
        if as_json:
            for row in letters.stored(wanted):
                click.echo(json.dumps(_as_dict(row)))
            return
        _print_letters(list(letters.stored(wanted, limit=limit)), letters.count(wanted), pending=options["pending"])


def _print_letters(rows: Sequence[StoredEvent], total: int, *, pending: bool) -> None:
    console = make_console()
    table = Table()
    folded = ("event type", "file id\ntask id", "error")
    since = "since\nnext try" if pending else "since"
    for name in ("id", since, "sink", "event type", "file id\ntask id", "reason", "tries", "error"):
        # On a narrow terminal these columns wrap, so that no text is cut off.
        table.add_column(name, no_wrap=name not in folded, overflow="fold")
    for row in rows:
        error = row.error if len(row.error) <= SHOWN_CHARS else row.error[: SHOWN_CHARS - 1] + "…"
        times = [row.stored_at] if row.due_at is None else [row.stored_at, row.due_at]
        table.add_row(
            str(row.id),
            "\n".join(map(iso_time, times)),
            printable(row.sink) or "(none)",
            printable(row.event_type) or "(none)",
            "\n".join(printable(number) for number in (row.file_id, row.task_id) if number),
            printable(row.reason),
            str(row.attempts),
            printable(error),
        )
    if rows:
        console.print(table)
    console.print(f"{total:,} in all" + (f", {len(rows):,} shown (--limit)" if len(rows) < total else ""))


@deadletters.command()
@click.argument("letter_id", metavar="ID", type=LETTER_ID)
@config_option
@click.option("--pending", is_flag=True, help="Only if the event is pending (will be tried again).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the body as a string.")
def show(letter_id: int, config_path: Path, *, pending: bool, as_json: bool) -> None:
    """Show one stored event with its body. Characters that a terminal cannot print are written as JSON escapes."""
    with open_letters(load_config(config_path, needs_key=False)) as letters:
        wanted = [Filter(ids=[letter_id], state=state) for state in ("pending", "dead")[: 1 if pending else 2]]
        found = next((pair for which in wanted for pair in letters.with_bodies(which)), None)
    if found is None:
        what = "pending event" if pending else "stored event"
        fail([f"the {what} {letter_id} does not exist (see `vodpoller deadletters list`)"], EXIT_FAILURE)
    row, body = found
    text = body.decode(errors="replace")
    if as_json:
        click.echo(json.dumps({**_as_dict(row), "body": text}))
        return
    for name, value in _as_dict(row).items():
        click.echo(f"{name + ':':12} {'' if value is None else printable(str(value))}")
    click.echo()
    for line in text.split("\n"):
        click.echo(printable(line))


@deadletters.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=LETTER_ID)
@filter_options
def export(letter_ids: tuple[int, ...], config_path: Path, **options: Any) -> None:
    """Print dead letters with their bodies: those with the given ids, those that match the options, or all.

    The output has one JSON object per line. A body that is JSON is the member `body`, unchanged, with every digit. A
    body that is not JSON is the member `body_base64`, in base64.
    """
    with open_letters(load_config(config_path, needs_key=False)) as letters:
        for row, body in letters.with_bodies(filter_of(options, ids=letter_ids)):
            known = json.dumps(_as_dict(row))[:-1]
            value = as_json_value(body)
            member = f'"body_base64": "{b64encode(body).decode()}"' if value is None else f'"body": {value}'
            click.echo(f"{known}, {member}}}")
        missing = report_missing(letters, letter_ids, pending=options["pending"])
    if missing:
        sys.exit(EXIT_FAILURE)


@deadletters.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=LETTER_ID)
@filter_options
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def purge(letter_ids: tuple[int, ...], config_path: Path, *, yes: bool, **options: Any) -> None:
    """Delete dead letters permanently: those with the given ids, those that match the options, or all.

    With --pending, an event that is being delivered at this moment may still reach its sink.
    """
    wanted = filter_of(options, ids=letter_ids)
    with open_letters(load_config(config_path, needs_key=False), writable=True) as letters:
        missing = report_missing(letters, letter_ids, pending=options["pending"])
        # Events that are stored while the question waits for an answer are not deleted.
        wanted = replace(wanted, last_id=letters.last_id())
        number = letters.count(wanted)
        if number and not yes:
            what = "pending events" if options["pending"] else "dead letters"
            click.confirm(f"Delete {number:,} {what} permanently?", abort=True)
        deleted = sum(letters.purge(wanted))
    click.echo(f"{deleted:,} deleted")
    if missing:
        sys.exit(EXIT_FAILURE)


def _as_dict(row: StoredEvent) -> dict[str, Any]:
    due_at = None if row.due_at is None else iso_time(row.due_at)
    return {**asdict(row), "stored_at": iso_time(row.stored_at), "due_at": due_at}
