"""`vodpoller deadletters replay`: make stored events due, and deliver them here if no daemon runs."""

from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from vodpoller.cli.configuration import load_config
from vodpoller.cli.daemons import open_daemon
from vodpoller.cli.exits import EXIT_FAILURE, end
from vodpoller.cli.letters import LETTER_ID, filter_of, filter_options, open_letters, report_missing
from vodpoller.cli.output import make_console
from vodpoller.config.model import Config
from vodpoller.journal.operator import Filter
from vodpoller.router import Router


@click.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=LETTER_ID)
@filter_options
@click.option("--to", "target", metavar="SINK", help="Deliver them to this sink instead of their own.")
def replay(letter_ids: tuple[int, ...], config_path: Path, *, target: str | None, **options: Any) -> None:
    """Try to deliver dead letters again: those with the given ids, those that match the options, or all.

    With --pending, pending events are tried now.

    A running daemon delivers them within seconds. If no daemon runs, this command delivers them and all other stored
    events that are due. An event that fails stays pending, and an event that is rejected becomes a dead letter again,
    each with its new error. If the command is interrupted, it can be run again. Exit code 1: something could not be
    delivered.

    With --to, an event that is being delivered to its own sink at this moment may reach both sinks.
    """
    config = load_config(config_path, needs_key=False)
    if target is not None and target not in config.sinks:
        names = ", ".join(config.sinks)
        raise click.BadParameter(f"the configuration has no sink {target!r} (its sinks: {names})", param_hint="--to")
    wanted = filter_of(options, ids=letter_ids)
    marked = impossible = 0
    with open_letters(config, writable=True) as letters:
        # An id that is pending now was already replayed by a call that was interrupted.
        missing = report_missing(letters, letter_ids, pending=options["pending"], also_pending=True)
        portions = letters.replay(wanted, router=Router(config.routes), sinks=list(config.sinks), to=target)
        for done, undone in portions:
            marked, impossible = marked + done, impossible + undone
        running = letters.is_in_use()
        pending, dead = letters.count(Filter(state="pending")), letters.count(Filter())
    click.echo(f"{marked:,} to be delivered again")
    if impossible:
        why = "unreadable" if target else "unreadable, without a route, or of a sink that no longer exists"
        click.echo(f"{impossible:,} cannot be delivered: {why}" + ("" if target else " (see --to)"), err=True)
    all_done = not (missing or impossible)
    if running and marked:
        click.echo("The running daemon delivers them; `vodpoller status` shows what is left.")
    elif pending and not running:
        all_done = _deliver_here(config, pending=pending, dead=dead) and all_done
    end(0 if all_done else EXIT_FAILURE)


def _deliver_here(config: Config, *, pending: int, dead: int) -> bool:
    """Deliver the stored events that are due, without a daemon. Returns whether all were delivered."""
    daemon = open_daemon(config, quiet=True)
    with Progress(console=make_console(stderr=True)) as progress:
        task = progress.add_task("delivering", total=pending)
        all_done = daemon.run_once(progress=lambda delivered: progress.update(task, completed=delivered))
    with open_letters(config) as letters:
        rejected = letters.count(Filter()) - dead
    click.echo(f"{daemon.redelivered_events:,} delivered")
    if rejected > 0:
        click.echo(f"{rejected:,} are dead letters again: see `vodpoller deadletters list`.", err=True)
    if not all_done:
        click.echo("Some are still pending: see `vodpoller deadletters list --pending`.", err=True)
    return all_done and rejected <= 0
