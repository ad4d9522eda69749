"""All that one configuration describes: built, started, observed, and stopped in order."""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from vodpoller import __version__
from vodpoller.batch import Confirms
from vodpoller.clock import SteadyClock
from vodpoller.config.model import Config
from vodpoller.config.tables import Source
from vodpoller.delivery.in_flight import InFlight
from vodpoller.delivery.retrier import Retrier
from vodpoller.delivery.worker import Worker
from vodpoller.errors import StorageError
from vodpoller.journal.contract import Journal
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.liveness import Liveness
from vodpoller.once import Once
from vodpoller.opened_sinks import close_sinks, end_if_stopping, open_sinks, refresher_of
from vodpoller.pipeline import Pipeline
from vodpoller.poller import Poller
from vodpoller.process import Signals
from vodpoller.router import Router
from vodpoller.sinks.contract import Sink
from vodpoller.status import CredentialsStatus, JournalStatus, SourceStatus, Status, StoredStatus
from vodpoller.systemd import Notifier
from vodpoller.telemetry import Count, Telemetry
from vodpoller.upkeep import Upkeep
from vodpoller.vod.client import VodClient
from vodpoller.vod.confirmer import Confirmer
from vodpoller.vod.refresher import Refresher

if TYPE_CHECKING:
    from vodpoller.callback.receiver import Receiver

OVERDUE_SECS: Final = 30.0
STORE_SECS: Final = 5.0  # before the end of a stop: then waits for sinks end, and what they lack is stored
CONFIRM_SECS: Final = 2.0  # before the end of a stop: then waits for confirms end
LAST_CHANCE_SECS: Final = 0.2


class Intake(Protocol):
    """A part that takes in events: it pulls or receives them."""

    def stop(self) -> None:
        """Take in no more events."""

    def end_waits(self) -> None:
        """End all waits for sinks: what they have not accepted is stored."""

    def join(self, timeout_secs: float) -> bool:
        """Wait until all that was taken in is processed. Returns whether it is."""


class Daemon:
    """All that one configuration describes, open and ready to run.

    Args:
        config: Valid.
        telemetry: Destination of log lines and counts.
        notifier: The service manager, if there is one.
        signals: The signals that ask for the end, maybe before the daemon is open; None for its own, caught when it
            runs.
        clock: The clock of the process, in seconds since 1970; None for one of its own.
        sockets: The sockets that listen for callbacks, by address; they stay open when the daemon ends.

    Raises:
        ConfigError: A sink cannot be opened.
        JournalError: The journal cannot be opened.
        StorageError: A disk is full or failing, which may pass.
        StoppingError: A signal asked for the end meanwhile. Everything that was opened is closed.
    """

    def __init__(
        self,
        config: Config,
        *,
        telemetry: Telemetry,
        notifier: Notifier,
        signals: Signals | None = None,
        clock: SteadyClock | None = None,
        sockets: Mapping[str, socket.socket] | None = None,
    ) -> None:
        self._config = config
        self._log = log = telemetry.log
        self._telemetry = telemetry
        self._scope = telemetry.scope()
        self._notifier = notifier
        self._liveness = Liveness()
        self._signals = signals or Signals()
        self._clock = clock or SteadyClock()
        self._started_at = self._clock()
        self._journal = self._new_journal()
        try:
            self._refresher = self._new_refresher()
            self._sinks = open_sinks(
                config,
                journal=self._journal,
                notifier=notifier,
                signals=self._signals,
                log=log,
                wall=self._clock,
                refresher=self._refresher,
                on_refused_token=self._on_refused_token(),
            )
            end_if_stopping(self._signals)
        except BaseException:
            self._journal.close()
            raise
        self._in_flight = InFlight()
        self._workers = {name: self._worker(name, sink) for name, sink in self._sinks.items()}
        self._vod = self._new_client()
        self._confirmer = Confirmer(
            vod=self._vod,
            telemetry=telemetry,
            liveness=self._liveness,
            reserve_secs=config.api.confirm_reserve_secs,
        )
        self._pipeline = self._new_pipeline(self._confirmer, config.api.confirm_reserve_secs)
        self._pollers = [self._poller(source) for source in config.pulled]
        self._receiver = self._new_receiver(sockets or {}) if config.callbacks and sockets else None
        self._retrier = self._new_retrier()
        self._upkeep = self._new_upkeep()

    # --- building -----------------------------------------------------------------------------------------------------

    def _new_journal(self) -> Journal:
        return SqliteJournal(
            self._config.journal.path,
            max_bytes=self._config.journal.max_bytes,
            ledger_days=self._config.journal.ledger_days,
            telemetry=self._telemetry,
            wall=self._clock,
        )

    def _new_refresher(self) -> Refresher | None:
        return refresher_of(
            self._config,
            self._telemetry,
            on_operator_error=self._reread_credentials,
            on_recovered=self._end_back_offs,
            liveness=self._liveness,
            wall=self._clock,
        )

    def _on_refused_token(self) -> Callable[[str], None] | None:
        if self._refresher is not None:
            return self._refresher.refused
        return (lambda _token: self._reread_credentials()) if self._config.credentials.token is not None else None

    def _new_client(self) -> VodClient:
        return VodClient.configured(
            self._config.api,
            credentials=self._refresher or self._config.credentials,
            key_renewal=self._config.key_renewal,
            on_refused_token=self._refresher.refused if self._refresher else None,
            log=self._log,
        )

    def _new_upkeep(self) -> Upkeep:
        intervals = (source.interval_secs for source in self._config.pulled)
        return Upkeep(
            journal=self._journal,
            retrier=self._retrier,
            pollers=dict(zip(self._pollers, intervals, strict=True)),
            sinks=self._workers,
            telemetry=self._telemetry,
            wall=self._clock,
            queues=self._queues() if self._config.listener.address else None,
            modes={it.name: partial(self._mode, it.sub_app_id) for it in self._config.pulled},
        )

    def _worker(self, name: str, sink: Sink[Any]) -> Worker:
        settings = self._config.sinks[name]
        return Worker(
            name=name,
            sink=sink,
            ledger=self._journal,
            in_flight=self._in_flight,
            queue_max_events=settings.queue_max_events,
            breaker_failures=settings.breaker_failures,
            telemetry=self._telemetry,
            liveness=self._liveness,
            wall=self._clock,
        )

    def _new_retrier(self) -> Retrier:
        return Retrier(
            journal=self._journal,
            workers=self._workers,
            in_flight=self._in_flight,
            give_up_after_secs={name: sink.give_up_after_secs for name, sink in self._config.sinks.items()},
            telemetry=self._telemetry,
        )

    def _new_pipeline(self, confirmer: Confirms, reserve_secs: float) -> Pipeline:
        return Pipeline(
            router=Router(self._config.routes),
            workers=self._workers,
            in_flight=self._in_flight,
            journal=self._journal,
            confirmer=confirmer,
            confirm_reserve_secs=reserve_secs,
            requests_per_sec=self._config.api.requests_per_sec,
            telemetry=self._telemetry,
            wall=self._clock,
        )

    def _poller(self, source: Source) -> Poller:
        return Poller(
            source,
            vod=self._vod,
            pipeline=self._pipeline,
            journal=self._journal,
            may_pull=lambda: self._journal.is_writable,
            on_operator_error=self._reread_credentials,
            cycle_secs=2 * self._config.api.timeout_secs + self._config.api.lease_secs,
            telemetry=self._telemetry,
            liveness=self._liveness,
            wall=self._clock,
        )

    def _new_receiver(self, sockets: Mapping[str, socket.socket]) -> "Receiver":
        from vodpoller.callback.receiver import RESERVE_SECS, Answers, Receiver  # noqa: PLC0415 - h11 may be missing

        answers = Answers()
        return Receiver(
            self._config.callbacks,
            sockets,
            pipeline=self._new_pipeline(answers, RESERVE_SECS),
            answers=answers,
            telemetry=self._telemetry,
            liveness=self._liveness,
            wall=self._clock,
        )

    def _mode(self, sub_app_id: int | None) -> str:
        return self._vod.event_config(sub_app_id).mode

    def _queues(self) -> Mapping[str, Callable[[], int]]:
        return {it.name: partial(self._vod.waiting_events, it.sub_app_id) for it in self._config.pulled}

    # --- running ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to pull and to deliver, in threads."""
        self._warn()
        with suppress(StorageError):  # the journal has logged it
            self._journal.mark_removed(self._workers)
        if self._refresher is not None:
            self._refresher.start()
        for worker in self._workers.values():
            worker.start()
        self._started_at = self._clock()
        self._upkeep.start()
        if self._receiver is not None:
            self._receiver.start()
        self._log.info(
            "daemon.started",
            sources=[source.name for source in self._config.sources],
            sinks=list(self._workers),
            endpoint=self._config.api.endpoint,
        )

    def run_once(self, *, max_secs: float = 0.0, progress: Callable[[int], None] | None = None) -> bool:
        """Pull until the first empty answer, deliver what is due, and end.

        Args:
            max_secs: Maximum time to pull from each source, since no answer is empty if events keep coming. With 0
                nothing is pulled: only what is stored and due is delivered.
            progress: Called repeatedly with the number of stored events that were delivered so far.

        Returns:
            Whether nothing was left: no pull failed, VOD has nothing to deliver again, nothing is pending.
        """
        self._signals.catch()
        if max_secs:
            self._warn()
        if self._refresher is not None:
            self._refresher.start()
        for worker in self._workers.values():
            worker.start()
        once = Once(
            vod=self._vod,
            pipeline=self._pipeline,
            journal=self._journal,
            in_flight=self._in_flight,
            retrier=self._retrier,
            signals=self._signals,
            log=self._log,
        )
        drained = [once.pull_until_empty(source, max_secs) for source in self._config.pulled if max_secs]
        once.deliver_due(progress)
        try:
            pending = sum(number for (_, state), number in self.counts().items() if state == "pending")
        except StorageError:  # the journal has logged it; the number of pending events is unknown
            pending = -1
        self._notifier.stopping()
        self.stop()
        self._log.info("daemon.stopped", events=self.settled_events)
        return all(drained) and not self._pipeline.unconfirmed_events and not pending

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Stored rows by (sink, "pending" or "dead").

        Raises:
            StorageError: The journal cannot be read.
        """
        return self._journal.counts()

    @property
    def settled_events(self) -> int:
        """Number of pulled events that were settled so far."""
        return self._telemetry.total(Count.EVENTS_SETTLED)

    @property
    def redelivered_events(self) -> int:
        """Number of stored events that were delivered so far."""
        return self._retrier.delivered

    def _warn(self) -> None:
        for warning in self._config.warnings:
            self._log.warning("config.warning", message=warning)

    def overdue(self) -> Mapping[str, float]:
        """The steps whose deadline passed more than `OVERDUE_SECS` ago, with the seconds since the deadline."""
        return self._liveness.overdue(OVERDUE_SECS)

    def is_alive(self) -> bool:
        """Whether no thread is overdue; logs each one that is."""
        overdue = self.overdue()
        for step, secs in overdue.items():
            self._scope.repeated("error", "thread.overdue", cause=step, step=step, overdue_secs=round(secs, 1))
        return not overdue

    def note_times(self) -> None:
        """Record the times of the last pull and confirm; `vodpoller status` shows them if no daemon runs."""
        last_pull_at = max((poller.last_pull_at for poller in self._pollers), default=0.0)
        for name, at in (("pull", last_pull_at), ("confirm", self._pipeline.last_confirm_at)):
            if at:
                self._journal.note_time(name, self._clock() - at)

    def shift(self, step_secs: float) -> None:
        """Move stored times and schedules, so that no age or delay changes by a jump of the wall clock.

        Args:
            step_secs: The step by which it was set, in seconds.
        """
        self._started_at += step_secs
        self._journal.shift(step_secs)
        self._upkeep.run_all_now()

    # --- status -------------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """The present status. It writes to the journal, to see whether that works, and so waits for it."""
        journal = self._journal.status()
        try:
            stored: Sequence[StoredStatus] = self._upkeep.counted()
        except StorageError as error:
            stored = ()
            journal = replace(journal, writable=False, error=journal.error or str(error))
        return self._snapshot(stored, replace(journal, last_confirm_at=self._pipeline.last_confirm_at or None))

    def known_status(self) -> Status:
        """The same from what is already known: it does not wait for a disk that hangs."""
        trouble = self._journal.trouble
        journal = JournalStatus(
            path=str(self._config.journal.path),
            writable=not trouble,
            error=trouble,
            limit_bytes=self._config.journal.max_bytes,
        )
        return self._snapshot(self._upkeep.stored, journal)

    @property
    def clock_offset_secs(self) -> float | None:
        """Seconds by which VOD's clock is ahead of this machine's; None if no answer has shown it yet."""
        return self._vod.skew_secs

    def _snapshot(self, stored: Sequence[StoredStatus], journal: JournalStatus) -> Status:
        return Status(
            pid=os.getpid(),
            version=__version__,
            started_at=self._started_at,
            at=self._clock(),
            settled_events=self.settled_events,
            sources=self._sources(),
            sinks=[worker.status() for worker in self._workers.values()],
            stored=stored,
            journal=journal,
            credentials=self._refresher.status() if self._refresher else CredentialsStatus(),
        )

    def _sources(self) -> list[SourceStatus]:
        """The status of all sources, in the configuration's order."""
        found = [replace(it.status(), is_pushed=it.name in self._upkeep.pushed) for it in self._pollers]
        if self._receiver is not None:
            found += self._receiver.status()
        order = {source.name: at for at, source in enumerate(self._config.sources)}
        return sorted(found, key=lambda it: order[it.name])

    # --- what an operator may have changed ---------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read secrets and certificates again, open files again, end back-offs."""
        self._reread_credentials()
        for table in (*self._config.callbacks, *self._config.sinks.values(), self._config.listener):
            for secret in table.secrets():
                self._reread(secret.reread)
        of_role = [("credentials", self._refresher.reopen)] if self._refresher else []
        reopened = [("api", self._vod.reopen), *of_role, *((name, sink.reopen) for name, sink in self._sinks.items())]
        for name, reopen in reopened:
            try:
                reopen()
            except Exception as error:  # noqa: BLE001 - a sink that cannot reopen fails at its next delivery
                task = f"reopen {name}"
                self._scope.repeated("error", "task.failed", cause=task, task=task, exc_info=error)
        if self._refresher is not None:
            self._refresher.wake()
        for poller in self._pollers:
            poller.wake()

    def _end_back_offs(self) -> None:
        for poller in self._pollers:
            poller.end_back_off()

    def _reread_credentials(self) -> None:
        self._reread(self._config.credentials.reread)

    def _reread(self, reread: Callable[[], None]) -> None:
        try:
            reread()
        except (OSError, UnicodeDecodeError) as error:
            self._scope.repeated("warning", "secret.unreadable", cause=str(error), error_message=str(error))

    # --- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> list[str]:
        """Settle what was pulled, close what is open, within `shutdown_secs`, also if a thread hangs.

        Returns:
            The parts that have a thread that has not ended: what such a thread uses is not closed.
        """
        ends_at = time.monotonic() + self._config.daemon.shutdown_secs
        self._upkeep.stop()
        self._vod.stop_pulling()
        ended = self._stop_intakes(ends_at)
        for worker in self._workers.values():
            worker.stop()
        stuck = [name for name, has_ended in ended.items() if not has_ended]
        stuck_sinks = close_sinks(self._sinks, self._workers, ends_at=ends_at, log=self._log)
        self._retrier.end()
        if not self._upkeep.join(ends_at - time.monotonic()):
            stuck.append("upkeep")
        if stuck:  # a thread that hangs may still use the journal: it stays open, but waiting writes must not be lost
            flushing = threading.Thread(target=self._write_last, name="flush", daemon=True)
            flushing.start()
            flushing.join(max(ends_at - time.monotonic(), LAST_CHANCE_SECS))
        else:
            self.note_times()
            self._retrier.stop()
            self._journal.close()
        if self._refresher is not None:
            self._refresher.stop()
        self._vod.close()
        return [*stuck, *(f"sink {name}" for name in stuck_sinks)]

    def _stop_intakes(self, ends_at: float) -> Mapping[str, bool]:
        """Take in no more events, and process those that were taken in.

        Args:
            ends_at: Monotonic time at which the stop ends, in seconds.

        Returns:
            By the name of each intake, whether all its threads have ended.
        """
        intakes: dict[str, Intake] = {f"source {poller.name}": poller for poller in self._pollers}
        if self._receiver is not None:
            intakes["callbacks"] = self._receiver

        def joined(until: float) -> dict[str, bool]:
            return {name: intake.join(until - time.monotonic()) for name, intake in intakes.items()}

        for intake in intakes.values():
            intake.stop()
        ended = joined(ends_at - STORE_SECS)
        if not all(ended.values()):
            for intake in intakes.values():
                intake.end_waits()
            ended = joined(ends_at - CONFIRM_SECS)
        if not all(ended.values()):
            self._confirmer.stop(ends_at)
            ended = joined(ends_at - 1)
        if self._receiver is not None:
            self._receiver.close()
            # A connection that is still open is not a reason to wait on; a thread is.
            ended["callbacks"] = self._receiver.join(LAST_CHANCE_SECS)
        return ended

    def _write_last(self) -> None:
        self._retrier.stop()
        self._journal.flush()
