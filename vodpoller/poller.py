"""Pulling: decides when to pull, and the number of outstanding pulls, with pullers and their permits."""

import threading
import time
from collections.abc import Callable
from math import inf
from typing import Final, Protocol

from vodpoller.backoff import Backoff
from vodpoller.batch import Batch
from vodpoller.batch import Source as PulledSource
from vodpoller.delivery.in_flight import DeliveryWait
from vodpoller.errors import (
    NoKeyError,
    OperatorError,
    StoppingError,
    ThrottledError,
    TransientError,
    VodpollerError,
)
from vodpoller.journal.contract import Pulled
from vodpoller.liveness import Liveness
from vodpoller.pipeline import Pipeline
from vodpoller.status import PullError, SourceStatus
from vodpoller.telemetry import Count, Telemetry
from vodpoller.vod.answers import Pull, pull_error_code

HUNG_SECS: Final = 1.0
FULL_EVENTS: Final = 16
EMPTY_PACE_SECS: Final = 1.0
FIRST_RETRY_SECS: Final = 0.1
PAUSE_CHECK_SECS: Final = 0.5
FOREVER_SECS: Final = 3600.0
LASTING_FAILURES: Final = 3


class Source(PulledSource, Protocol):
    """What a poller reads of a configured source; see the table of keys."""

    @property
    def long_poll(self) -> bool:
        """As in the configuration."""

    @property
    def max_concurrent_pulls(self) -> int:
        """As in the configuration."""


class PullsEvents(Protocol):
    """The part of the VOD client that pulls."""

    def pull(self, source: str, sub_app_id: int | None) -> Pull:
        """One signed PullEvents request; see `vod.VodClient.pull`."""


class RemembersPulls(Protocol):
    """The part of the journal that records from pulls what VOD may deliver again."""

    def answered_empty(self, pulled: Pulled) -> None:
        """A pull brought nothing; see `journal.contract.Journal.answered_empty`."""

    def answer_lost(self, source: str, *, sent_ago_secs: float) -> None:
        """A pull has just failed or was cut off; see `journal.contract.Journal.answer_lost`."""


class _Quickest:
    """Distinguishes answers that came at once from answers for which VOD waited until there was an event.

    VOD reports neither the number of events in the queue nor how long it held a request. So the time of the quickest
    answer of the last minutes is taken as the round-trip time.

    Args:
        monotonic: The clock, in seconds.
    """

    _WINDOW_SECS = 300.0

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._since = monotonic()
        self._before = self._now = inf

    def is_slow(self, took_secs: float) -> bool:
        """Whether an answer with events took clearly longer than the quickest one."""
        if self._monotonic() - self._since >= self._WINDOW_SECS:
            self._since, self._before, self._now = self._monotonic(), self._now, inf
        self._now = min(self._now, took_secs)
        return took_secs > 1.5 * min(self._now, self._before) + 0.02


class Poller:
    """Keeps one pull outstanding at a source, and several while there is a backlog.

    A puller is a thread that pulls and processes batches. Each pull needs a permit; while the queue is empty, there is
    one permit. A puller whose answer has events passes its permit on before it delivers. It adds a permit if the answer
    was full or came at once, since then there are probably more events. A permit ends with an answer that is empty or
    for which VOD waited, unless it is the last permit.

    Args:
        source: The source.
        vod: The client.
        pipeline: Processes what was pulled.
        journal: Records which pulls were empty, and which failed.
        may_pull: Whether events can be stored at the moment.
        on_operator_error: Called after a pull that failed for a reason that only a person can remove: it reads the
            credentials again.
        cycle_secs: Time limit of a pull with the processing of its batch; after that its puller is overdue.
        telemetry: Destination of log lines and counts.
        liveness: Records what each puller is doing.
        monotonic: The clock, in seconds.
        wall: The clock of `last_pull_at`, in seconds since 1970.
        wait: Waits on a condition, whose lock is held, for at most this number of seconds; used for back-offs.

    Attributes:
        last_pull_at: When VOD last answered a pull, in seconds since 1970; 0 if it never did.
    """

    _TRANSIENT = Backoff(first_secs=2.0, max_secs=60.0)
    _OPERATOR = Backoff(first_secs=4.0, max_secs=60.0)

    def __init__(
        self,
        source: Source,
        *,
        vod: PullsEvents,
        pipeline: Pipeline,
        journal: RemembersPulls,
        may_pull: Callable[[], bool],
        on_operator_error: Callable[[], None],
        cycle_secs: float,
        telemetry: Telemetry,
        liveness: Liveness,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        wait: Callable[[threading.Condition, float], object] = threading.Condition.wait,
    ) -> None:
        self._source = source
        self._vod = vod
        self._pipeline = pipeline
        self._journal = journal
        self._may_pull = may_pull
        self._on_operator_error = on_operator_error
        self._cycle_secs = cycle_secs
        self._telemetry = telemetry.scope()
        self._liveness = liveness
        self._monotonic = monotonic
        self._wall = wall
        self._wait = wait
        self._lock = threading.Lock()
        self._permit_granted = threading.Condition(self._lock)
        self._pause_over = threading.Condition(self._lock)
        self._pullers: list[threading.Thread] = []
        self._waits: dict[DeliveryWait, None] = {}
        self._parked = 0
        self._permits = 0
        self._pulling = 0
        self._quickest = _Quickest(monotonic)
        self._not_before = 0.0
        self._failures = 0
        self._failed_pulls = 0
        self._has_logged = False
        self._problem: VodpollerError | None = None
        self._last_error: PullError | None = None
        self._failing_since: float | None = None
        self.last_pull_at = 0.0
        self._stopping = False
        self._waits_ended = False

    @property
    def name(self) -> str:
        """The source's name."""
        return self._source.name

    @property
    def problem(self) -> VodpollerError | None:
        """Why the last pull failed; None while pulling works."""
        return self._problem

    def status(self) -> SourceStatus:
        """The present state of pulling."""
        with self._lock:
            problem = self._problem
            waits_secs = self._not_before - self._monotonic()
            error, remedy = str(problem) if problem else "", ""
            if isinstance(problem, OperatorError):
                error = problem.message
                remedy = problem.advice or "Remove the cause that it names; then test with `vodpoller check --connect`"
            return SourceStatus(
                name=self.name,
                last_pull_at=self.last_pull_at or None,
                pulls_in_flight=self._pulling,
                failing_since=self._failing_since,
                next_pull_at=self._wall() + waits_secs if problem and waits_secs > 0 else None,
                error=error,
                error_code=problem.error_code if problem else "",
                request_id=problem.request_id if problem else "",
                remedy=remedy,
                last_error=self._last_error,
            )

    def tick(self) -> None:
        """Make sure that a puller is pulling; returns at once."""
        with self._lock:
            # Also if a permit exists already: maybe no thread could be started for it then.
            self._grant(0 if self._pulling + self._permits else 1)

    def wake(self) -> None:
        """End the back-off at the operator's request: the cause of the failures may be removed."""
        self.end_back_off()
        self._telemetry.reset()  # so that a further failure is logged at once: the operator waits for the result

    def end_back_off(self) -> None:
        """End the back-off after failures, for example because there is a key again."""
        with self._lock:
            self._not_before = 0.0
            self._failures = 0
            self._pause_over.notify_all()

    def stop(self) -> None:
        """Start no new pull. A pull under way is awaited: else its events would come only after their lease."""
        with self._lock:
            self._stopping = True
            self._permit_granted.notify_all()
            self._pause_over.notify_all()

    def end_waits(self) -> None:
        """End all waits of pullers for sinks: what the sinks have not accepted is stored."""
        with self._lock:
            self._waits_ended = True
            for wait in self._waits:
                wait.interrupt(stopping=True)

    def join(self, timeout_secs: float) -> bool:
        """Wait until the pullers have processed what they pulled, and have ended.

        Returns:
            Whether all have ended.
        """
        until = self._monotonic() + timeout_secs
        for puller in list(self._pullers):
            puller.join(max(until - self._monotonic(), 0))
        return not any(puller.is_alive() for puller in self._pullers)

    # --- a puller ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._take_permit():
            try:
                self._pull_and_process()
            except Exception:
                self._telemetry.log.exception("puller.failed", source=self.name)
            with self._lock:
                self._parked += 1

    def _take_permit(self) -> bool:
        with self._lock:
            while not (self._stopping or self._permits):
                self._permit_granted.wait()
            self._parked -= 1
            if self._stopping:
                return False
            self._permits -= 1
            self._pulling += 1
            return self._pause()

    def _pause(self) -> bool:
        """Wait until the back-off is over and events can be stored. Returns False if the poller stops."""
        while not self._stopping:
            wait_secs = self._not_before - self._monotonic()
            if wait_secs <= 0 and self._may_pull():
                return True
            self._wait(self._pause_over, wait_secs if wait_secs > 0 else PAUSE_CHECK_SECS)
        self._pulling -= 1
        return False

    def _pull_and_process(self) -> None:
        wait = DeliveryWait(should_yield=self._puller_is_missing)
        self._liveness.begin(f"puller {self.name}", self._cycle_secs)
        try:
            batch = self._pull(wait)
            if batch is not None:
                self._pipeline.process(batch, wait)
        finally:
            self._liveness.end()
            with self._lock:
                self._waits.pop(wait, None)

    def _pull(self, wait: DeliveryWait) -> Batch | None:
        """Pull once, and adjust permits and back-off by the answer.

        Args:
            wait: The wait of this puller for the delivery of the batch.

        Returns:
            The batch; None if it is empty or the pull failed.
        """
        began_at = self._monotonic()
        try:
            pull = self._vod.pull(self.name, self._source.sub_app_id)
        except StoppingError:
            with self._lock:
                self._pulling -= 1
            return None
        except Exception as error:  # noqa: BLE001 - any exception is a failed pull
            if _may_have_brought_events(error):
                self._journal.answer_lost(self.name, sent_ago_secs=self._monotonic() - began_at)
            self._failed(error)
            return None
        received_at = self._monotonic()
        self._remember(pull, received_at)
        self.last_pull_at = self._wall()
        self._answered(pull, wait)
        result = "events" if pull.events or pull.malformed else "empty"
        self._telemetry.count(Count.PULLS, source=self.name, result=result)
        return Batch.of(self._source, pull, received_at) if pull.events or pull.malformed else None

    def _remember(self, pull: Pull, received_at: float) -> None:
        """Record what the answer shows about events that VOD may deliver again, before a later answer is processed."""
        if pull.may_lack_events:
            self._journal.answer_lost(self.name, sent_ago_secs=received_at - pull.lease.starts_at)
        elif not (pull.events or pull.malformed):
            self._journal.answered_empty(Batch.of(self._source, pull, received_at).pulled(self._monotonic()))

    def _puller_is_missing(self) -> bool:
        return self._permits > self._parked and not self._stopping  # while stopping, no puller is missing

    # --- permits: `_grant`, `_hand_over` and `_answered_empty` need the lock -----------------------------------------

    def _grant(self, permits: int) -> None:
        self._permits = min(self._permits + permits, self._source.max_concurrent_pulls - self._pulling)
        while (
            self._parked < self._permits
            and len(self._pullers) < self._source.max_concurrent_pulls
            and not self._stopping
        ):
            puller = threading.Thread(target=self._run, name=f"puller-{self.name}-{len(self._pullers)}", daemon=True)
            try:
                puller.start()
            except RuntimeError:  # the system allows no more threads: the next free puller takes the permit
                break
            self._pullers.append(puller)
            self._parked += 1
        self._permit_granted.notify(permits)
        if self._puller_is_missing():
            # Every puller waits for a sink: the one that waits longest stores what its sinks have not accepted.
            next((wait for wait in self._waits if wait.interrupt()), None)

    def _answered(self, pull: Pull, wait: DeliveryWait) -> None:
        with self._lock:
            self._pulling -= 1
            failed_pulls, self._failed_pulls, self._failures, self._problem = self._failed_pulls, 0, 0, None
            self._failing_since = None
            self._has_logged = False
            if pull.events or pull.malformed:
                self._waits[wait] = None
                if self._waits_ended:
                    wait.interrupt(stopping=True)
                self._hand_over(pull)
            else:
                self._answered_empty(hung=pull.hung_secs >= HUNG_SECS, asked_at=pull.lease.starts_at)
        if failed_pulls > 1:
            suppressed = self._telemetry.reset()
            self._telemetry.log.info(
                "pull.recovered", source=self.name, failures=failed_pulls, suppressed_lines=suppressed or 0
            )

    def _hand_over(self, pull: Pull) -> None:
        """Let other pullers pull while this one delivers: one permit more if there is a backlog, else one less."""
        is_full = len(pull.events) >= FULL_EVENTS
        if pull.hung_secs < HUNG_SECS and (is_full or not self._quickest.is_slow(pull.hung_secs)):
            has_free_puller = self._parked > 0 or len(self._pullers) < self._source.max_concurrent_pulls
            self._grant(2 if has_free_puller else 1)
        elif is_full or self._pulling + self._permits == 0:
            self._grant(1)

    def _answered_empty(self, *, hung: bool, asked_at: float) -> None:
        if self._source.long_poll and self._pulling + self._permits == 0:
            if not hung:
                self._not_before = max(self._not_before, asked_at + EMPTY_PACE_SECS)
            self._grant(1)

    def _failed(self, error: Exception) -> None:
        self._telemetry.count(Count.PULLS, source=self.name, result="failed")
        self._telemetry.count(Count.PULL_ERRORS, source=self.name, code=pull_error_code(error))
        now = self._monotonic()
        with self._lock:
            self._pulling -= 1
            if now >= self._not_before:  # pullers that failed at the same time count as one failure
                self._failures += 1
                self._failed_pulls += 1
                self._not_before = now + self._back_off_secs(error)
            if self._pulling + self._permits == 0:
                self._grant(1)
            retry_in_secs = round(self._not_before - now, 1)
            self._problem = error if isinstance(error, VodpollerError) else TransientError(repr(error))
            self._last_error = PullError(
                at=self._wall(),
                message=str(self._problem),
                error_code=self._problem.error_code,
                request_id=self._problem.request_id,
            )
            self._failing_since = self._failing_since or self._wall()
            lasts = self._failed_pulls >= LASTING_FAILURES
        self._log_failure(error, retry_in_secs, lasts=lasts)
        if isinstance(error, OperatorError):
            self._on_operator_error()

    def _back_off_secs(self, error: Exception) -> float:
        if isinstance(error, OperatorError):
            return self._OPERATOR.secs(self._failures)
        asked_secs = error.retry_after_secs if isinstance(error, TransientError) else None
        own_secs = FIRST_RETRY_SECS if self._failures == 1 else self._TRANSIENT.secs(self._failures - 1)
        return max(own_secs, min(asked_secs or 0.0, FOREVER_SECS))

    def _log_failure(self, error: Exception, retry_in_secs: float, *, lasts: bool) -> None:
        """Log each cause once. One that lasts is logged also if a single failure was logged recently."""
        if lasts and not self._has_logged:
            self._telemetry.reset()
        known = isinstance(error, VodpollerError)
        fields = error.fields() if isinstance(error, VodpollerError) else {"error_message": repr(error)}
        self._has_logged |= self._telemetry.repeated(
            "error" if isinstance(error, OperatorError) or not known else "warning",
            "pull.failed",
            cause=f"{type(error).__name__} {fields.get('error_code') or fields.get('error_message')}",
            source=self.name,
            retry_in_secs=retry_in_secs,
            exc_info=None if known else error,
            **fields,
        )


def _may_have_brought_events(error: Exception) -> bool:
    """Whether VOD may have leased events for a failed pull: not if it was not sent, or if VOD refused it."""
    return not isinstance(error, ThrottledError | NoKeyError | OperatorError)
