"""Confirming: handles wait in their source's queue, and the pullers that settled them send the calls.

A *caller* is a puller that waits for a slot of the quota and has taken no handles yet. It takes them only when it has
the slot, so that its call also carries handles that arrived during the wait. *Needed* is the number of calls that the
waiting handles fill. Each time that handles are added, a caller takes handles or gives up, or a call ends, waiting
pullers become callers until there are as many as are needed, whichever batch the handles are from. So an idle source
confirms without delay, a busy source fills its calls instead of waiting for more slots, and a call that does not end
delays its own handles only.

Whether ConfirmEvents refuses a whole set because of one stale handle is not documented ("ConfirmEvents",
product/266/34184). So a refused set is halved until the stale handle is alone: at most nine calls for sixteen handles.
Handles that are undecided after these calls wait again and are not mixed with others; if VOD confirmed none of the set,
they are not tried again. A set that is refused after a lost answer is not split: the request without an answer probably
confirmed it. VOD delivers unconfirmed events again, and the ledger recognises them.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import tenacity

from vodpoller.errors import (
    LeaseLostError,
    NoKeyError,
    OperatorError,
    RefusedHandlesError,
    ThrottledError,
    TransientError,
    VodpollerError,
)
from vodpoller.events.event import Lease
from vodpoller.liveness import Liveness
from vodpoller.logs import Level
from vodpoller.settlement import ConfirmResult
from vodpoller.telemetry import Count, Telemetry
from vodpoller.vod.confirm_queue import CLOCK_SECS, ConfirmPuller, ConfirmQueue, Entry
from vodpoller.vod.confirmation import (
    UNKNOWN,
    Confirmation,
    RefusedAfterLostAnswerError,
    lease_ended,
    no_slot,
    not_confirmed,
    stopping,
)

MAX_CALLS: Final = 9
SUSPICIOUS_REFUSALS: Final = 3
FRESH_SHARE: Final = 0.1
TRIAL_SECS: Final = 2.0
STOP_RESERVE_SECS: Final = 1.0
_FIRST_RETRY_SECS: Final = 0.05
_CHECK_SECS: Final = 0.25  # interval at which a thread that waits for a trial checks whether the trials are over


class ConfirmsEvents(Protocol):
    """The part of the VOD client that confirms."""

    def await_confirm_slot(self, timeout_secs: float) -> bool:
        """Wait for a slot of the quota; see `vod.VodClient.await_confirm_slot`."""

    def confirm(self, sub_app_id: int | None, handles: Sequence[str], timeout_secs: float | None = None) -> str:
        """One signed ConfirmEvents request; see `vod.VodClient.confirm`."""


class Confirmer:
    """Confirms settled events. If VOD or a lease prevents that, the result says so; no error is raised.

    Args:
        vod: The client.
        telemetry: Destination of log lines and counts.
        liveness: Records each wait for a slot and each call, for the watchdog.
        reserve_secs: Handles of several pulls share a call only while more than this is left of their leases.
        monotonic: The monotonic clock, in seconds.
        sleep: Waits that number of seconds.
        trial_secs: The interval at which a single handle of a source is tried while VOD refuses all of its handles.
    """

    def __init__(
        self,
        *,
        vod: ConfirmsEvents,
        telemetry: Telemetry,
        liveness: Liveness,
        reserve_secs: float,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        trial_secs: float = TRIAL_SECS,
    ) -> None:
        self._vod = vod
        self._telemetry = telemetry.scope()
        self._liveness = liveness
        self._reserve_secs = reserve_secs
        self._monotonic = monotonic
        self._sleep = sleep
        self._trial_secs = trial_secs
        self._queues: dict[str, ConfirmQueue] = {}
        self._queues_lock = threading.Lock()
        self._stop_at: float | None = None

    def confirm(
        self,
        source: str,
        sub_app_id: int | None,
        handles: Sequence[str],
        lease: Lease,
        *,
        on_acknowledged: Callable[[Sequence[str]], None] = lambda _handles: None,
    ) -> dict[str, Confirmation]:
        """Confirm the handles of one pull. During the wait, this thread also sends calls with other waiting handles.

        Args:
            source: The source's name.
            sub_app_id: The source's SubAppId.
            handles: Any number of different handles.
            lease: The lease of the handles.
            on_acknowledged: Called with those of the handles that VOD has just acknowledged, in the thread that made
                the call. It is called at once because this thread may be busy with another call, and the lease may be
                over before this method returns.

        Returns:
            The result of each handle.
        """
        queue = self._queue_of(source, sub_app_id)
        puller = ConfirmPuller(queue.lock, on_acknowledged)
        puller.missing = len(handles)
        entries = [Entry(handle, lease, puller) for handle in handles]
        try:
            with queue.lock:
                queue.add(entries)
                queue.add_puller(puller)
                queue.make_callers()
            while self._await_call(queue, puller, entries):
                self._call(queue, puller)
        except Exception as error:  # noqa: BLE001 - whatever it is, each handle ends with a result
            self._report(queue, error, entries)
        finally:
            with queue.lock:
                queue.remove_puller(puller)
                queue.end_caller(puller)
                queue.end_entries(entries, UNKNOWN)
                queue.make_callers()
        confirmations = {entry.handle: entry.confirmation or UNKNOWN for entry in entries}
        for result, number in Counter(it.result.value for it in confirmations.values()).items():
            self._telemetry.count(Count.CONFIRMS, number, source=source, result=result)
        return confirmations

    def stop(self, ends_at: float) -> None:
        """End all waits: handles that no call has taken are not confirmed, and no set is sent again.

        Args:
            ends_at: Monotonic time at which the process ends. All calls end at least one second before it.
        """
        self._stop_at = ends_at - STOP_RESERVE_SECS
        with self._queues_lock:
            queues = list(self._queues.values())
        for queue in queues:
            with queue.lock:
                queue.is_stopping = True
                queue.end_waiting(stopping())
                queue.make_callers()

    def _queue_of(self, source: str, sub_app_id: int | None) -> ConfirmQueue:
        with self._queues_lock:
            queue = self._queues.get(source)
            if queue is None:
                queue = ConfirmQueue(source, sub_app_id, reserve_secs=self._reserve_secs, monotonic=self._monotonic)
                queue.is_stopping = self._stop_at is not None
                self._queues[source] = queue
            return queue

    def _await_call(self, queue: ConfirmQueue, puller: ConfirmPuller, entries: Sequence[Entry]) -> bool:
        """Wait until this thread must make a call (True), or all of its handles have a result (False)."""
        with queue.lock:
            while puller.missing and not puller.is_caller:
                self._end_waiting(queue)
                if puller.missing and not puller.is_caller:
                    self._wait(puller, queue.wait_secs(entries))
            queue.remove_puller(puller)
            return puller.is_caller

    def _wait(self, puller: ConfirmPuller, timeout_secs: float | None) -> None:
        """Wait until the puller is changed; its queue's lock is held before and after."""
        puller.changed.wait(timeout_secs)

    def _end_waiting(self, queue: ConfirmQueue) -> None:
        """End the wait of handles that cannot be confirmed: all handles at a stop, else those whose lease is over."""
        if queue.is_stopping:
            queue.end_waiting(stopping())
        elif over := queue.expire():
            self._report(queue, lease_ended(), over)

    # --- one call and its repetitions ---------------------------------------------------------------------------------

    def _call(self, queue: ConfirmQueue, puller: ConfirmPuller) -> None:
        taken: list[Entry] = []
        is_trial = False
        try:
            is_trial = self._await_trial(queue, puller)
            with queue.lock:
                ends_at = queue.last_lease_ends_at()
            has_slot = self._await_slot(ends_at)
            with queue.lock:
                queue.end_caller(puller)
                self._end_waiting(queue)
                if not has_slot:
                    over = queue.end_waiting(no_slot(), until=ends_at)
                elif queue.last_refusal is None or is_trial:
                    taken += queue.take()
                queue.make_callers()
            if not has_slot and over:
                self._report(queue, no_slot(), over)
            if taken:
                self._send(queue, taken)
        finally:
            with queue.lock:
                queue.end_caller(puller)
                queue.end_call(taken, UNKNOWN)
                if is_trial:  # the trial was made when its slot came, which may be long after it was allowed
                    queue.next_trial_at = self._monotonic() + self._trial_secs
                if puller.missing:
                    queue.add_puller(puller)
                queue.make_callers()

    def _await_trial(self, queue: ConfirmQueue, puller: ConfirmPuller) -> bool:
        """While VOD refuses all handles of the source, wait until one of them may be tried again.

        Returns:
            Whether this thread makes the trial.
        """
        with queue.lock:
            while queue.last_refusal is not None and queue.has_waiting and not queue.is_stopping:
                now = self._monotonic()
                if now >= queue.next_trial_at:
                    queue.next_trial_at = now + self._trial_secs
                    return True
                wait_secs = min(queue.next_trial_at, queue.last_lease_ends_at()) - now + CLOCK_SECS
                self._wait(puller, min(wait_secs, _CHECK_SECS))
                self._end_waiting(queue)
        return False

    def _await_slot(self, ends_at: float) -> bool:
        timeout_secs = self._before_stop(ends_at) - self._monotonic()
        if timeout_secs <= 0:  # no handle waits, or the time to stop is over
            return False
        self._liveness.begin("confirm slot", timeout_secs)
        try:
            return self._vod.await_confirm_slot(timeout_secs)
        finally:
            self._liveness.end()

    def _before_stop(self, ends_at: float) -> float:
        return ends_at if self._stop_at is None else min(ends_at, self._stop_at)

    def _send(self, queue: ConfirmQueue, entries: list[Entry]) -> None:
        """Confirm these handles; if VOD refuses them, find out which of them it refuses."""
        parts: list[list[Entry]] = [entries]
        problem: Exception | None = None
        refusal: RefusedHandlesError | None = None
        calls = 0
        is_fresh = entries[0].part_number is None and self._is_fresh(entries[0].lease)
        while parts and calls < MAX_CALLS and (calls == 0 or queue.last_refusal is None):
            part = parts.pop(0)
            calls += 1
            try:
                request_id = self._confirm_set(queue, part, has_slot=calls == 1)
            except RefusedHandlesError as error:
                problem = refusal = error
                if len(part) > 1:
                    half = len(part) // 2
                    parts = [part[:half], part[half:], *parts]
                else:
                    self._complete(queue, part, not_confirmed(error))
            except Exception as error:  # noqa: BLE001 - whatever it is, each handle ends with a result
                problem = error
                self._complete(queue, part, not_confirmed(error))
                if not isinstance(error, RefusedAfterLostAnswerError):
                    break
            else:
                confirmed = Confirmation(result=ConfirmResult.CONFIRMED, request_id=request_id)
                self._complete(queue, part, confirmed)
        if calls == MAX_CALLS and problem is not None and not _is_any_confirmed(entries):
            # If VOD refuses nine parts, it would refuse the other parts too: perhaps it confirms the fresh handles of a
            # call and still refuses the call.
            self._complete(queue, entries, not_confirmed(problem))
        with queue.lock:
            for part in parts:
                queue.add([entry for entry in part if entry.confirmation is None], together=True)
        self._update_refusals(queue, entries, problem, refusal if is_fresh else None)

    def _complete(self, queue: ConfirmQueue, entries: Sequence[Entry], confirmation: Confirmation) -> None:
        if confirmation.result.is_acknowledged:
            acknowledged: dict[ConfirmPuller, list[str]] = {}
            for entry in entries:
                if entry.confirmation is None:
                    acknowledged.setdefault(entry.owner, []).append(entry.handle)
            for owner, handles in acknowledged.items():
                owner.on_acknowledged(handles)
        with queue.lock:
            queue.complete(entries, confirmation)

    def _confirm_set(self, queue: ConfirmQueue, entries: Sequence[Entry], *, has_slot: bool) -> str:
        """Confirm these handles together; after each transient error again, while a lease of one of them lasts.

        Returns:
            The RequestId.
        """
        maybe_done = False
        last: VodpollerError = lease_ended()

        def live() -> list[Entry]:
            now = self._monotonic()
            over = [entry for entry in entries if entry.confirmation is None and entry.lease.ends_at <= now]
            if over:
                is_first = isinstance(last, LeaseLostError)  # nothing was sent: prefer VOD's refusal
                self._complete(queue, over, (queue.last_refusal if is_first else None) or not_confirmed(last))
            return [entry for entry in entries if entry.confirmation is None]

        def ends_at() -> float:
            return self._before_stop(max(entry.lease.ends_at for entry in entries))

        def attempt() -> str:
            nonlocal has_slot, last, maybe_done
            try:
                if not (has_slot or self._await_slot(ends_at())):
                    raise no_slot() if isinstance(last, LeaseLostError | ThrottledError) else last
                has_slot = False
                sent = live()
                if not sent:
                    raise last
                # If no answer has come when the first lease ends, the set is sent again without that handle.
                return self._send_once(queue, sent, self._before_stop(min(entry.lease.ends_at for entry in sent)))
            except RefusedHandlesError as error:
                if maybe_done:
                    raise RefusedAfterLostAnswerError(
                        "refused, but an earlier request, whose answer was lost, has probably confirmed them",
                        error_code=error.error_code,
                        request_id=error.request_id,
                    ) from error
                raise
            except TransientError as error:
                maybe_done = maybe_done or not isinstance(error, ThrottledError | NoKeyError)
                last = error
                raise

        return self._with_retries(attempt, ends_at)

    def _with_retries(self, attempt: Callable[[], str], ends_at: Callable[[], float]) -> str:
        """Return the result of the attempt; repeat it after each transient error, while there is time."""

        def has_time(wait_secs: float) -> bool:
            return self._stop_at is None and self._monotonic() + wait_secs < ends_at()

        try:
            return attempt()  # nearly all succeed at once and do not need tenacity
        except TransientError:
            if not has_time(_FIRST_RETRY_SECS):
                raise
        self._sleep(_FIRST_RETRY_SECS)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=tenacity.wait_exponential(multiplier=0.1, max=1) + tenacity.wait_random_exponential(0.1, max=1),
            stop=lambda state: not has_time(state.upcoming_sleep),
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(attempt)

    def _send_once(self, queue: ConfirmQueue, entries: Sequence[Entry], ends_at: float) -> str:
        timeout_secs = ends_at - self._monotonic()
        self._liveness.begin("confirm", timeout_secs)
        try:
            return self._vod.confirm(queue.sub_app_id, [entry.handle for entry in entries], timeout_secs)
        finally:
            self._liveness.end()

    # --- what the results say about the source ------------------------------------------------------------------------

    def _update_refusals(
        self,
        queue: ConfirmQueue,
        entries: Sequence[Entry],
        problem: Exception | None,
        refusal: RefusedHandlesError | None,
    ) -> None:
        """Conclude from the results of a set whether VOD accepts handles of this source at all.

        Args:
            queue: The queue of the source.
            entries: The set.
            problem: The last error; None if there was none.
            refusal: The last refusal if the set was fresh, else None. If slots are scarce, the leases end before the
                set is completely split: then the last error is another one, but the refusal still counts.
        """
        if _is_any_confirmed(entries):
            with queue.lock:
                queue.refused_in_a_row, queue.last_refusal = 0, None
        elif isinstance(problem, OperatorError):
            self._only_trials(queue, problem)
        elif refusal is not None:
            with queue.lock:
                queue.refused_in_a_row += 1
                is_suspicious = queue.refused_in_a_row >= SUSPICIOUS_REFUSALS
            if is_suspicious:
                self._only_trials(queue, refusal)
        if problem is not None:
            self._report(queue, problem, entries)

    def _only_trials(self, queue: ConfirmQueue, problem: Exception) -> None:
        """From now on, only try a single handle at intervals, until VOD accepts one."""
        with queue.lock:
            queue.last_refusal = not_confirmed(problem)
            queue.next_trial_at = self._monotonic() + self._trial_secs

    def _is_fresh(self, lease: Lease) -> bool:
        """Whether a lease has so much time left that the refusal of its handles is suspicious."""
        return lease.ends_at - self._monotonic() > lease.secs * FRESH_SHARE

    def _report(self, queue: ConfirmQueue, error: Exception, entries: Sequence[Entry]) -> None:
        unconfirmed = sum(
            entry.confirmation is None or entry.confirmation.result is not ConfirmResult.CONFIRMED for entry in entries
        )
        fields = {
            "source": queue.source,
            "handles": len(entries),
            "unconfirmed": unconfirmed,
            "lease_left_secs": round(entries[0].lease.ends_at - self._monotonic(), 3),
            **(error.fields() if isinstance(error, VodpollerError) else {"error_message": repr(error)}),
        }
        if isinstance(error, RefusedHandlesError) and queue.refused_in_a_row >= SUSPICIOUS_REFUSALS:
            hint = "VOD refuses handles that it has just sent: check sub_app_id of this source"
            self._telemetry.repeated("error", "confirm.refused", cause=f"refused {queue.source}", hint=hint, **fields)
            return
        is_known = isinstance(error, VodpollerError)
        level: Level = "error" if isinstance(error, OperatorError) or not is_known else "warning"
        cause = f"{queue.source} {type(error).__name__} {fields.get('error_code', '')}"
        self._telemetry.repeated(level, "confirm.failed", cause=cause, exc_info=None if is_known else error, **fields)


def _is_any_confirmed(entries: Iterable[Entry]) -> bool:
    return any(entry.confirmation and entry.confirmation.result is ConfirmResult.CONFIRMED for entry in entries)
