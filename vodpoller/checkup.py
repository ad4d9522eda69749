"""`vodpoller check --connect`: everything that the daemon will need, tried without using it up."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vodpoller.config.model import Config
from vodpoller.config.tables import Source
from vodpoller.errors import (
    ConfigError,
    JournalError,
    OperatorError,
    RefusedHandlesError,
    UnusableJournalError,
    VodpollerError,
)
from vodpoller.journal.operator import Letters
from vodpoller.journal.place import problem_of_place
from vodpoller.logs import Logger
from vodpoller.sinks.contract import SinkContext
from vodpoller.vod.client import VodClient

CLOCK_TOLERANCE_SECS: Final = 60.0
IMPOSSIBLE_HANDLE: Final = "vodpoller-check"
_NO_ANSWER: Final = "VOD did not answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What came of one check.

    Args:
        what: What was looked at.
        good: Whether the daemon can work with it.
        text: What was found; if it is not good, what to do.
    """

    what: str
    good: bool
    text: str


def check_connections(config: Config, log: Logger) -> Iterator[Finding]:
    """Try key, clock and rights of each source, each sink, and the journal. Consumes no event, writes nothing.

    Args:
        config: Valid.
        log: For the client's own lines.
    """
    vod = VodClient.configured(
        # No lease runs out meanwhile, so an answer may take longer than the daemon would wait for it.
        config.api.model_copy(update={"confirm_timeout_secs": config.api.timeout_secs}),
        credentials=config.credentials,
        key_renewal=config.key_renewal,
        log=log,
    )
    try:
        for source in config.sources:
            yield _check_source(vod, source)
        yield _check_clock(vod)
    finally:
        vod.close()
    for name, sink_class in config.sink_classes.items():
        context = SinkContext(log=log.bind(sink=name))
        try:
            yield Finding(what=f"sink {name}", good=True, text=sink_class.probe(name, config.sinks[name], context))
        except ConfigError as error:
            yield Finding(what=f"sink {name}", good=False, text=str(error))
    yield _check_journal(config.journal.path)
    yield from _check_stored(config)


def _check_source(vod: VodClient, source: Source) -> Finding:
    """Confirm a handle that cannot exist: VOD says that it is wrong only if key, rights and SubAppId are right."""
    what = f"source {source.name}"
    try:
        vod.confirm(source.sub_app_id, [IMPOSSIBLE_HANDLE])
    except RefusedHandlesError as error:
        return Finding(what=what, good=True, text=f"VOD takes the key and lets it confirm{_said_in(error)}")
    except OperatorError as error:
        return Finding(what=what, good=False, text=f"{error}{_said_in(error)}")
    except VodpollerError as error:
        hint = "" if error.request_id else " (is api.endpoint right, and this machine online?)"
        return Finding(what=what, good=False, text=f"{error}{_said_in(error)}{hint}")
    return Finding(what=what, good=True, text="VOD takes the key and lets it confirm")


def _said_in(error: VodpollerError) -> str:
    return f" (RequestId {error.request_id})" if error.request_id else ""


def _check_clock(vod: VodClient) -> Finding:
    skew_secs = vod.skew_secs
    if skew_secs is None:
        why = "the answer has no Date that can be read (does a proxy take it out?)" if vod.has_answered else _NO_ANSWER
        return Finding(what="clock", good=False, text=f"not compared: {why}")
    text = f"this machine's clock is {abs(skew_secs):.0f} s {'behind' if skew_secs > 0 else 'ahead of'} VOD's"
    if abs(skew_secs) <= CLOCK_TOLERANCE_SECS:
        return Finding(what="clock", good=True, text=text)
    return Finding(
        what="clock", good=False, text=f"{text}: synchronize it (NTP). The daemon signs with VOD's time until then"
    )


def _check_journal(path: Path) -> Finding:
    if not_a_file := problem_of_place(path):
        return Finding(what="journal", good=False, text=not_a_file)
    # os.path says False if a folder on the way may not be entered, and pathlib raises.
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    is_there = folder == path.parent and os.path.lexists(path)
    problem = None
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):  # noqa: PTH112 - see above
        # SQLite keeps files of its own beside the journal, so this matters even if the journal is there.
        problem = folder
    elif is_there and (os.path.isdir(path) or not os.access(path, os.R_OK | os.W_OK)):  # noqa: PTH112 - see above
        problem = path
    if problem is None:
        return Finding(what="journal", good=True, text=f"{path} can be {'written' if is_there else 'made'}")
    return Finding(
        what="journal",
        good=False,
        text=f"{problem} cannot be written by this user: give it to the user that runs vodpoller, or set journal.path",
    )


def _check_stored(config: Config) -> Iterator[Finding]:
    """What is stored for sinks that are gone: nothing but a person brings it on. What cannot be read is skipped."""
    try:
        with Letters(config.journal.path, makes_files=False) as letters:
            backlogs = letters.backlogs()
    except UnusableJournalError as error:
        yield Finding(what="stored events", good=False, text=str(error))
        return
    except JournalError:  # there is none yet, or this user may not read it, which the line before tells
        return
    for backlog in backlogs:
        if backlog.sink and backlog.sink not in config.sinks:
            option = "--pending " if backlog.state == "pending" else ""
            what = "pending events" if backlog.state == "pending" else "dead letters"
            yield Finding(
                what="stored events",
                good=False,
                text=f"{backlog.events:,} {what} are of the sink {backlog.sink}, which the configuration no longer has:"
                f" bring it back, or `vodpoller deadletters replay {option}--sink {backlog.sink} --to SINK`, or"
                f" `vodpoller deadletters purge {option}--sink {backlog.sink}`",
            )
