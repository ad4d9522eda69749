"""The result of the confirm of one handle, and the errors with which it can end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vodpoller.errors import (
    LeaseLostError,
    OperatorError,
    RefusedHandlesError,
    StoppingError,
    ThrottledError,
    VodpollerError,
)
from vodpoller.settlement import ConfirmResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """The result of the confirm of one handle.

    Args:
        result: The result.
        error_code: Tencent's error code of the last call with the handle; empty if it succeeded or had no answer.
        request_id: Tencent's RequestId of that call; empty if it had no answer.
        why: The text of the last error; empty if there was none.
    """

    result: ConfirmResult
    error_code: str = ""
    request_id: str = ""
    why: str = ""


UNKNOWN: Final = Confirmation(result=ConfirmResult.NO_ANSWER, why="an unexpected error; see the log")


class RefusedAfterLostAnswerError(VodpollerError):
    """The handles were refused, but an earlier request with them may have confirmed them."""


def lease_ended() -> LeaseLostError:
    """The error for handles that were not confirmed in time."""
    return LeaseLostError("the lease ended before the events could be confirmed; VOD delivers them again")


def stopping() -> StoppingError:
    """The error for handles that no call had taken when the daemon stopped."""
    return StoppingError("the daemon's time to stop was over before the events could be confirmed")


def no_slot() -> ThrottledError:
    """The error for handles for which the quota had no slot in time."""
    return ThrottledError("ConfirmEvents was not sent: api.requests_per_sec left no room for it in time")


_RESULTS: Final[Mapping[type[Exception], ConfirmResult]] = {  # the first match counts
    RefusedHandlesError: ConfirmResult.REFUSED,
    RefusedAfterLostAnswerError: ConfirmResult.REFUSED_AFTER_LOST,
    ThrottledError: ConfirmResult.THROTTLED,
    LeaseLostError: ConfirmResult.LEASE_ENDED,
    OperatorError: ConfirmResult.NOT_ALLOWED,
    StoppingError: ConfirmResult.STOPPING,
}


def not_confirmed(error: Exception) -> Confirmation:
    """The result of a handle whose last call ended with this error."""
    result = next((it for kind, it in _RESULTS.items() if isinstance(error, kind)), ConfirmResult.NO_ANSWER)
    known = error if isinstance(error, VodpollerError) else VodpollerError(repr(error))
    return Confirmation(result=result, error_code=known.error_code, request_id=known.request_id, why=str(known))
