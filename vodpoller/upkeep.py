"""All periodic tasks: ticks of the pollers, retries, pruning, counting. The only module that uses APScheduler."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

from vodpoller.delivery.retrier import Retrier
from vodpoller.errors import StorageError, VodpollerError
from vodpoller.journal.contract import Journal
from vodpoller.poller import Poller
from vodpoller.status import StoredStatus
from vodpoller.telemetry import Gauge, Labels, Telemetry, sink_label

UPKEEP_SECS: Final = 1.0
PRUNE_SECS: Final = 5.0
PRUNE_SHARE: Final = 1 / 32  # so the whole ledger is examined every 160 s
COUNT_SECS: Final = 30.0
QUEUES_SECS: Final = 60.0
MODES_SECS: Final = 600.0
MODES_FIRST_SECS: Final = 60.0


class _Every(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """Fires at an interval, and does not make up for times that a jump of the clock has skipped.

    APScheduler's own IntervalTrigger steps through every skipped interval, one by one, if the clock is set forward: on
    a machine that boots in 1970 that takes hours.

    Args:
        secs: The interval.
    """

    def __init__(self, secs: float) -> None:
        self._interval = timedelta(seconds=secs)

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """The next time at which it fires; called by APScheduler."""
        if previous_fire_time is None:
            return now
        following = previous_fire_time + self._interval
        return following if now < following <= now + self._interval else now + self._interval


class Upkeep:
    """The periodic tasks of a daemon.

    Args:
        journal: The journal that is flushed, pruned and counted.
        retrier: Delivers stored events that are due.
        pollers: The pollers, each with the interval of its ticks, in seconds.
        sinks: Names of the configured sinks.
        telemetry: Destination of log lines.
        wall: The clock, in seconds since 1970.
        queues: By a source's name, a function that asks VOD for the number of events that wait for it; None if there is
            no listener that shows gauges.
        modes: By a source's name, a function that asks VOD how it sends the application's events.

    Attributes:
        stored: The numbers of stored events, as they were counted last.
        pushed: Names of the sources whose events VOD sends to a URL, so that none can be pulled.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        retrier: Retrier,
        pollers: Mapping[Poller, float],
        sinks: Collection[str],
        telemetry: Telemetry,
        wall: Callable[[], float],
        queues: Mapping[str, Callable[[], int]] | None = None,
        modes: Mapping[str, Callable[[], str]] | None = None,
    ) -> None:
        self._journal = journal
        self._retrier = retrier
        self._pollers = pollers
        self._sinks = sinks
        self._telemetry = telemetry.scope()
        self._wall = wall
        self._queues = queues
        self._modes = modes or {}
        self.pushed: Collection[str] = ()
        self.stored: Sequence[StoredStatus] = ()
        self._task_ended = threading.Condition()
        self._running_tasks = 0
        self._stopping = False
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(max_workers=4)},  # retries and requests to VOD may occupy one each
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )

    def start(self) -> None:
        """Start the tasks, in threads of their own; pulling begins at once."""
        logging.getLogger("apscheduler").setLevel(logging.ERROR)  # it warns about each skipped run, which is normal
        for poller, interval_secs in self._pollers.items():
            self._periodically(f"tick {poller.name}", poller.tick, interval_secs)
            poller.tick()
        self._periodically("upkeep", self._flush_and_retry, UPKEEP_SECS)
        self._periodically("prune", partial(self._journal.prune, PRUNE_SHARE), PRUNE_SECS)
        self._periodically("count", self._count, COUNT_SECS)
        if self._queues is not None:
            self._periodically("measure", self._measure, COUNT_SECS)
            asking = partial(self._count_queues, self._queues)
            self._periodically("count queues", asking, QUEUES_SECS, is_awaited=False)
        # Not at once: at the start VOD gets no requests but pulls and confirms.
        self._periodically("modes", self._ask_modes, MODES_SECS, is_awaited=False, first_after_secs=MODES_FIRST_SECS)
        self._scheduler.start()

    def run_all_now(self) -> None:
        """Run every task now: if the wall clock is set back by an hour, APScheduler would run none for an hour."""
        for job in self._scheduler.get_jobs():
            job.modify(next_run_time=datetime.now(UTC))

    def stop(self) -> None:
        """Start no further task and no further retry; `join` waits for the running tasks."""
        self._retrier.stop_claiming()
        with self._task_ended:
            self._stopping = True
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    def join(self, timeout_secs: float) -> bool:
        """Wait until the running tasks have ended.

        Returns:
            Whether all have ended.
        """
        with self._task_ended:
            return self._task_ended.wait_for(lambda: not self._running_tasks, max(timeout_secs, 0))

    def counted(self) -> list[StoredStatus]:
        """The present numbers of stored events, by sink and state.

        Raises:
            StorageError: The journal cannot be read.
        """
        now = self._wall()
        return [
            StoredStatus(sink=it.sink, state=it.state, events=it.events, oldest_at=now - it.oldest_secs)
            for it in self._journal.stored()
        ]

    def _periodically(
        self,
        name: str,
        task: Callable[[], object],
        every_secs: float,
        *,
        is_awaited: bool = True,
        first_after_secs: float = 0.0,
    ) -> None:
        """Run a task periodically. `is_awaited`: a stop waits for it; not if it only asks VOD, which may take long."""
        run = partial(self._run_task, name, task, 1 if is_awaited else 0)
        first_at = datetime.now(UTC) + timedelta(seconds=first_after_secs)
        self._scheduler.add_job(run, _Every(every_secs), id=name, next_run_time=first_at)

    def _run_task(self, name: str, task: Callable[[], object], awaited: int) -> None:
        with self._task_ended:
            if self._stopping:
                return
            self._running_tasks += awaited
        try:
            task()
        except Exception as error:  # noqa: BLE001 - it runs again at its next time
            self._telemetry.repeated("error", "task.failed", cause=f"{name} {error!r}", task=name, exc_info=error)
        finally:
            with self._task_ended:
                self._running_tasks -= awaited
                self._task_ended.notify_all()

    def _flush_and_retry(self) -> None:
        self._journal.flush()
        while self._retrier.run(UPKEEP_SECS):
            self._journal.flush()

    def _measure(self) -> None:
        self._telemetry.sample()
        try:
            dead_letters, taken_bytes = self._journal.dead_letters(), self._journal.stored_bytes()
        except StorageError:  # the journal has logged it
            return
        numbers: Counter[Labels] = Counter()
        for (sink, reason), number in dead_letters.items():
            numbers[("reason", reason), ("sink", sink_label(sink, self._sinks))] += number
        self._telemetry.set(Gauge.DEAD_LETTERS, numbers)
        self._telemetry.set(Gauge.JOURNAL_SIZE, {(): taken_bytes})

    def _count_queues(self, queues: Mapping[str, Callable[[], int]]) -> None:
        waiting: dict[Labels, int] = {}
        for source, ask in queues.items():
            if self._stopping:
                return
            with suppress(VodpollerError):  # the key may lack the right to ask: then the value is missing
                waiting[("source", source),] = ask()
        if not self._stopping:  # else the daemon that replaces this one may have set newer values already
            self._telemetry.set(Gauge.QUEUE_EVENTS, waiting)

    def _ask_modes(self) -> None:
        pushed: list[str] = []
        for source, ask in self._modes.items():
            if self._stopping:
                return
            with suppress(VodpollerError):  # as above
                if ask() == "PUSH":
                    pushed.append(source)
        self.pushed = pushed

    def _count(self) -> None:
        try:
            self.stored = self.counted()
        except StorageError:  # the journal has logged it
            return
        for found in self.stored:
            if found.state != "pending" or found.sink in self._sinks:
                continue
            self._telemetry.repeated(
                "error",
                "pending.stuck",
                cause=f"no sink {found.sink}",
                sink=found.sink,
                pending=found.events,
                hint="the configuration no longer has a sink of this name. Add it again; or move its events to another"
                f" sink, `vodpoller deadletters replay --pending --sink {found.sink} --to SINK`; or delete them,"
                f" `vodpoller deadletters purge --pending --sink {found.sink}`",
            )
