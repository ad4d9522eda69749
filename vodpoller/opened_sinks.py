"""The sinks of a daemon: opened, with their ledger completed after a crash, and closed in time."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Final

from vodpoller.config.model import Config
from vodpoller.delivery.worker import Worker
from vodpoller.errors import ConfigError, StoppingError, StorageError, TransientError
from vodpoller.journal.contract import Journal, Portion
from vodpoller.logs import Logger
from vodpoller.process import Signals
from vodpoller.sinks.contract import Recoverable, Sink, SinkContext
from vodpoller.systemd import Notifier
from vodpoller.telemetry import Telemetry
from vodpoller.vod.refresher import Refresher, issuer_of

CLOSE_SECS: Final = 1.0
RECOVERY_SECS: Final = 120.0  # far more than a portion of recovery takes, also on a slow disk


def open_sinks(
    config: Config,
    *,
    journal: Journal,
    notifier: Notifier,
    signals: Signals,
    log: Logger,
    wall: Callable[[], float],
    refresher: Refresher | None = None,
    on_refused_token: Callable[[str], None] | None = None,
) -> dict[str, Sink[Any]]:
    """Open every sink, and enter in the ledger what its file holds.

    Args:
        config: Valid.
        journal: The open journal.
        notifier: Informed of the progress: reading a long file can take minutes.
        signals: Signals that may ask for the end meanwhile.
        log: Destination of log lines.
        wall: The clock of the sinks, in seconds since 1970.
        refresher: Has the temporary key that is used instead of the configured one, if the configuration names a role.
        on_refused_token: As in `SinkContext`.

    Raises:
        ConfigError: Some sinks cannot be opened.
        StorageError: A disk is full or failing, which may pass.
        StoppingError: A signal asked for the end. In each case no sink is left open.
    """
    sinks: dict[str, Sink[Any]] = {}
    sub_app_ids = {source.sub_app_id for source in config.sources}

    def context(name: str) -> SinkContext:
        return replace(context_of(name, config, log, refresher), wall=wall, on_refused_token=on_refused_token)

    try:
        _make_sinks(sinks, config, signals, context)
        for name, sink in sinks.items():
            if isinstance(sink, Recoverable):
                _recover(
                    name, sink, sub_app_ids=sub_app_ids, journal=journal, notifier=notifier, signals=signals, log=log
                )
    except BaseException as error:
        _close_all(sinks)
        if isinstance(error, TransientError):
            raise StorageError(str(error)) from error
        raise
    return sinks


def refresher_of(config: Config, telemetry: Telemetry, **more: Any) -> Refresher | None:
    """The refresher of the temporary key of the role that a configuration names; None if it names no role.

    Args:
        config: Valid.
        telemetry: Destination of log lines and counts.
        more: Further arguments of `Refresher`.
    """
    if config.role is None:
        return None
    provider, issuer = issuer_of(
        config.role, key=config.credentials, key_renewal=config.key_renewal, ca_file=config.api.ca_file
    )
    return Refresher(issuer, provider=provider, keys=config.issued, telemetry=telemetry, **more)


def context_of(name: str, config: Config, log: Logger, refresher: Refresher | None) -> SinkContext:
    """What a sink gets from the daemon.

    Args:
        name: The sink's name.
        config: Valid.
        log: Destination of log lines.
        refresher: As for `open_sinks`.
    """
    given = config.credentials if config.credentials().secret_id else None
    return SinkContext(log=log.bind(sink=name), credentials=refresher or given)


def _make_sinks(
    sinks: dict[str, Sink[Any]], config: Config, signals: Signals, context: Callable[[str], SinkContext]
) -> None:
    problems: list[str] = []
    for name, sink_class in config.sink_classes.items():
        end_if_stopping(signals)
        try:
            sinks[name] = sink_class(name, config.sinks[name], context(name))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def _recover(
    name: str,
    sink: Recoverable,
    *,
    sub_app_ids: Collection[int | None],
    journal: Journal,
    notifier: Notifier,
    signals: Signals,
    log: Logger,
) -> None:
    """Enter in the ledger what the sink's file holds beyond the journal's position: a crash may have come between."""
    position = journal.position(name)
    number = 0
    for portion in sink.recover(position, sub_app_ids):
        # Each portion is written at once: a process that ends in between goes on from there at its next start.
        journal.recover(name, portion)
        end_if_stopping(signals)
        position = portion.position
        number += len(portion.keys) + len(portion.content_keys)
        notifier.extend(RECOVERY_SECS)
        notifier.alive()
        if portion.read < 1:
            log.info("recovery.progress", sink=name, keys=number, percent=round(100 * portion.read, 1))
            notifier.status(f"reading what sink {name} wrote before a crash: {portion.read:.0%}")
    end = sink.position()
    if end != position:  # from the first line on, the journal must know which file the sink writes
        journal.recover(name, Portion(keys=(), position=end, read=1.0))
    if number:
        log.warning("file.recovered", sink=name, keys=number)


def end_if_stopping(signals: Signals) -> None:
    """End a start or a reload if a signal has asked for the end.

    Raises:
        StoppingError: A signal has asked for it.
    """
    if signals.is_stopping:
        raise StoppingError("a signal asked for the end before the start was complete")


def close_sinks(
    sinks: Mapping[str, Sink[Any]], workers: Mapping[str, Worker], *, ends_at: float, log: Logger
) -> list[str]:
    """Close every sink, also one with a thread that hangs: closing it ends what it has started.

    Args:
        sinks: By their names.
        workers: By the names of their sinks; `stop` was called.
        ends_at: Monotonic time, in seconds, until which it may take. The end of the process ends what is not closed by
            then.
        log: Destination of log lines.

    Returns:
        The names of the sinks that have a thread which has not ended.
    """
    closing = {}
    for name, worker in workers.items():
        if not worker.join(max(ends_at - CLOSE_SECS - time.monotonic(), 0.0)):
            log.warning("sink.stuck", sink=name)
        thread = threading.Thread(target=_close, args=(sinks[name],), name=f"close-{name}", daemon=True)
        try:
            thread.start()
            closing[name] = thread
        except RuntimeError:  # the system allows no more threads
            _close(sinks[name])
    for thread in closing.values():
        thread.join(max(ends_at - time.monotonic(), 0.0))
    for worker in workers.values():
        worker.join(max(ends_at - time.monotonic(), 0.0))  # so that events accepted last are entered in the ledger
    return [
        name
        for name, worker in workers.items()
        if not worker.join(0.0) or (name in closing and closing[name].is_alive())
    ]


def _close_all(sinks: Mapping[str, Sink[Any]]) -> None:
    for sink in sinks.values():
        _close(sink)


def _close(sink: Sink[Any]) -> None:
    try:
        sink.close()
    except Exception:
        logging.getLogger(__name__).warning("a sink could not be closed", exc_info=True)
