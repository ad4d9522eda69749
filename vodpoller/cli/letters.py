"""Stored events on the command line: the access to the journal, and the options that select events."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import click

from vodpoller.cli.configuration import config_option
from vodpoller.cli.exits import EXIT_CONFIG, EXIT_FAILURE
from vodpoller.cli.failure import fail
from vodpoller.config.model import Config
from vodpoller.errors import JournalError, UnusableJournalError
from vodpoller.journal.operator import REASONS, Filter, Letters, time_since

LETTER_ID: Final = click.IntRange(1, 2**63 - 1)
_REASONS_OF_BOTH: Final = tuple(dict.fromkeys((*REASONS["dead"], *REASONS["pending"])))


@contextmanager
def open_letters(config: Config, *, writable: bool = False) -> Iterator[Letters]:
    """Open the journal for the operator, or exit if it cannot be used.

    Args:
        config: The configuration whose `journal.path` is opened.
        writable: Whether stored events will be changed.
    """
    try:
        with Letters(config.journal.path, writable=writable) as letters:
            yield letters
    except UnusableJournalError as error:
        fail([str(error)], EXIT_CONFIG)
    except JournalError as error:
        fail([str(error)], EXIT_FAILURE)


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that select stored events, and `--config`."""
    for option in (
        click.option(
            "--pending", is_flag=True, help="Select pending events (which will be tried again) instead of dead letters."
        ),
        click.option("--task-id", help="The id of the task that the event reports."),
        click.option("--file-id", help="The id of the video that the event is about."),
        click.option(
            "--since", help="Stored at or after a time (2026-11-23, 2026-11-23T08:00) or within an age (90m, 12h, 3d)."
        ),
        click.option(
            "--reason",
            type=click.Choice(_REASONS_OF_BOTH),
            help="The reason why they are stored. The reasons after no_route need --pending.",
        ),
        click.option("--type", "event_type", help="The event type, as a pattern with * and ?."),
        click.option("--sink", help="The sink that has not accepted them."),
    ):
        command = option(command)
    return config_option(command)


def filter_of(options: Mapping[str, Any], *, ids: Sequence[int] = ()) -> Filter:
    """The filter of stored events that the options describe.

    Args:
        options: The values of `filter_options`.
        ids: The ids that were given; empty for all.

    Raises:
        click.BadParameter: The options contradict each other, or one cannot be read.
    """
    state, reason = "pending" if options["pending"] else "dead", options["reason"]
    if reason is not None and reason not in REASONS[state]:
        what, other = (
            ("pending events", "remove --pending") if options["pending"] else ("dead letters", "add --pending")
        )
        raise click.BadParameter(
            f"{what} never have the reason {reason!r}, only {', '.join(REASONS[state])} ({other})",
            param_hint="--reason",
        )
    try:
        since = time_since(options["since"], time.time()) if options["since"] else None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--since") from error
    named = {name: options[name] for name in ("sink", "event_type", "reason", "file_id", "task_id")}
    return Filter(state=state, ids=ids, since=since, **named)


def report_missing(letters: Letters, ids: Sequence[int], *, pending: bool, also_pending: bool = False) -> bool:
    """Print each id that does not exist, or exists only in the other state. Returns whether there is one.

    Args:
        letters: The journal.
        ids: The ids that were given.
        pending: Whether pending events were requested; if not, dead letters.
        also_pending: Whether a pending event also counts as found if dead letters were requested.
    """
    if not ids:
        return False
    existing = {
        state: {row.id for row in letters.stored(Filter(state=state, ids=ids))} for state in ("dead", "pending")
    }
    found = existing["pending"] if pending else existing["dead"] | (existing["pending"] if also_pending else set())
    missing = [number for number in ids if number not in found]
    for number in missing:
        if number in existing["dead"]:
            why = f"{number} is a dead letter, not a pending event (remove --pending)"
        elif number in existing["pending"]:
            why = f"{number} is a pending event, not a dead letter (add --pending)"
        else:
            why = f"the {'pending event' if pending else 'dead letter'} {number} does not exist"
            why += " (see `vodpoller deadletters list`)"
        click.echo(f"vodpoller: {why}", err=True)
    return bool(missing)
