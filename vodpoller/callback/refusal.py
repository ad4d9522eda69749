"""The reasons for which a request is refused because it is not a callback of VOD, and their HTTP status."""

from dataclasses import dataclass
from http import HTTPStatus

from vodpoller.settlement import CallbackResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One reason for which a request is refused.

    Args:
        status: The status of the answer.
        result: The result under which it is counted.
        cause: The cause, as one word for the log.
        hint: What it may mean and what the operator can do; empty: no line is logged.
    """

    status: HTTPStatus
    result: CallbackResult
    cause: str
    hint: str


class RefusedError(Exception):
    """A request is refused.

    Args:
        refusal: The reason.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.hint)
        self.refusal = refusal


def _not_an_event(status: HTTPStatus, cause: str, hint: str) -> Refusal:
    return Refusal(status=status, result=CallbackResult.NOT_AN_EVENT, cause=cause, hint=hint)


NOT_HTTP = _not_an_event(HTTPStatus.BAD_REQUEST, "not_http", "a client sent something that is not an HTTP/1.1 request")
TLS = _not_an_event(
    HTTPStatus.BAD_REQUEST,
    "tls",
    "a client speaks TLS, but this port does not: put a proxy in front of it (see systemd/README.md), or use http:// in"
    " the callback URL in VOD",
)
TOO_SLOW = _not_an_event(HTTPStatus.REQUEST_TIMEOUT, "too_slow", "a request was not complete within 5 s")
CUT_OFF = _not_an_event(HTTPStatus.BAD_REQUEST, "cut_off", "a client closed its connection in the middle of a request")
NOTHING = _not_an_event(HTTPStatus.BAD_REQUEST, "nothing", "")  # a port scan, or the check of a load balancer
PATH = _not_an_event(
    HTTPStatus.NOT_FOUND, "path", "no source has this path: is it the path of the callback URL that is set in VOD?"
)
METHOD = _not_an_event(HTTPStatus.METHOD_NOT_ALLOWED, "method", "VOD sends callbacks by POST")
TOO_LARGE = _not_an_event(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", "a body is far larger than the bodies of VOD's callbacks"
)
NOT_JSON = _not_an_event(HTTPStatus.BAD_REQUEST, "not_json", "a body is not JSON and does not look like an event")
NO_EVENT = _not_an_event(HTTPStatus.BAD_REQUEST, "no_event", "a body is JSON, but not an event of VOD")
NOT_ALLOWED = Refusal(
    status=HTTPStatus.FORBIDDEN,
    result=CallbackResult.NOT_ALLOWED,
    cause="not_allowed",
    hint="the client's address is not in allow_from; if it is one of your proxies, add it to forwarded_from",
)
BAD_SIGNATURE = Refusal(
    status=HTTPStatus.FORBIDDEN,
    result=CallbackResult.BAD_SIGNATURE,
    cause="bad_signature",
    hint="Sign is missing or does not belong to sign_key: is the key the same as in VOD?",
)
OLD_AND_UNSIGNED = Refusal(
    status=HTTPStatus.FORBIDDEN,
    result=CallbackResult.BAD_SIGNATURE,
    cause="old_format",
    hint="an event in the format 4.0, which has no Sign: set the callback format to 3.0 in VOD",
)
