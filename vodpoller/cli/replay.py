"""`vodpoller deadletters replay`: make stored events due, and deliver them here if no daemon runs."""

from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from vodpoller.cli.configuration import load_config
from vodpoller.cli.daemons import open_daemon
from vodpoller.cli.exits import EXIT_FAILURE, end
from vodpoller.cli.letters import LETTER_ID, filter_of, filter_options, open_letters, say_missing
from vodpoller.cli.output import make_console
from vodpoller.config.model import Config
from vodpoller.journal.operator import Filter
from vodpoller.router import Router


@click.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=LETTER_ID)
@filter_options
@click.option("--to", "target", metavar="SINK", help="Give them to this sink instead of their own.")
def replay(letter_ids: tuple[int, ...], config_path: Path, *, target: str | None, **options: Any) -> None:
    """Deliver dead letters after all: those named, those that the options mean, or all. With --pending: try them now.

    A running daemon delivers them within seconds. Without one this command does, together with all else that is due;
    what fails stays pending, and what is rejected is a dead letter again, each with its new error. Interrupted, it can
    be called again. Exit code 1: something could not be delivered.

    With --to, an event that is on its way to its own sink at this moment may reach both.
    """
    config = load_config(config_path, needs_key=False)
    if target is not None and target not in config.sinks:
        there_are = ", ".join(config.sinks)
        raise click.BadParameter(
            f"no sink of the configuration is {target!r} (there are: {there_are})", param_hint="--to"
        )
    wanted = filter_of(options, ids=letter_ids)
    marked = impossible = 0
    with open_letters(config, writable=True) as letters:
        # An id that is pending by now was replayed by a call that was interrupted.
        missing = say_missing(letters, letter_ids, pending=options["pending"], also_pending=True)
        portions = letters.replay(wanted, router=Router(config.routes), sinks=list(config.sinks), to=target)
        for done, undone in portions:
            marked, impossible = marked + done, impossible + undone
        running = letters.is_in_use()
        pending, dead = letters.count(Filter(state="pending")), letters.count(Filter())
    click.echo(f"{marked:,} to be delivered again")
    if impossible:
        why = "unreadable" if target else "unreadable, without a route, or of a sink that no longer exists"
        click.echo(f"{impossible:,} cannot be: {why}" + ("" if target else " (see --to)"), err=True)
    all_done = not (missing or impossible)
    if running and marked:
        click.echo("The running daemon delivers them; `vodpoller status` tells what is left.")
    elif pending and not running:
        all_done = _deliver_here(config, pending=pending, dead=dead) and all_done
    end(0 if all_done else EXIT_FAILURE)


def _deliver_here(config: Config, *, pending: int, dead: int) -> bool:
    """Deliver what is due, without a daemon. Returns whether nothing is left of it."""
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
