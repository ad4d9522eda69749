"""Checks of the journal, and of the events that are stored in it."""

import os
from collections.abc import Iterator
from pathlib import Path

from vodpoller.checkup.finding import Finding, Level
from vodpoller.config.model import Config
from vodpoller.errors import JournalError, UnusableJournalError
from vodpoller.journal.operator import Backlog, Letters
from vodpoller.journal.place import problem_of_place


def check_journal(path: Path) -> Finding:
    """Check whether the journal can be written or made."""
    if not_a_file := problem_of_place(path):
        return Finding(what="journal", level=Level.PROBLEM, text=not_a_file)
    # os.path returns False if a parent folder may not be entered; pathlib raises.
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    is_there = folder == path.parent and os.path.lexists(path)
    problem = None
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):  # noqa: PTH112 - see above
        # SQLite keeps files of its own beside the journal, so this matters even if the journal is there.
        problem = folder
    elif is_there and (os.path.isdir(path) or not os.access(path, os.R_OK | os.W_OK)):  # noqa: PTH112 - see above
        problem = path
    if problem is None:
        return Finding(what="journal", level=Level.GOOD, text=f"{path} can be {'written' if is_there else 'made'}")
    return Finding(
        what="journal",
        level=Level.PROBLEM,
        text=f"{problem} cannot be written by this user",
        remedy="make the user that runs vodpoller its owner, or set journal.path",
    )


def check_stored(config: Config) -> Iterator[Finding]:
    """Find events that are stored for removed sinks: only a person can decide what happens to them.

    A journal that does not exist or may not be read is skipped.
    """
    try:
        with Letters(config.journal.path, makes_files=False) as letters:
            backlogs = letters.backlogs()
    except UnusableJournalError as error:
        yield Finding(what="stored events", level=Level.PROBLEM, text=str(error))
        return
    except JournalError:  # it does not exist yet, or this user may not read it, which `check_journal` reports
        return
    for backlog in backlogs:
        if backlog.sink and backlog.sink not in config.sinks:
            yield _of_removed_sink(backlog)


def _of_removed_sink(backlog: Backlog) -> Finding:
    is_pending = backlog.state == "pending"
    option = "--pending " if is_pending else ""
    what = "pending events" if is_pending else "dead letters"
    return Finding(
        what="stored events",
        level=Level.PROBLEM if is_pending else Level.WARNING,
        text=f"{backlog.events:,} {what} are stored for the sink {backlog.sink}, which the configuration no longer has",
        remedy=f"add the sink again, or `vodpoller deadletters replay {option}--sink {backlog.sink} --to SINK`, or"
        f" `vodpoller deadletters purge {option}--sink {backlog.sink}`",
    )
