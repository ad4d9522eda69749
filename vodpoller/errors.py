"""The errors of vodpoller, named by what their caller does about them.

Every error may carry what Tencent Cloud answered: its `error_code` and the `request_id` that its support asks for.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

NO_KEY_RETRY_SECS: Final = 1.0  # a renewal that succeeds ends this wait earlier


class VodpollerError(Exception):
    """The base class of all errors that vodpoller raises on purpose.

    Args:
        message: One sentence for a person: what happened and, if it is known, what to do.
        error_code: Tencent's dotted error code, empty if the failure is not an API answer.
        request_id: Tencent's RequestId, empty if there is none.
    """

    def __init__(self, message: str, *, error_code: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.error_code = error_code
        self.request_id = request_id

    def fields(self) -> dict[str, str]:
        """The error as log fields; those without a value are left out."""
        fields = {"error_code": self.error_code, "request_id": self.request_id, "error_message": str(self)}
        return {name: value for name, value in fields.items() if value}


class TransientError(VodpollerError):
    """Try again.

    Args:
        retry_after_secs: Seconds for which the other side asked to get no request; None if it did not ask.
    """

    def __init__(
        self, message: str, *, retry_after_secs: float | None = None, error_code: str = "", request_id: str = ""
    ) -> None:
        super().__init__(message, error_code=error_code, request_id=request_id)
        self.retry_after_secs = retry_after_secs


class ThrottledError(TransientError):
    """Try again, and slower: the account's request quota is used up."""


class NoAnswerError(TransientError):
    """Try again: no answer came."""


class ForeignAnswerError(TransientError):
    """Try again: the HTTP status is an error, and the answer does not come from VOD itself."""


class NoKeyError(TransientError):
    """Try again: the temporary key expired or was refused, and a new one is requested. The request had no effect."""


class OperatorError(VodpollerError):
    """A person must act (credentials, rights, SubAppId): log an error, back off for long, do not exit.

    Args:
        message: What happened, maybe with what to do.
        advice: What to do, if the message leaves that out; it is part of the error's text.
    """

    def __init__(self, message: str, *, advice: str = "", error_code: str = "", request_id: str = "") -> None:
        text = f"{message} | {advice}" if advice else message
        super().__init__(text, error_code=error_code, request_id=request_id)
        self.message = message
        self.advice = advice


class StoppingError(VodpollerError):
    """The daemon is stopping: the request was not sent."""


class RefusedHandlesError(VodpollerError):
    """ConfirmEvents refused its parameters: some handle is stale, or the SubAppId is wrong. Split the set."""


class RejectedError(VodpollerError):
    """The sink will never accept this event: dead-letter it."""


class SkippedError(VodpollerError):
    """The sink's configuration says that nothing is sent for this event: it counts as delivered."""


class PartialFailureError(VodpollerError):
    """A sink accepted some events of one call and not the others.

    Args:
        failures: The error of each event that was not accepted, by its position in the call.
    """

    def __init__(self, failures: Mapping[int, Exception]) -> None:
        super().__init__(f"{len(failures)} events were not accepted")
        self.failures = dict(failures)


class LeaseLostError(VodpollerError):
    """The lease ended before the confirm succeeded: leave the event, VOD delivers it again."""


class StorageError(VodpollerError):
    """The journal cannot take a write now (disk full, locked, read-only): leave the events with VOD."""


class JournalFullError(StorageError):
    """The journal has no room for some of the events of one call. All others of that call are stored.

    Args:
        message: As for every error.
        refused: The keys of the events of which something was not stored: leave these with VOD.
    """

    def __init__(self, message: str, *, refused: Collection[bytes]) -> None:
        super().__init__(message)
        self.refused = frozenset(refused)


class JournalError(VodpollerError):
    """The journal cannot be opened now (another daemon has it, the disk is full): exit 1, since that may pass."""


class UnusableJournalError(JournalError):
    """The journal cannot be used until a person acts (corrupt, of a later version, in a wrong place): exit 78."""


class ConfigError(VodpollerError):
    """The configuration cannot be used: exit 78.

    Args:
        problems: One line each: `file: key: what is wrong (what would be right)`.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)
