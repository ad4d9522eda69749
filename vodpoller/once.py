"""`vodpoller once`: pulls and delivers in one round, and ends when nothing is left."""

import time
from collections.abc import Callable
from typing import Final

from vodpoller.batch import Batch, Source
from vodpoller.delivery.in_flight import DeliveryWait, InFlight
from vodpoller.delivery.retrier import Retrier
from vodpoller.errors import OperatorError, TransientError
from vodpoller.journal.contract import Journal
from vodpoller.logs import Logger
from vodpoller.pipeline import Pipeline
from vodpoller.process import Signals
from vodpoller.vod.client import VodClient

ONCE_TRIES: Final = 3
PROGRESS_SECS: Final = 0.1


class Once:
    """One round of pulling and delivering, in the calling thread; a signal ends it between two steps.

    Args:
        vod: The client.
        pipeline: Processes what was pulled.
        journal: Holds the stored events.
        in_flight: The table that all workers share; they are running.
        retrier: Delivers stored events that are due.
        signals: Signals that may ask for the end.
        log: Destination of log lines.
    """

    def __init__(
        self,
        *,
        vod: VodClient,
        pipeline: Pipeline,
        journal: Journal,
        in_flight: InFlight,
        retrier: Retrier,
        signals: Signals,
        log: Logger,
    ) -> None:
        self._vod = vod
        self._pipeline = pipeline
        self._journal = journal
        self._in_flight = in_flight
        self._retrier = retrier
        self._signals = signals
        self._log = log

    def pull_until_empty(self, source: Source, max_secs: float) -> bool:
        """Pull and process until the first empty answer, an error that lasts, or a signal.

        Args:
            source: The source.
            max_secs: Time after which it ends if events keep coming.

        Returns:
            Whether an empty answer came.
        """
        ends_at = time.monotonic() + max_secs
        failures = 0
        while not self._signals.any_waits() and self._journal.is_writable and time.monotonic() < ends_at:
            try:
                pull = self._vod.pull(source.name, source.sub_app_id)
            except (TransientError, OperatorError) as error:
                failures += 1
                self._log.error("pull.failed", source=source.name, **error.fields())
                if failures == ONCE_TRIES or isinstance(error, OperatorError):
                    return False
                time.sleep(failures)
                continue
            self._journal.note_time("pull")
            if not (pull.events or pull.malformed):
                return True
            self._pipeline.process(Batch.of(source, pull, time.monotonic()), DeliveryWait())
        return False

    def deliver_due(self, progress: Callable[[int], None] | None) -> None:
        """Deliver stored events until none is due and none is in flight, or a signal comes.

        Args:
            progress: Called repeatedly with the number of stored events that were delivered so far.
        """
        while not self._signals.any_waits():
            self._journal.flush()
            # Read before `run`: events in flight can hide others that are due, and may be done a moment later.
            was_idle = not len(self._in_flight)
            goes_on = self._retrier.run(PROGRESS_SECS)
            if progress is not None:
                progress(self._retrier.delivered)
            if was_idle and not goes_on:
                return
            if not goes_on:
                time.sleep(0.02)
