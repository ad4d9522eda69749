"""The meaning of an answer: events, a temporary refusal, a refusal that needs an operator, or not an answer of VOD.

Facts are from Tencent Cloud's API documents "PullEvents" (product/266/34183), "ConfirmEvents" (266/34184), "Common
error codes" and "Request structure", and from the code of public consumers of the API.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import requests

from vodpoller.errors import (
    ForeignAnswerError,
    NoAnswerError,
    NoKeyError,
    OperatorError,
    RefusedHandlesError,
    ThrottledError,
    TransientError,
    VodpollerError,
)
from vodpoller.events.codec import UnreadableError, decode_json
from vodpoller.events.event import Lease, Malformed, PulledEvent
from vodpoller.httpclient.address import shown_url
from vodpoller.httpclient.transport import was_repeated
from vodpoller.httpclient.words import REDIRECTS, http_date, retry_after_secs

ANSWER_TOO_LARGE: Final = "AnswerTooLarge"
EVENTS_MAX: Final = 1000  # far more than the 16 that VOD sends at most
PULL: Final = "PullEvents"
CONFIRM: Final = "ConfirmEvents"

_EXCERPT_CHARS: Final = 100
_MESSAGE_CHARS: Final = 300
_NAME_CHARS: Final = 100  # maximum length of an error code or RequestId; those of VOD have at most 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """The result of one PullEvents.

    Args:
        events: 0 to 16 events.
        malformed: The elements that cannot be read as events.
        lease: The time in which the handles can be confirmed.
        hung_secs: Time from sending the request to the end of the answer; VOD holds it up to 5 s if its queue is empty.
        request_id: Tencent's RequestId; empty if the answer has none.
        may_lack_events: Whether VOD may have sent more events than these: the answer cannot be read completely, or the
            request was sent twice.
    """

    events: tuple[PulledEvent, ...]
    malformed: tuple[Malformed, ...]
    lease: Lease
    hung_secs: float
    request_id: str
    may_lack_events: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One HTTP answer and its parsed content.

    Args:
        sent_at: Monotonic time at which sending the request began.
        took_secs: Seconds from `sent_at` until the body was read.
        status: The HTTP status.
        headers: The HTTP headers.
        body: The received part of the body, without its content encoding.
        cut: Why the body is incomplete; empty if it is complete.
        unreadable: Why the body is not valid JSON; empty if it is.
        response: The member `Response`; None if there is none.
        error_code: `Code` of `Response.Error`; None if the answer has no error.
        error_message: `Message` of `Response.Error`.
        request_id: Tencent's RequestId; empty if there is none.
        repeated: Whether the request was sent twice; the first one may have been carried out.
    """

    sent_at: float
    took_secs: float
    status: int
    headers: Mapping[str, str]
    body: bytes
    cut: str
    unreadable: str
    response: Mapping[str, Any] | None
    error_code: str | None
    error_message: str
    request_id: str
    repeated: bool

    @property
    def excerpt(self) -> str:
        """The beginning of the body, for messages."""
        return self.body[: 4 * _EXCERPT_CHARS].decode(errors="replace")[:_EXCERPT_CHARS]


def take_apart(response: requests.Response, body: bytes, cut: str, *, sent_at: float, took_secs: float) -> Answer:
    """Parse an answer. Content-Type is ignored: that of VOD may have a charset, or be another type.

    Args:
        response: Status and headers; its body has already been read.
        body: The received part of the body.
        cut: Why the body is incomplete; empty if it is complete.
        sent_at: Monotonic time at which sending the request began.
        took_secs: Seconds from `sent_at` until the body was read.
    """
    unreadable = ""
    document: Any = None
    try:
        document = decode_json(body.decode())
    except (UnreadableError, UnicodeDecodeError) as error:
        unreadable = str(error)
    inner = document.get("Response") if isinstance(document, dict) else None
    answered = inner if isinstance(inner, dict) else None
    error_code, error_message = _error_in(answered)
    request_id = answered.get("RequestId") if answered else None
    return Answer(
        sent_at=sent_at,
        took_secs=took_secs,
        status=response.status_code,
        headers=response.headers,
        body=body,
        cut=cut,
        unreadable=unreadable,
        response=answered,
        error_code=error_code,
        error_message=error_message,
        request_id=str(request_id)[:_NAME_CHARS] if isinstance(request_id, str | int) else "",
        repeated=was_repeated(response),
    )


def _error_in(response: Mapping[str, Any] | None) -> tuple[str | None, str]:
    error = response.get("Error") if response else None
    if error is None:
        return None, ""
    if not isinstance(error, dict):
        return "", str(error)[:_MESSAGE_CHARS]
    return str(error.get("Code") or "")[:_NAME_CHARS], str(error.get("Message") or "")[:_MESSAGE_CHARS]


def refusal_in(action: str, answer: Answer, key_renewal: str) -> VodpollerError:
    """The error for an answer with an error code.

    Args:
        action: The API's name of the action.
        answer: The answer to a request of that action.
        key_renewal: What the operator must do after replacing the key, so that the new key is used.
    """
    code = answer.error_code or ""
    text = answer.error_message
    message = f"{action} was refused with {code or 'an error without a code'}: {text}"
    request_id = answer.request_id
    if is_throttling(answer):
        retry_after_secs = _retry_after_secs(answer)
        return ThrottledError(message, retry_after_secs=retry_after_secs, error_code=code, request_id=request_id)
    if action == CONFIRM and _is_about_handles(code, text):
        return RefusedHandlesError(message, error_code=code, request_id=request_id)
    if code.startswith(_FOR_OPERATORS):
        advice = _advice(action, code, text, key_renewal)
        return OperatorError(message, advice=advice, error_code=code, request_id=request_id)
    return TransientError(message, retry_after_secs=_retry_after_secs(answer), error_code=code, request_id=request_id)


def is_refused_token(answer: Answer) -> bool:
    """Whether VOD refuses the token of a temporary key, because the token has expired or was revoked."""
    return answer.error_code == "AuthFailure.TokenFailure"


def is_missing_right(error: VodpollerError) -> bool:
    """Whether the only problem is that the key lacks the right to call the action.

    Args:
        error: An error that `refusal_in` returned.
    """
    return error.error_code.startswith(_NOT_ALLOWED)


def is_throttling(answer: Answer) -> bool:
    """Whether VOD, or a gateway in front of it, refuses the request because the quota is used up."""
    has_code = (answer.error_code or "").startswith("RequestLimitExceeded")
    return has_code or answer.status == HTTPStatus.TOO_MANY_REQUESTS


def response_of(answer: Answer) -> Mapping[str, Any]:
    """The `Response` of an answer without an error code.

    Raises:
        TransientError: `Response` is missing, or the HTTP status is not 200.
    """
    if answer.status != HTTPStatus.OK:
        raise _http_failure(answer)
    if answer.response is None:
        raise unusable_answer(answer)
    return answer.response


def unusable_answer(answer: Answer, why: str = "") -> TransientError:
    """The error for an answer that cannot be used.

    Args:
        answer: The answer.
        why: What is wrong with it; empty: the reason that was found when it was parsed.
    """
    why = why or answer.cut or answer.unreadable or "it has no Response"
    return TransientError(
        f"the answer cannot be used ({why[:_MESSAGE_CHARS]}): {answer.excerpt!r}", request_id=answer.request_id
    )


def too_large_answer(answer: Answer) -> OperatorError:
    """The error for an answer that was cut because of its size, and in which no event is readable."""
    return OperatorError(
        f"the answer cannot be used ({answer.cut}, and its beginning holds no complete event): VOD's answers are far"
        f" smaller. Is api.endpoint right? Or does a proxy answer in its place? It begins: {answer.excerpt!r}",
        error_code=ANSWER_TOO_LARGE,
    )


def event_set(answer: Answer) -> list[Any]:
    """The elements of `EventSet` in an answer without an error code; none if `EventSet` is null or missing.

    Raises:
        TransientError: `Response` is missing, or it does not have the form of VOD's answer to a pull.
    """
    elements = response_of(answer).get("EventSet")
    if elements is None:
        return []
    if not isinstance(elements, list):
        raise TransientError(f"EventSet is not a list: {answer.excerpt!r}", request_id=answer.request_id)
    return elements


def check_number(events: int, answer: Answer) -> None:
    """Check that an answer does not hold more events than VOD ever sends.

    Raises:
        TransientError: There are too many. None of them has been delivered, so nothing is lost.
    """
    if events > EVENTS_MAX:
        raise TransientError(
            f"the answer holds more than {EVENTS_MAX} events, but VOD sends at most 16: is api.endpoint right?",
            request_id=answer.request_id,
        )


def _http_failure(answer: Answer) -> TransientError:
    """The error for an answer that is not from VOD itself, or whose body has no error code."""
    status = answer.status
    kind: type[TransientError] = ForeignAnswerError
    location = ""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        kind, what = ThrottledError, "VOD, or a gateway in front of it, limits the number of requests"
    elif status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        what = "the proxy requires a login: put user:password@ into the proxy URL of the environment"
    elif status == HTTPStatus.FORBIDDEN:
        what = "a proxy or firewall between this machine and VOD forbids the request"
    elif status in REDIRECTS:
        location = f" to {shown_url(answer.headers.get('Location', ''))[:_EXCERPT_CHARS]}"
        what = "the endpoint redirects; vodpoller does not follow, to protect the credentials: correct api.endpoint"
    elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        what = "VOD, or a gateway in front of it, has a fault"
    else:
        what = "this is not an answer of VOD: is api.endpoint right?"
    return kind(
        f"HTTP status {status}{location}: {what}: {answer.excerpt!r}",
        retry_after_secs=_retry_after_secs(answer),
        request_id=answer.request_id,
    )


def _retry_after_secs(answer: Answer) -> float | None:
    """The delay that `Retry-After` of the answer demands; a date in it is compared with the server's own date."""
    return retry_after_secs(answer.headers, http_date(answer.headers.get("Date")))


def is_empty_queue(answer: Answer) -> bool:
    """Whether the error means an empty queue: the code `ResourceNotFound`. Longer codes mean other things."""
    message = answer.error_message.lower()
    return answer.error_code == "ResourceNotFound" and (not message or "event" in message)


def _is_about_handles(code: str, message: str) -> bool:
    """Whether a refused confirm may succeed with fewer handles: the document only says "parameter error", 4000."""
    if _names_sub_app(code) or (_names_sub_app(message) and "handle" not in message.lower()):
        return False
    if code.startswith("InvalidParameter") or code in {"4000", "ResourceNotFound"}:
        return True
    return "handle" in code.lower() or (code == "FailedOperation" and "handle" in message.lower())


def _names_sub_app(text: str) -> bool:
    return "subappid" in text.lower()


# The key is correct, but its owner lacks the right to the action.
_NOT_ALLOWED: Final = ("UnauthorizedOperation", "AuthFailure.UnauthorizedOperation")

# Prefixes of codes of errors that do not end without an operator.
_FOR_OPERATORS: Final = (
    "ActionOffline",
    "AuthFailure",
    "FailedOperation.InvalidAccount",
    "FailedOperation.InvalidVodUser",
    "InvalidAction",
    "InvalidParameter",
    "IpInBlacklist",
    "IpNotInWhitelist",
    "MissingParameter",
    "NoSuchProduct",
    "NoSuchVersion",
    "ResourceNotFound",
    "Unauthorized",
    "UnknownParameter",
    "UnsupportedOperation",
    "UnsupportedProtocol",
    "UnsupportedRegion",
    "4000",
)

# Prefixes of error codes, and the label `code` under which a failed pull is counted; the first match counts.
_COUNTED_UNDER: Final = (
    ("RequestLimitExceeded", "request_limit"),
    ("AuthFailure.SignatureExpire", "clock"),
    ("AuthFailure.UnauthorizedOperation", "unauthorized"),
    ("AuthFailure", "auth"),
    ("Unauthorized", "unauthorized"),
    ("Ip", "unauthorized"),
    ("ResourceNotFound", "not_found"),
    ("FailedOperation.Invalid", "not_found"),
    ("Invalid", "parameter"),
    ("Missing", "parameter"),
    ("No", "parameter"),
    ("Un", "parameter"),
    ("ActionOffline", "parameter"),
    ("4000", "parameter"),
    (ANSWER_TOO_LARGE, "unusable"),
    ("", "internal"),
)
PULL_ERROR_CODES: Final = (*dict.fromkeys(code for _, code in _COUNTED_UNDER), "http", "connection")


def pull_error_code(error: Exception) -> str:
    """The label under which a failed pull is counted: one of `PULL_ERROR_CODES`."""
    match error:
        case ThrottledError():
            return "request_limit"
        case NoKeyError():
            return "auth"
        case VodpollerError() if error.error_code:
            return next(code for prefix, code in _COUNTED_UNDER if error.error_code.startswith(prefix))
        case ForeignAnswerError():
            return "http"
        case NoAnswerError() | OperatorError():  # OperatorError without a code: no request can be sent
            return "connection"
        case _:
            return "unusable"


_NO_VOD_USER: Final = "VOD is not activated for the account of this key: activate it, or use another account's key"
_RIGHTS: Final = "in CAM, grant {rights} to the owner of the key"

# Prefixes of error codes, and the advice for them; the first match counts, here and below.
_ADVICE_ON_KEY: Final = (
    ("AuthFailure.SecretIdNotFound", "the key does not exist or is disabled: {compare}, then {renew}"),
    ("AuthFailure.InvalidSecretId", "this is not a key of Tencent Cloud's API: {compare}, then {renew}"),
    ("AuthFailure.SignatureFailure", "secret_key does not belong to secret_id: copy both again, then {renew}"),
    ("AuthFailure.SignatureExpire", "the clock of this machine is wrong by more than 300 s: synchronize it (NTP)"),
    ("AuthFailure.TokenFailure", "the temporary token is wrong or has ended: renew it with its key, then {renew}"),
    ("AuthFailure.UnauthorizedOperation", _RIGHTS),
    ("AuthFailure", "check the key in the CAM console, then {renew}"),
    ("Unauthorized", _RIGHTS),
)
_ADVICE: Final = (
    ("FailedOperation.Invalid", _NO_VOD_USER),
    ("ResourceNotFound.UserNotExist", _NO_VOD_USER),
    ("ResourceNotFound", "does the SubAppId exist in this account? check sub_app_id"),
    ("UnsupportedRegion", "check api.region, or leave it out"),
    ("Ip", "allow the address of this machine in the account's access settings"),
    ("", "check api.endpoint and api.region, and whether there is a newer version of vodpoller"),
)
_SUB_APP: Final = (
    "check the source's sub_app_id: accounts created since 2023-12-25 must set it, and it must belong to the account"
)


def _advice(action: str, code: str, message: str, key_renewal: str) -> str:
    if _names_sub_app(code + message) or code.startswith(("InvalidParameter", "MissingParameter", "4000")):
        return _SUB_APP
    rights = f"vod:{PULL} and vod:{CONFIRM}" if action in (PULL, CONFIRM) else f"vod:{action}"
    return advice_on_key(code, rights, key_renewal) or next(
        advice for prefix, advice in _ADVICE if code.startswith(prefix)
    )


def advice_on_key(code: str, rights: str, key_renewal: str) -> str:
    """Advice for a refusal that concerns the key, its rights or this machine's clock; empty for any other.

    Args:
        code: The error code, of any service.
        rights: The rights that CAM must grant for the action, such as "vod:PullEvents".
        key_renewal: What the operator must do after replacing the key, so that the new key is used.
    """
    advice = next((advice for prefix, advice in _ADVICE_ON_KEY if code.startswith(prefix)), "")
    return advice.format(compare="compare secret_id with the CAM console", renew=key_renewal, rights=rights)
