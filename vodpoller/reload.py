"""Whether a configuration may take the place of the one that runs: looked at before anything is stopped."""

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
    """Look for what speaks against a configuration. It is valid, and another than the one that runs.

    Args:
        new: The configuration.
        running: The one whose place it would take.
        log: For the lines of what is tried.
        trouble: Why the journal that runs cannot be written; empty if it can.
        of_sockets: What speaks against listening where the configuration wants callbacks to come in.

    Raises:
        ConfigError: Something does; it holds all that does.
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
    """What is stored would stay behind, unseen, if the journal were another: that is the one thing that may not be.

    Args:
        new: The configuration.
        path: The journal of the one whose place it would take.
    """
    if os.path.realpath(path) == os.path.realpath(new.journal.path):
        return
    remedy = f"`vodpoller deadletters list` and `list --pending` show them; until there are none, keep path = {path}"
    try:
        with Letters(path, makes_files=False) as letters:
            stored = sum(backlog.events for backlog in letters.backlogs())
    except JournalError as error:
        yield f"journal.path: cannot be changed: whether events are stored in {path} cannot be read: {error}"
    else:
        if stored:
            yield f"journal.path: cannot be changed while {stored:,} events are stored in {path} ({remedy})"


def _problems_of_trouble(new: Config, running: Config, trouble: str) -> Iterator[str]:
    """A journal that cannot be written cannot be opened again either, and what waits in memory would be lost."""
    if trouble and os.path.realpath(new.journal.path) == os.path.realpath(running.journal.path):
        yield f"journal.path: {running.journal.path} cannot be written: {trouble} (see `vodpoller status`)"


def _problems_of_address(new: str | None, running: str | None) -> Iterator[str]:
    """The port that is in use here is given up before it is taken again: only another one can be tried."""
    if new is None or (running is not None and port_of(new) == port_of(running)):
        return
    from vodpoller.listener.server import listen  # noqa: PLC0415 - else its packages are not needed

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
