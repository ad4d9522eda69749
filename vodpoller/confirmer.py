"""Confirming: the handles of one pull, together, while their lease lasts."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import tenacity

from vodpoller.errors import (
    LeaseLostError,
    OperatorError,
    RefusedHandlesError,
    ThrottledError,
    TransientError,
    VodpollerError,
)
from vodpoller.events import Lease
from vodpoller.logs import Level, Logger, Repeats

MAX_CALLS = 9
HANDLES_A_CALL = 16
SUSPICIOUS_REFUSALS = 3
FRESH_SHARE = 0.1


class ConfirmsEvents(Protocol):
    """The part of the VOD client that confirms."""

    def confirm(self, sub_app_id: int | None, handles: Sequence[str], timeout_secs: float | None = None) -> None:
        """One signed ConfirmEvents request; see `vod.VodClient.confirm`."""


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

    def confirm(self, source: str, sub_app_id: int | None, handles: Sequence[str], lease: Lease) -> frozenset[str]:
        """Confirm handles of one pull.

        Args:
            source: The source's name, for the log.
            sub_app_id: The source's SubAppId.
            handles: Any number, each once.
            lease: The lease they are under.

        Returns:
            The handles that VOD confirmed.
        """
        confirmed: set[str] = set()
        for first in range(0, len(handles), HANDLES_A_CALL):
            confirmed |= self._confirm_batch(source, sub_app_id, handles[first : first + HANDLES_A_CALL], lease)
        return frozenset(confirmed)

    def _confirm_batch(self, source: str, sub_app_id: int | None, handles: Sequence[str], lease: Lease) -> set[str]:
        confirmed: set[str] = set()
        parts = [handles]
        problem: VodpollerError | None = None
        for _ in range(MAX_CALLS):
            if not parts:
                break
            part = parts.pop(0)
            try:
                self._confirm_part(sub_app_id, part, lease)
                confirmed.update(part)
            except RefusedHandlesError as error:
                problem = error
                if len(part) > 1:
                    half = len(part) // 2
                    parts = [part[:half], part[half:], *parts]
            except _RefusedAfterLostAnswerError as error:
                problem = error
            except (TransientError, OperatorError, LeaseLostError) as error:
                problem = error
                break
        if problem is None:
            self._refused_in_a_row.pop(source, None)
        else:
            self._report(source, problem, unconfirmed=len(handles) - len(confirmed), of=len(handles), lease=lease)
        return confirmed

    def _confirm_part(self, sub_app_id: int | None, handles: Sequence[str], lease: Lease) -> None:
        """Confirm these together; the same set again after each transient error, while the lease lasts."""
        try:
            self._attempt(sub_app_id, handles, lease)
        except TransientError as error:
            self._repeat(sub_app_id, handles, lease, error)

    def _attempt(self, sub_app_id: int | None, handles: Sequence[str], lease: Lease) -> None:
        left_secs = lease.ends_at - self._monotonic()
        if left_secs <= 0:
            raise LeaseLostError("the lease ended before the events could be confirmed; VOD brings them again")
        self._vod.confirm(sub_app_id, handles, left_secs)

    def _repeat(self, sub_app_id: int | None, handles: Sequence[str], lease: Lease, first: TransientError) -> None:
        maybe_done = not isinstance(first, ThrottledError)

        def attempt() -> None:
            nonlocal maybe_done
            try:
                self._attempt(sub_app_id, handles, lease)
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
                raise

        self._sleep(0.05)
        tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=tenacity.wait_exponential(multiplier=0.1, max=1) + tenacity.wait_random_exponential(0.1, max=1),
            stop=lambda state: self._monotonic() + state.upcoming_sleep >= lease.ends_at,
            sleep=self._sleep,
            reraise=True,
        )(attempt)

    def _report(self, source: str, error: VodpollerError, *, unconfirmed: int, of: int, lease: Lease) -> None:
        fields = {
            "source": source,
            "handles": of,
            "unconfirmed": unconfirmed,
            "lease_left_secs": round(lease.ends_at - self._monotonic(), 3),
            **error.fields(),
        }
        # A stale handle is no fault while the lease is nearly over; fresh ones refused again and again are one.
        is_fresh = lease.ends_at - self._monotonic() > lease.secs * FRESH_SHARE
        if isinstance(error, RefusedHandlesError) and unconfirmed == of and is_fresh:
            refused = self._refused_in_a_row[source] = self._refused_in_a_row.get(source, 0) + 1
            if refused >= SUSPICIOUS_REFUSALS:
                hint = "VOD refuses handles that it has just given out: check sub_app_id of this source"
                self._repeats.say("error", "confirm.refused", cause=f"refused {source}", hint=hint, **fields)
                return
        level: Level = "error" if isinstance(error, OperatorError) else "warning"
        self._repeats.say(
            level, "confirm.failed", cause=f"{source} {type(error).__name__} {error.error_code}", **fields
        )
