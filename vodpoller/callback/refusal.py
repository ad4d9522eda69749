"""Why a request is not taken for a callback of VOD's, and the HTTP status that says so."""

from dataclasses import dataclass
from http import HTTPStatus

from vodpoller.settlement import CallbackResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One way of not being a callback.

    Args:
        status: What is answered.
        result: What it counts as.
        cause: One word for the log.
        hint: What it may mean and what to do, for a person; empty for what is not worth a line.
    """

    status: HTTPStatus
    result: CallbackResult
    cause: str
    hint: str


class RefusedError(Exception):
    """A request is refused.

    Args:
        refusal: Why.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.hint)
        self.refusal = refusal


def _not_an_event(status: HTTPStatus, cause: str, hint: str) -> Refusal:
    return Refusal(status=status, result=CallbackResult.NOT_AN_EVENT, cause=cause, hint=hint)


NOT_HTTP = _not_an_event(HTTPStatus.BAD_REQUEST, "not_http", "what came is not a request of HTTP/1.1")
TLS = _not_an_event(
    HTTPStatus.BAD_REQUEST,
    "tls",
    "a client speaks TLS, which this port does not: put a proxy before it (see systemd/README.md), or write http:// in"
    " the callback URL at VOD",
)
TOO_SLOW = _not_an_event(HTTPStatus.REQUEST_TIMEOUT, "too_slow", "a request did not come whole within 5 s")
CUT_OFF = _not_an_event(HTTPStatus.BAD_REQUEST, "cut_off", "a client closed its connection in the middle of a request")
NOTHING = _not_an_event(HTTPStatus.BAD_REQUEST, "nothing", "")  # a port scan, or a balancer that looks whether it is up
PATH = _not_an_event(
    HTTPStatus.NOT_FOUND, "path", "no source has this path: is it that of the callback URL which is set at VOD?"
)
METHOD = _not_an_event(HTTPStatus.METHOD_NOT_ALLOWED, "method", "VOD sends callbacks by POST")
TOO_LARGE = _not_an_event(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", "a body is far larger than those of VOD's callbacks"
)
NOT_JSON = _not_an_event(HTTPStatus.BAD_REQUEST, "not_json", "a body is not JSON and does not look like an event")
NO_EVENT = _not_an_event(HTTPStatus.BAD_REQUEST, "no_event", "a body is JSON, but not an event of VOD's")
NOT_ALLOWED = Refusal(
    status=HTTPStatus.FORBIDDEN,
    result=CallbackResult.NOT_ALLOWED,
    cause="not_allowed",
    hint="it comes from an address that is not in allow_from; if that is a proxy of yours, name it in forwarded_from",
)
BAD_SIGNATURE = Refusal(
    status=HTTPStatus.FORBIDDEN,
    result=CallbackResult.BAD_SIGNATURE,
    cause="bad_signature",
    hint="Sign is missing or does not belong to sign_key: is the key the one that is set at VOD?",
)
OLD_AND_UNSIGNED = Refusal(
    status=HTTPStatus.FORBIDDEN,
    result=CallbackResult.BAD_SIGNATURE,
    cause="old_format",
    hint="an event in the format 4.0, which has no Sign: set the callback format to 3.0 at VOD",
)
