"""Confirming: handles wait in their source's queue, and the pullers that settled them send the calls.

A *caller* is a puller that waits for a slot of the quota and has taken no handles yet. It takes them when it has the
slot, so that a call carries what has come meanwhile. *Needed* is the number of calls into which the waiting handles
pack. Whenever handles enter, a caller takes or gives up, or a call ends, waiting pullers become callers until there are
as many as are needed, whichever batch the handles are of. So an idle source confirms without delay, a busy one fills
its calls instead of queueing for slots, and a call that hangs costs its own handles only.

Whether one stale handle makes ConfirmEvents refuse its batch mates is not documented ("ConfirmEvents",
product/266/34184), so a refused set is halved until the stale one stands alone: at most nine calls for sixteen handles.
What those leave undecided waits again, and is not mixed with others; unless VOD took none of the set. A refusal that
follows a lost answer is not split: the lost one probably did the work. What stays unconfirmed is delivered again, and
the ledger settles it.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil, inf
from typing import Final, Protocol

from vodpoller.backoff import Backoff
from vodpoller.errors import (
    LeaseLostError,
    OperatorError,
    RefusedHandlesError,
    StoppingError,
    ThrottledError,
    TransientError,
    VodpollerError,
)
from vodpoller.events import Lease
from vodpoller.liveness import Liveness
from vodpoller.logs import Level
from vodpoller.settlement import ConfirmResult
from vodpoller.telemetry import Count, Telemetry

MAX_CALLS: Final = 9
HANDLES_A_CALL: Final = 16
SUSPICIOUS_REFUSALS: Final = 3
FRESH_SHARE: Final = 0.1
ASK_SECS: Final = 2.0
STOP_RESERVE_SECS: Final = 1.0
_FIRST_RETRY_SECS: Final = 0.05
_LOOK_SECS: Final = 0.25  # how often a thread that waits to ask looks whether that is over
_CLOCK_SECS: Final = 0.001  # so that what is waited for has come when a wait ends


class ConfirmsEvents(Protocol):
    """The part of the VOD client that confirms."""

    def await_confirm_slot(self, timeout_secs: float) -> bool:
        """Wait for a slot of the quota; see `vod.VodClient.await_confirm_slot`."""

    def confirm(self, sub_app_id: int | None, handles: Sequence[str], timeout_secs: float | None = None) -> str:
        """One signed ConfirmEvents request; see `vod.VodClient.confirm`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """What came of the confirm of one handle.

    Args:
        result: What came of it.
        error_code: Tencent's, of the last call that had the handle; empty if it succeeded or had no answer.
        request_id: Tencent's, of that call; empty if it had no answer.
        why: What the last error said, empty if there was none.
    """

    result: ConfirmResult
    error_code: str = ""
    request_id: str = ""
    why: str = ""


class _RefusedAfterLostAnswerError(VodpollerError):
    """The handles were refused, but an earlier request with them may have been carried out."""


_RESULTS: Final[Mapping[type[Exception], ConfirmResult]] = {  # the first that fits counts
    RefusedHandlesError: ConfirmResult.REFUSED,
    _RefusedAfterLostAnswerError: ConfirmResult.REFUSED_AFTER_LOST,
    ThrottledError: ConfirmResult.THROTTLED,
    LeaseLostError: ConfirmResult.LEASE_ENDED,
    OperatorError: ConfirmResult.NOT_ALLOWED,
    StoppingError: ConfirmResult.STOPPING,
}


class _Puller:
    """A thread with handles to confirm. All of it is guarded by its queue's lock."""

    __slots__ = ("is_caller", "missing", "on_acknowledged", "woken")

    def __init__(self, lock: threading.Lock, on_acknowledged: Callable[[Sequence[str]], None]) -> None:
        self.woken = threading.Condition(lock)
        self.on_acknowledged = on_acknowledged
        self.missing = 0
        self.is_caller = False


class _Entry:
    """One handle in a queue.

    Args:
        handle: The handle.
        lease: The lease it is under.
        owner: The thread that waits for its result.
    """

    __slots__ = ("confirmation", "handle", "lease", "owner", "part_number")

    def __init__(self, handle: str, lease: Lease, owner: _Puller) -> None:
        self.handle = handle
        self.lease = lease
        self.owner = owner
        self.confirmation: Confirmation | None = None
        self.part_number: int | None = None  # of the part of a refused set that it must stay in


class _Queue:
    """The handles of one source that wait to be confirmed, the oldest lease first.

    Args:
        source: The source's name, for the log.
        sub_app_id: The source's SubAppId.
        reserve_secs: Handles of several pulls share a call only while more than this is left of their leases.
        monotonic: The clock, in seconds.
    """

    def __init__(
        self, source: str, sub_app_id: int | None, *, reserve_secs: float, monotonic: Callable[[], float]
    ) -> None:
        self.source = source
        self.sub_app_id = sub_app_id
        self.lock = threading.Lock()
        self.refused_in_a_row = 0
        self.last_refusal: Confirmation | None = None  # while VOD takes none of the source's handles
        self.next_ask_at = 0.0
        self.is_stopping = False
        self._reserve_secs = reserve_secs
        self._monotonic = monotonic
        self._waiting: list[_Entry] = []
        self._parked: dict[_Puller, None] = {}
        self._callers = 0
        self._part_numbers = count()

    # --- all of this holds the lock -----------------------------------------------------------------------------------

    def enter(self, entries: Iterable[_Entry], *, together: bool = False) -> None:
        """They wait from now on.

        Args:
            entries: Without a result.
            together: They stay in one set, and are not mixed with others.
        """
        number = next(self._part_numbers) if together else None
        for entry in entries:
            entry.part_number = number
            self._waiting.append(entry)
        self._waiting.sort(key=lambda entry: entry.lease.ends_at)

    def park(self, puller: _Puller) -> None:
        """The puller waits, and may be made a caller."""
        self._parked[puller] = None

    def unpark(self, puller: _Puller) -> None:
        """The puller waits no more."""
        self._parked.pop(puller, None)

    def appoint(self) -> None:
        """Make waiting pullers callers, until there are as many as are needed."""
        needed = self._needed()
        while self._callers < needed and self._parked:
            puller = next(iter(self._parked))
            del self._parked[puller]
            puller.is_caller = True
            self._callers += 1
            puller.woken.notify()

    def resign(self, puller: _Puller) -> None:
        """The puller is not a caller any more: it takes, or gives up."""
        if puller.is_caller:
            puller.is_caller = False
            self._callers -= 1

    def _needed(self) -> int:
        if not self._waiting:
            return 0
        if self.last_refusal is not None:
            return 1
        sizes: dict[object, int] = {}
        now = self._monotonic()
        for entry in self._waiting:
            group = self._group(entry, now)
            sizes[group] = sizes.get(group, 0) + 1
        return sum(ceil(size / HANDLES_A_CALL) for size in sizes.values())

    def _group(self, entry: _Entry, now: float) -> object:
        """What may be mixed in one call: the members of one group."""
        if entry.part_number is not None:
            return entry.part_number
        return None if entry.lease.ends_at - now > self._reserve_secs else entry.lease

    def take(self) -> list[_Entry]:
        """What one call gets: the oldest handle and what may be mixed with it. One alone while VOD refuses all."""
        if not self._waiting:
            return []
        most = HANDLES_A_CALL if self.last_refusal is None else 1
        now = self._monotonic()
        group = self._group(self._waiting[0], now)
        taken = [entry for entry in self._waiting if self._group(entry, now) == group][:most]
        self._remove(taken)
        return taken

    def leave(self, entries: Iterable[_Entry], confirmation: Confirmation) -> None:
        """Whatever has no result gets this one, and waits no more."""
        self._remove(entries)
        self.complete(entries, confirmation)

    def _remove(self, entries: Iterable[_Entry]) -> None:
        gone = set(map(id, entries))
        self._waiting = [entry for entry in self._waiting if id(entry) not in gone]

    def complete(self, entries: Iterable[_Entry], confirmation: Confirmation) -> None:
        """Their result is known, and their owners are told."""
        for entry in entries:
            if entry.confirmation is None:
                entry.confirmation = confirmation
                entry.owner.missing -= 1
                if entry.owner.missing == 0:
                    entry.owner.woken.notify()

    def end_call(self, entries: Iterable[_Entry], confirmation: Confirmation) -> None:
        """A call is over: what it neither decided nor put back gets this result."""
        waiting = set(map(id, self._waiting))
        self.complete([entry for entry in entries if id(entry) not in waiting], confirmation)

    def end_waiting(self, error: Exception, *, until: float = inf) -> list[_Entry]:
        """End the waiting of all handles whose lease ends by then, with this error; returns them."""
        entries = [entry for entry in self._waiting if entry.lease.ends_at <= until]
        self.leave(entries, not_confirmed(error))
        return entries

    def expire(self) -> list[_Entry]:
        """End the waiting of handles whose lease is over; returns them."""
        now = self._monotonic()
        over = [entry for entry in self._waiting if entry.lease.ends_at <= now]
        if over:
            self.leave(over, self.last_refusal or not_confirmed(_lease_ended()))
        return over

    @property
    def has_waiting(self) -> bool:
        """Whether any handle waits."""
        return bool(self._waiting)

    def last_lease_ends_at(self) -> float:
        """When the last lease of what waits ends; 0 if nothing waits."""
        return self._waiting[-1].lease.ends_at if self._waiting else 0.0

    def wait_secs(self, entries: Iterable[_Entry]) -> float | None:
        """How long a puller waits at most for these; None if all of them are in calls, which end."""
        waiting = set(map(id, self._waiting))
        ends = [entry.lease.ends_at for entry in entries if id(entry) in waiting]
        return max(min(ends) - self._monotonic(), 0.0) + _CLOCK_SECS if ends else None


class Confirmer:
    """Confirms what was settled, as far as VOD and the leases allow; never raises for what they do not allow.

    Args:
        vod: The client.
        telemetry: Destination of log lines and counts.
        liveness: Told of each wait for a slot and each call.
        reserve_secs: Handles of several pulls share a call only while more than this is left of their leases.
        monotonic: The clock, in seconds.
        sleep: Waits so many seconds.
        ask_secs: While VOD refuses all handles of a source, one of them is tried this often.
    """

    _BACKOFF = Backoff(first_secs=0.4, most_secs=2.0)

    def __init__(
        self,
        *,
        vod: ConfirmsEvents,
        telemetry: Telemetry,
        liveness: Liveness,
        reserve_secs: float,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        ask_secs: float = ASK_SECS,
    ) -> None:
        self._vod = vod
        self._telemetry = telemetry.scope()
        self._liveness = liveness
        self._reserve_secs = reserve_secs
        self._monotonic = monotonic
        self._sleep = sleep
        self._ask_secs = ask_secs
        self._queues: dict[str, _Queue] = {}
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
        """Have handles of one pull confirmed; meanwhile this thread confirms whatever waits.

        Args:
            source: The source's name.
            sub_app_id: The source's SubAppId.
            handles: Any number, each once.
            lease: The lease they are under.
            on_acknowledged: Called with the handles that a call had, as soon as VOD has acknowledged them: this thread
                may then be busy with another's call, and the lease be over before it returns. In the thread of the
                call.

        Returns:
            What came of each handle.
        """
        queue = self._queue_of(source, sub_app_id)
        puller = _Puller(queue.lock, on_acknowledged)
        puller.missing = len(handles)
        entries = [_Entry(handle, lease, puller) for handle in handles]
        try:
            with queue.lock:
                queue.enter(entries)
                queue.park(puller)
                queue.appoint()
            while self._is_to_call(queue, puller, entries):
                self._call(queue, puller)
        except Exception as error:  # noqa: BLE001 - whatever it is, each handle ends with a result
            self._report(queue, error, entries)
        finally:
            with queue.lock:
                queue.unpark(puller)
                queue.resign(puller)
                queue.leave(entries, _UNKNOWN)
                queue.appoint()
        confirmations = {entry.handle: entry.confirmation or _UNKNOWN for entry in entries}
        for result, number in Counter(it.result.value for it in confirmations.values()).items():
            self._telemetry.count(Count.CONFIRMS, number, source=source, result=result)
        return confirmations

    def stop(self, ends_at: float) -> None:
        """End the waits: what no call has taken is not confirmed, no set is sent again.

        Args:
            ends_at: Monotonic time at which the process ends; no call lasts beyond a second before it.
        """
        self._stop_at = ends_at - STOP_RESERVE_SECS
        with self._queues_lock:
            queues = list(self._queues.values())
        for queue in queues:
            with queue.lock:
                queue.is_stopping = True
                queue.end_waiting(_stopping())
                queue.appoint()

    def _queue_of(self, source: str, sub_app_id: int | None) -> _Queue:
        with self._queues_lock:
            queue = self._queues.get(source)
            if queue is None:
                queue = _Queue(source, sub_app_id, reserve_secs=self._reserve_secs, monotonic=self._monotonic)
                queue.is_stopping = self._stop_at is not None
                self._queues[source] = queue
            return queue

    def _is_to_call(self, queue: _Queue, puller: _Puller, entries: Sequence[_Entry]) -> bool:
        """Wait until this thread is to make a call (True), or all of its handles have a result."""
        with queue.lock:
            while puller.missing and not puller.is_caller:
                self._end_waiting(queue)
                if puller.missing and not puller.is_caller:
                    self._wait(puller, queue.wait_secs(entries))
            queue.unpark(puller)
            return puller.is_caller

    def _wait(self, puller: _Puller, timeout_secs: float | None) -> None:
        """Wait until the puller is woken; its queue's lock is held before and after."""
        puller.woken.wait(timeout_secs)

    def _end_waiting(self, queue: _Queue) -> None:
        """The end of what waits in vain: of all of it at a stop, else of the handles whose lease is over."""
        if queue.is_stopping:
            queue.end_waiting(_stopping())
        elif over := queue.expire():
            self._report(queue, _lease_ended(), over)

    # --- one call and what it leads to --------------------------------------------------------------------------------

    def _call(self, queue: _Queue, puller: _Puller) -> None:
        taken: list[_Entry] = []
        try:
            may_ask = self._await_asking(queue, puller)
            with queue.lock:
                ends_at = queue.last_lease_ends_at()
            has_slot = self._slot(ends_at)
            with queue.lock:
                queue.resign(puller)
                self._end_waiting(queue)
                if not has_slot:
                    over = queue.end_waiting(_no_slot(), until=ends_at)
                elif queue.last_refusal is None or may_ask:
                    taken += queue.take()
                queue.appoint()
            if not has_slot and over:
                self._report(queue, _no_slot(), over)
            if taken:
                self._send(queue, taken)
        finally:
            with queue.lock:
                queue.resign(puller)
                queue.end_call(taken, _UNKNOWN)
                if puller.missing:
                    queue.park(puller)
                queue.appoint()

    def _await_asking(self, queue: _Queue, puller: _Puller) -> bool:
        """While VOD refuses all handles of the source: wait for the time to ask for one again.

        Returns:
            Whether that time has come for this thread.
        """
        with queue.lock:
            while queue.last_refusal is not None and queue.has_waiting and not queue.is_stopping:
                now = self._monotonic()
                if now >= queue.next_ask_at:
                    queue.next_ask_at = now + self._ask_secs
                    return True
                waits_secs = min(queue.next_ask_at, queue.last_lease_ends_at()) - now + _CLOCK_SECS
                self._wait(puller, min(waits_secs, _LOOK_SECS))
                self._end_waiting(queue)
        return False

    def _slot(self, ends_at: float) -> bool:
        timeout_secs = self._bounded(ends_at) - self._monotonic()
        if timeout_secs <= 0:  # nothing waits, or the time to stop is over
            return False
        self._liveness.begin("confirm slot", timeout_secs)
        try:
            return self._vod.await_confirm_slot(timeout_secs)
        finally:
            self._liveness.end()

    def _bounded(self, ends_at: float) -> float:
        return ends_at if self._stop_at is None else min(ends_at, self._stop_at)

    def _send(self, queue: _Queue, entries: list[_Entry]) -> None:
        """Confirm these; if VOD refuses them, find out which of them it refuses."""
        parts: list[list[_Entry]] = [entries]
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
                if not isinstance(error, _RefusedAfterLostAnswerError):
                    break
            else:
                confirmed = Confirmation(result=ConfirmResult.CONFIRMED, request_id=request_id)
                self._complete(queue, part, confirmed)
        if calls == MAX_CALLS and problem is not None and not _is_any_confirmed(entries):
            # Whoever refuses nine parts refuses the rest: some VOD may confirm the fresh ones and refuse the call.
            self._complete(queue, entries, not_confirmed(problem))
        with queue.lock:
            for part in parts:
                queue.enter([entry for entry in part if entry.confirmation is None], together=True)
        self._judge(queue, entries, problem, refusal if is_fresh else None)

    def _complete(self, queue: _Queue, entries: Sequence[_Entry], confirmation: Confirmation) -> None:
        if confirmation.result.is_acknowledged:
            acknowledged: dict[_Puller, list[str]] = {}
            for entry in entries:
                if entry.confirmation is None:
                    acknowledged.setdefault(entry.owner, []).append(entry.handle)
            for owner, handles in acknowledged.items():
                owner.on_acknowledged(handles)
        with queue.lock:
            queue.complete(entries, confirmation)

    def _confirm_set(self, queue: _Queue, entries: Sequence[_Entry], *, has_slot: bool) -> str:
        """Confirm these together; the same set again after each transient error, while a lease of theirs lasts.

        Returns:
            The RequestId.
        """
        maybe_done = False
        last: VodpollerError = _lease_ended()

        def live() -> list[_Entry]:
            now = self._monotonic()
            over = [entry for entry in entries if entry.confirmation is None and entry.lease.ends_at <= now]
            if over:
                is_first = isinstance(last, LeaseLostError)  # then what VOD said to others of the source says more
                self._complete(queue, over, (queue.last_refusal if is_first else None) or not_confirmed(last))
            return [entry for entry in entries if entry.confirmation is None]

        def ends_at() -> float:
            return self._bounded(max(entry.lease.ends_at for entry in entries))

        def attempt() -> str:
            nonlocal has_slot, last, maybe_done
            try:
                if not (has_slot or self._slot(ends_at())):
                    raise _no_slot() if isinstance(last, LeaseLostError | ThrottledError) else last
                has_slot = False
                sent = live()
                if not sent:
                    raise last
                # What is not answered when the first of the leases ends goes on without that handle.
                return self._sent(queue, sent, self._bounded(min(entry.lease.ends_at for entry in sent)))
            except RefusedHandlesError as error:
                if maybe_done:
                    raise _RefusedAfterLostAnswerError(
                        "refused after a request whose answer was lost, which probably confirmed them",
                        error_code=error.error_code,
                        request_id=error.request_id,
                    ) from error
                raise
            except TransientError as error:
                maybe_done = maybe_done or not isinstance(error, ThrottledError)
                last = error
                raise

        return self._repeated(attempt, ends_at)

    def _repeated(self, attempt: Callable[[], str], ends_at: Callable[[], float]) -> str:
        """What the attempt returns; it is made again after each transient error, while there is time."""
        failures = 0
        while True:
            try:
                return attempt()
            except TransientError:
                wait_secs = self._BACKOFF.secs(failures) if failures else _FIRST_RETRY_SECS
                if self._stop_at is not None or self._monotonic() + wait_secs >= ends_at():
                    raise
            failures += 1
            self._sleep(wait_secs)

    def _sent(self, queue: _Queue, entries: Sequence[_Entry], ends_at: float) -> str:
        timeout_secs = ends_at - self._monotonic()
        self._liveness.begin("confirm", timeout_secs)
        try:
            return self._vod.confirm(queue.sub_app_id, [entry.handle for entry in entries], timeout_secs)
        finally:
            self._liveness.end()

    # --- what it says of the source -----------------------------------------------------------------------------------

    def _judge(
        self,
        queue: _Queue,
        entries: Sequence[_Entry],
        problem: Exception | None,
        refusal: RefusedHandlesError | None,
    ) -> None:
        """Learn from a set whether VOD takes handles of this source at all.

        Args:
            queue: The source's.
            entries: The set.
            problem: What went wrong last.
            refusal: The last refusal if the set was fresh. Where slots are scarce the lease ends before the set is
                split to its end: then the problem is another one, and the refusal counts all the same.
        """
        if _is_any_confirmed(entries):
            with queue.lock:
                queue.refused_in_a_row, queue.last_refusal = 0, None
        elif isinstance(problem, OperatorError):
            self._ask_only(queue, problem)
        elif refusal is not None:
            with queue.lock:
                queue.refused_in_a_row += 1
                is_suspicious = queue.refused_in_a_row >= SUSPICIOUS_REFUSALS
            if is_suspicious:
                self._ask_only(queue, refusal)
        if problem is not None:
            self._report(queue, problem, entries)

    def _ask_only(self, queue: _Queue, problem: Exception) -> None:
        """From now on one handle alone is asked for, now and then, until VOD takes one."""
        with queue.lock:
            queue.last_refusal = not_confirmed(problem)
            queue.next_ask_at = self._monotonic() + self._ask_secs

    def _is_fresh(self, lease: Lease) -> bool:
        """A stale handle is no fault while its lease is nearly over; fresh ones refused again and again are one."""
        return lease.ends_at - self._monotonic() > lease.secs * FRESH_SHARE

    def _report(self, queue: _Queue, error: Exception, entries: Sequence[_Entry]) -> None:
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
            hint = "VOD refuses handles that it has just given out: check sub_app_id of this source"
            self._telemetry.repeated("error", "confirm.refused", cause=f"refused {queue.source}", hint=hint, **fields)
            return
        is_known = isinstance(error, VodpollerError)
        level: Level = "error" if isinstance(error, OperatorError) or not is_known else "warning"
        cause = f"{queue.source} {type(error).__name__} {fields.get('error_code', '')}"
        self._telemetry.repeated(level, "confirm.failed", cause=cause, exc_info=None if is_known else error, **fields)


def _lease_ended() -> LeaseLostError:
    return LeaseLostError("the lease ended before the events could be confirmed; VOD delivers them again")


def _stopping() -> StoppingError:
    return StoppingError("the daemon's time to stop was over before the events could be confirmed")


def _no_slot() -> ThrottledError:
    return ThrottledError("ConfirmEvents was not sent: api.requests_per_sec left no room for it in time")


def _is_any_confirmed(entries: Iterable[_Entry]) -> bool:
    return any(entry.confirmation and entry.confirmation.result is ConfirmResult.CONFIRMED for entry in entries)


def not_confirmed(error: Exception) -> Confirmation:
    """What a handle came to whose last call ended with this error."""
    result = next((it for kind, it in _RESULTS.items() if isinstance(error, kind)), ConfirmResult.NO_ANSWER)
    known = error if isinstance(error, VodpollerError) else VodpollerError(repr(error))
    return Confirmation(result=result, error_code=known.error_code, request_id=known.request_id, why=str(known))


_UNKNOWN: Final = Confirmation(result=ConfirmResult.NO_ANSWER, why="an unforeseen error; the log has it")
