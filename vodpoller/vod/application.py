"""Facts that VOD reports about an application: how it sends its events, and the number of events that wait.

Facts are from Tencent Cloud's API documents "DescribeEventConfig" and "DescribeEventsState" (product/266/57589), and
from the descriptions in tencentcloud-sdk-python-vod 3.1.194.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vodpoller.errors import TransientError
from vodpoller.vod.answers import Answer, response_of

EVENT_CONFIG: Final = "DescribeEventConfig"
EVENTS_STATE: Final = "DescribeEventsState"
STATE_REQUESTS_PER_SEC: Final = 20.0  # the quota of EVENTS_STATE; that of EVENT_CONFIG is 100, as for pulls

_SWITCHES: Final[Mapping[str, str]] = {
    "NewFileUpload": "UploadMediaCompleteEventSwitch",
    "FileDeleted": "DeleteMediaCompleteEventSwitch",
    "PersistenceComplete": "PersistenceCompleteEventSwitch",
}
SWITCHED_TYPES: Final = tuple(_SWITCHES)
"""The event types whose switches are in `EventConfig`. Those of all other types are only visible in VOD's console."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventConfig:
    """How an application sends its events.

    Args:
        mode: "PULL": reliable callbacks; "PUSH": normal callbacks, so that no event can be pulled; other values are not
            documented.
        notification_url: The URL that receives normal callbacks; empty if there is none. Its path and query may be a
            secret.
        off: The types of `SWITCHED_TYPES` that are switched off.
        request_id: Tencent's RequestId; empty if the answer has none.
    """

    mode: str
    notification_url: str
    off: tuple[str, ...]
    request_id: str


def event_config_in(answer: Answer) -> EventConfig:
    """Read an answer to EVENT_CONFIG that has no error code. Missing members count as empty and as not switched off.

    Raises:
        TransientError: It is not an answer of VOD.
    """
    response = response_of(answer)
    return EventConfig(
        mode=_text(response.get("Mode")),
        notification_url=_text(response.get("NotificationUrl")),
        off=tuple(event_type for event_type, member in _SWITCHES.items() if response.get(member) == "OFF"),
        request_id=answer.request_id,
    )


def waiting_events_in(answer: Answer) -> int:
    """Read an answer to EVENTS_STATE that has no error code: the number of events that wait to be pulled.

    Raises:
        TransientError: It is not an answer of VOD, or contains no valid number.
    """
    number = response_of(answer).get("CountOfEventsToPull")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise TransientError(
            f"CountOfEventsToPull is not a number of events: {answer.excerpt!r}", request_id=answer.request_id
        )
    return number


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
