"""When to pull, and the number of pulls at once: pullers and their permits."""

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
    """The part of the journal that learns from pulls what VOD may bring again."""

    def answered_empty(self, pulled: Pulled) -> None:
        """A pull brought nothing; see `journal.contract.Journal.answered_empty`."""

    def answer_lost(self, source: str, *, sent_ago_secs: float) -> None:
        """A pull has just failed or was cut off; see `journal.contract.Journal.answer_lost`."""


class _Quickest:
    """Tells answers that came at once from those that waited for an event to be born.

    VOD tells neither the number of events that are left, nor how long it held a request. What the quickest answers of
    the last minutes took is the way there and back.

    Args:
        monotonic: The clock, in seconds.
    """

    _WINDOW_SECS = 300.0

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._since = monotonic()
        self._before = self._now = inf

    def is_slow(self, took_secs: float) -> bool:
        """Whether an answer that held events took clearly longer than the quickest."""
        if self._monotonic() - self._since >= self._WINDOW_SECS:
            self._since, self._before, self._now = self._monotonic(), self._now, inf
        self._now = min(self._now, took_secs)
        return took_secs > 1.5 * min(self._now, self._before) + 0.02


class Poller:
    """Keeps a pull outstanding at one source, and more of them while there is a backlog.

    A puller is a thread that pulls and processes batches. Each pull needs a permit; there are as many permits as pulls
    are wanted, which is one while the queue is empty. A puller whose answer holds events passes its permit on before it
    delivers, and adds one if the answer was full or came at once, since then there is probably more. A permit ends with
    an answer that is empty or had to be waited for, unless it is the last.

    Args:
        source: The source.
        vod: The client.
        pipeline: Processes what was pulled.
        journal: Told which pulls brought nothing, and which failed.
        may_pull: Whether events can be taken care of at the moment.
        on_operator_error: Called when a pull failed in a way that only a person can mend: read the credentials again.
        cycle_secs: How long a cycle may take before its puller counts as hung.
        telemetry: Destination of log lines and counts.
        liveness: Told what each puller is doing.
        monotonic: The clock, in seconds.
        wall: The clock of `last_pull_at`, in seconds since 1970.
        wait: Waits on a condition, whose lock is held, for at most this number of seconds: a pause between pulls.

    Attributes:
        last_pull_at: When VOD last answered a pull; 0 for never.
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
        self._said = False
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
        """How pulling goes at this moment."""
        with self._lock:
            problem = self._problem
            waits_secs = self._not_before - self._monotonic()
            error, remedy = str(problem) if problem else "", ""
            if isinstance(problem, OperatorError):
                error = problem.message
                remedy = problem.advice or "Mend what it names; `vodpoller check --connect` tries whether that helped"
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
            # Also if a permit is granted already: the system may have had no thread for it then.
            self._grant(0 if self._pulling + self._permits else 1)

    def wake(self) -> None:
        """End the waiting after failures, as an operator asks: the cause may be gone."""
        self.go_on()
        self._telemetry.reset()  # the operator who asked wants to hear whether it helped

    def go_on(self) -> None:
        """End the waiting after failures: there is a key again."""
        with self._lock:
            self._not_before = 0.0
            self._failures = 0
            self._pause_over.notify_all()

    def stop(self) -> None:
        """Start no new pull. A pull that is under way is awaited: dropping it would strand what it brings."""
        with self._lock:
            self._stopping = True
            self._permit_granted.notify_all()
            self._pause_over.notify_all()

    def end_waits(self) -> None:
        """Let no puller wait for a sink any longer: what was not accepted is stored."""
        with self._lock:
            self._waits_ended = True
            for wait in self._waits:
                wait.interrupt(stopping=True)

    def join(self, timeout_secs: float) -> bool:
        """Wait until the pullers have seen through what they pulled.

        Returns:
            Whether they have.
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
        """Wait for the end of a back-off and until events can be taken care of; False when it is time to end."""
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
        """One pull, and what follows from it for the next ones.

        Args:
            wait: What this puller will wait on while the batch is delivered.

        Returns:
            What it brought; None if that is nothing.
        """
        began_at = self._monotonic()
        try:
            pull = self._vod.pull(self.name, self._source.sub_app_id)
        except StoppingError:
            with self._lock:
                self._pulling -= 1
            return None
        except Exception as error:  # noqa: BLE001 - whatever it is, the pull failed
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
        """Tell what the answer says of events that VOD may bring again, before any later answer is processed."""
        if pull.may_lack_events:
            self._journal.answer_lost(self.name, sent_ago_secs=received_at - pull.lease.starts_at)
        elif not (pull.events or pull.malformed):
            self._journal.answered_empty(Batch.of(self._source, pull, received_at).pulled(self._monotonic()))

    def _puller_is_missing(self) -> bool:
        return self._permits > self._parked and not self._stopping  # while stopping, no puller is missing

    # --- permits; all of this holds the lock -------------------------------------------------------------------------

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
            except RuntimeError:  # the system has no more threads: a puller that comes free takes the permit
                break
            self._pullers.append(puller)
            self._parked += 1
        self._permit_granted.notify(permits)
        if self._puller_is_missing():
            # Every puller waits for a sink: the one that waits longest stores what its sinks have not taken.
            next((wait for wait in self._waits if wait.interrupt()), None)

    def _answered(self, pull: Pull, wait: DeliveryWait) -> None:
        with self._lock:
            self._pulling -= 1
            failed_pulls, self._failed_pulls, self._failures, self._problem = self._failed_pulls, 0, 0, None
            self._failing_since = None
            self._said = False
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
        """Let others pull while this puller delivers: one more than before if there is a backlog, else one less."""
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
            if now >= self._not_before:  # a failure of pullers that set out together is one failure
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
        self._say_failed(error, retry_in_secs, lasts=lasts)
        if isinstance(error, OperatorError):
            self._on_operator_error()

    def _back_off_secs(self, error: Exception) -> float:
        if isinstance(error, OperatorError):
            return self._OPERATOR.secs(self._failures)
        asked_secs = error.retry_after_secs if isinstance(error, TransientError) else None
        own_secs = FIRST_RETRY_SECS if self._failures == 1 else self._TRANSIENT.secs(self._failures - 1)
        return max(own_secs, min(asked_secs or 0.0, FOREVER_SECS))

    def _say_failed(self, error: Exception, retry_in_secs: float, *, lasts: bool) -> None:
        """Say each cause once. Single failures that were said lately do not keep one that lasts from being said."""
        if lasts and not self._said:
            self._telemetry.reset()
        known = isinstance(error, VodpollerError)
        fields = error.fields() if isinstance(error, VodpollerError) else {"error_message": repr(error)}
        self._said |= self._telemetry.repeated(
            "error" if isinstance(error, OperatorError) or not known else "warning",
            "pull.failed",
            cause=f"{type(error).__name__} {fields.get('error_code') or fields.get('error_message')}",
            source=self.name,
            retry_in_secs=retry_in_secs,
            exc_info=None if known else error,
            **fields,
        )


def _may_have_brought_events(error: Exception) -> bool:
    """Whether VOD may have handed out events to a pull that failed: not if it was not sent, or VOD refused it."""
    return not isinstance(error, ThrottledError | NoKeyError | OperatorError)
