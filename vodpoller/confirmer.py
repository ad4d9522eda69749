"""Confirming: the handles of one pull, together, while their lease lasts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import tenacity

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
from vodpoller.logs import Level, Logger, Repeats
from vodpoller.settlement import ConfirmResult

MAX_CALLS = 9
HANDLES_A_CALL = 16
SUSPICIOUS_REFUSALS = 3
FRESH_SHARE = 0.1


class ConfirmsEvents(Protocol):
    """The part of the VOD client that confirms."""

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


class Confirmer:
    """Confirms what was settled, as far as VOD and the lease allow; never raises for what they do not allow.

    Whether one stale handle makes ConfirmEvents refuse its batch mates is not documented ("ConfirmEvents",
    product/266/34184), so a refused batch is halved until the stale one stands alone: at most nine calls for sixteen
    handles. A refusal that follows a lost answer is not split: the lost one probably did the work. What stays
    unconfirmed comes again, and the ledger settles it.

    Args:
        vod: The client.
        log: Where to.
        monotonic: The clock, in seconds.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        *,
        vod: ConfirmsEvents,
        log: Logger,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._vod = vod
        self._repeats = Repeats(log, monotonic=monotonic)
        self._monotonic = monotonic
        self._sleep = sleep
        self._refused_in_a_row: dict[str, int] = {}

    def confirm(
        self, source: str, sub_app_id: int | None, handles: Sequence[str], lease: Lease
    ) -> dict[str, Confirmation]:
        """Confirm handles of one pull.

        Args:
            source: The source's name, for the log.
            sub_app_id: The source's SubAppId.
            handles: Any number, each once.
            lease: The lease they are under.

        Returns:
            What came of each handle.
        """
        confirmations: dict[str, Confirmation] = {}
        for first in range(0, len(handles), HANDLES_A_CALL):
            confirmations |= self._confirm_batch(source, sub_app_id, handles[first : first + HANDLES_A_CALL], lease)
        return confirmations

    def _confirm_batch(
        self, source: str, sub_app_id: int | None, handles: Sequence[str], lease: Lease
    ) -> dict[str, Confirmation]:
        confirmations: dict[str, Confirmation] = {}
        parts = [handles]
        problem: Exception | None = None
        for _ in range(MAX_CALLS):
            if not parts:
                break
            part = parts.pop(0)
            try:
                request_id = self._confirm_part(sub_app_id, part, lease)
            except RefusedHandlesError as error:
                problem = error
                confirmations |= dict.fromkeys(part, _not_confirmed(error))
                if len(part) > 1:
                    half = len(part) // 2
                    parts = [part[:half], part[half:], *parts]
            except _RefusedAfterLostAnswerError as error:
                problem = error
                confirmations |= dict.fromkeys(part, _not_confirmed(error))
            except Exception as error:  # noqa: BLE001 - whatever it is, each handle ends with a result
                problem = error
                confirmations |= dict.fromkeys(
                    [*part, *(handle for rest in parts for handle in rest)], _not_confirmed(error)
                )
                break
            else:
                confirmations |= dict.fromkeys(
                    part, Confirmation(result=ConfirmResult.CONFIRMED, request_id=request_id)
                )
        if problem is None:
            self._refused_in_a_row.pop(source, None)
        else:
            unconfirmed = sum(it.result is not ConfirmResult.CONFIRMED for it in confirmations.values())
            self._report(source, problem, unconfirmed=unconfirmed, of=len(handles), lease=lease)
        return confirmations

    def _confirm_part(self, sub_app_id: int | None, handles: Sequence[str], lease: Lease) -> str:
        """Confirm these together; the same set again after each transient error, while the lease lasts.

        Returns:
            The RequestId.
        """
        try:
            return self._attempt(sub_app_id, handles, lease)
        except TransientError as error:
            return self._repeat(sub_app_id, handles, lease, error)

    def _attempt(self, sub_app_id: int | None, handles: Sequence[str], lease: Lease) -> str:
        left_secs = lease.ends_at - self._monotonic()
        if left_secs <= 0:
            raise LeaseLostError("the lease ended before the events could be confirmed; VOD brings them again")
        return self._vod.confirm(sub_app_id, handles, left_secs)

    def _repeat(self, sub_app_id: int | None, handles: Sequence[str], lease: Lease, first: TransientError) -> str:
        maybe_done = not isinstance(first, ThrottledError)
        last = first

        def attempt() -> str:
            nonlocal maybe_done, last
            try:
                return self._attempt(sub_app_id, handles, lease)
            except LeaseLostError:
                raise last from None  # what the last call came to says more than that there was no time for another
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

        self._sleep(0.05)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=tenacity.wait_exponential(multiplier=0.1, max=1) + tenacity.wait_random_exponential(0.1, max=1),
            stop=lambda state: self._monotonic() + state.upcoming_sleep >= lease.ends_at,
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(attempt)

    def _report(self, source: str, error: Exception, *, unconfirmed: int, of: int, lease: Lease) -> None:
        is_known = isinstance(error, VodpollerError)
        fields = {
            "source": source,
            "handles": of,
            "unconfirmed": unconfirmed,
            "lease_left_secs": round(lease.ends_at - self._monotonic(), 3),
            **(error.fields() if isinstance(error, VodpollerError) else {"error_message": repr(error)}),
        }
        # A stale handle is no fault while the lease is nearly over; fresh ones refused again and again are one.
        is_fresh = lease.ends_at - self._monotonic() > lease.secs * FRESH_SHARE
        if isinstance(error, RefusedHandlesError) and unconfirmed == of and is_fresh:
            refused = self._refused_in_a_row[source] = self._refused_in_a_row.get(source, 0) + 1
            if refused >= SUSPICIOUS_REFUSALS:
                hint = "VOD refuses handles that it has just given out: check sub_app_id of this source"
                self._repeats.say("error", "confirm.refused", cause=f"refused {source}", hint=hint, **fields)
                return
        level: Level = "error" if isinstance(error, OperatorError) or not is_known else "warning"
        cause = f"{source} {type(error).__name__} {fields.get('error_code', '')}"
        self._repeats.say(level, "confirm.failed", cause=cause, exc_info=None if is_known else error, **fields)


_RESULTS: Mapping[type[Exception], ConfirmResult] = {  # the first that fits counts
    RefusedHandlesError: ConfirmResult.REFUSED,
    _RefusedAfterLostAnswerError: ConfirmResult.REFUSED_AFTER_LOST,
    ThrottledError: ConfirmResult.THROTTLED,
    LeaseLostError: ConfirmResult.LEASE_ENDED,
    OperatorError: ConfirmResult.NOT_ALLOWED,
    StoppingError: ConfirmResult.STOPPING,
}


def _not_confirmed(error: Exception) -> Confirmation:
    result = next((it for kind, it in _RESULTS.items() if isinstance(error, kind)), ConfirmResult.NO_ANSWER)
    known = error if isinstance(error, VodpollerError) else VodpollerError(repr(error))
    return Confirmation(result=result, error_code=known.error_code, request_id=known.request_id, why=str(known))
