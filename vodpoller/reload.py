"""Checks whether a new configuration can replace the running one, before anything is stopped."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

from vodpoller.config.model import Config
from vodpoller.config.tables import port_of
from vodpoller.errors import ConfigError, JournalError
from vodpoller.journal.operator import Letters
from vodpoller.logs import Logger
from vodpoller.opened_sinks import context_of, refresher_of
from vodpoller.telemetry import Telemetry
from vodpoller.vod.refresher import Refresher

PROBES_SECS: Final = 20.0
PROBES_AT_ONCE: Final = 32


def check_successor(
    new: Config, running: Config, log: Logger, *, trouble: str = "", of_sockets: Iterable[str] = ()
) -> None:
    """Check that a new configuration, which is valid and differs from the running one, can be used.

    Args:
        new: The new configuration.
        running: The configuration that it would replace.
        log: Destination of the log lines of probes.
        trouble: Why the open journal cannot be written; empty if it can.
        of_sockets: Problems of the addresses at which the new configuration receives callbacks.

    Raises:
        ConfigError: It cannot be used; the error has all problems.
    """
    problems = [
        *_problems_of_trouble(new, running, trouble),
        *problems_of_journal(new, running.journal.path),
        *_problems_of_address(new.listener.address, running.listener.address),
        *of_sockets,
        *_problems_of_sinks(new, log),
    ]
    if problems:
        raise ConfigError(problems)


def problems_of_journal(new: Config, path: Path) -> Iterator[str]:
    """Another `journal.path` is a problem while events are stored in the old journal: they would be left there unseen.

    Args:
        new: The new configuration.
        path: The journal of the configuration that it would replace.
    """
    if os.path.realpath(path) == os.path.realpath(new.journal.path):
        return
    remedy = f"`vodpoller deadletters list` and `list --pending` show them; until there are none, keep path = {path}"
    try:
        with Letters(path, makes_files=False) as letters:
            stored = sum(backlog.events for backlog in letters.backlogs())
    except JournalError as error:
        yield f"journal.path: cannot be changed, since {path} cannot be read and events may be stored in it: {error}"
    else:
        if stored:
            yield f"journal.path: cannot be changed while {stored:,} events are stored in {path} ({remedy})"


def _problems_of_trouble(new: Config, running: Config, trouble: str) -> Iterator[str]:
    """A journal that cannot be written could not be opened again, and what waits in memory would be lost."""
    if trouble and os.path.realpath(new.journal.path) == os.path.realpath(running.journal.path):
        yield f"journal.path: {running.journal.path} cannot be written: {trouble} (see `vodpoller status`)"


def _problems_of_address(new: str | None, running: str | None) -> Iterator[str]:
    """Try to listen at the new address; not if only the host changes, since this process still has the port."""
    if new is None or (running is not None and port_of(new) == port_of(running)):
        return
    from vodpoller.listener.server import listen  # noqa: PLC0415 - its packages may be missing

    try:
        listen(new).close()
    except OSError as error:
        yield f"listener.address: {new} cannot be listened at: {error.strerror or error}"


def _problems_of_sinks(config: Config, log: Logger) -> Iterator[str]:
    """Try all sinks at once, for a limited time."""
    refresher = refresher_of(config, Telemetry(log))
    probes = ThreadPoolExecutor(PROBES_AT_ONCE, thread_name_prefix="probe")
    try:
        tried = {name: probes.submit(_probe, config, name, log, refresher) for name in config.sinks}
        wait(tried.values(), PROBES_SECS)
        for name, probe in tried.items():
            yield from _problems_of_probe(name, probe)
    finally:
        probes.shutdown(wait=False, cancel_futures=True)
        if refresher is not None:
            refresher.stop()


def _probe(config: Config, name: str, log: Logger, refresher: Refresher | None) -> None:
    context = context_of(name, config, log, refresher)
    config.sink_classes[name].probe(name, config.sinks[name], context)


def _problems_of_probe(name: str, probe: Future[Any]) -> Iterator[str]:
    if not probe.done():
        yield f"sinks.{name}: whether it can be reached is not known after {PROBES_SECS:g} s"
    elif error := probe.exception():
        yield from error.problems if isinstance(error, ConfigError) else [f"sinks.{name}: {str(error) or repr(error)}"]
