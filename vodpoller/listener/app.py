"""The WSGI application: the answer for each path, and the check of access."""

import binascii
import hmac
import json
import threading
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

from vodpoller.listener.metrics import exposition
from vodpoller.listener.page import STYLE_HASH, page
from vodpoller.listener.view import Access, View
from vodpoller.telemetry import Scope

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

USER: Final = "vodpoller"
DISK_REQUESTS: Final = 2  # maximum number of threads that use a disk; the others still answer if the disk hangs
_QUERY_FIELDS: Final = 30
_TEXT: Final = "text/plain; charset=utf-8"
_POLICY: Final = (
    f"default-src 'none'; style-src '{STYLE_HASH}'; img-src data:; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'"
)
_HEADERS: Final = (
    ("Content-Security-Policy", _POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a request."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = _TEXT
    headers: Mapping[str, str] = field(default_factory=dict)


class App:
    """Answers requests; never raises.

    Args:
        current: Returns what is shown; None while there is nothing to show: before the start, and during a reload.
        telemetry: Destination of log lines.
    """

    def __init__(self, current: Callable[[], View | None], telemetry: Scope) -> None:
        self._current = current
        self._telemetry = telemetry
        self._may_use_disk = threading.BoundedSemaphore(DISK_REQUESTS)
        self._paths: Mapping[str, Callable[[View, WSGIEnvironment], Answer]] = {
            "/metrics": _metrics,
            "/status.json": self._status,
            "/": self._page,
        }

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """The WSGI interface (PEP 3333)."""
        try:
            answer = self._answer(environ)
        except Exception as error:  # noqa: BLE001 - one request must not end the thread that serves others
            self._telemetry.repeated("error", "task.failed", cause=repr(error), task="listener", exc_info=error)
            answer = _text_answer(HTTPStatus.INTERNAL_SERVER_ERROR, "this request failed; the log says why")
        own = [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body)))]
        start_response(f"{answer.status} {answer.status.phrase}", [*own, *answer.headers.items(), *_HEADERS])
        return [answer.body]

    def _answer(self, environ: "WSGIEnvironment") -> Answer:
        if environ["REQUEST_METHOD"] != "GET":
            return _text_answer(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is answered", Allow="GET")
        view, path = self._current(), environ["PATH_INFO"]
        match path:
            case "/healthz":
                return _health(view)
            case "/readyz":
                return _readiness(view)
        if view is None:
            return _text_answer(
                HTTPStatus.SERVICE_UNAVAILABLE, "the daemon is starting or stopping", **{"Retry-After": "1"}
            )
        return _refusal(view.access, environ) or self._permitted(view, path, environ)

    def _permitted(self, view: View, path: str, environ: "WSGIEnvironment") -> Answer:
        answer = self._paths.get(path)
        if answer is None:
            known = ", ".join(("/healthz", "/readyz", *self._paths))
            return _text_answer(HTTPStatus.NOT_FOUND, f"this page does not exist; the pages are {known}")
        return answer(view, environ)

    def _status(self, view: View, _environ: "WSGIEnvironment") -> Answer:
        return self._with_disk(lambda: Answer(body=_json(view.report()), content_type="application/json"))

    def _page(self, view: View, environ: "WSGIEnvironment") -> Answer:
        query = dict(parse_qsl(environ.get("QUERY_STRING", ""), max_num_fields=_QUERY_FIELDS))
        return self._with_disk(lambda: Answer(body=page(view, query), content_type="text/html; charset=utf-8"))

    def _with_disk(self, answer: Callable[[], Answer]) -> Answer:
        """Make an answer that may wait for a disk, but not in more threads than `DISK_REQUESTS` at the same time."""
        if not self._may_use_disk.acquire(blocking=False):
            return _text_answer(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "too many requests at the same time; if this lasts, the disk of the journal does not respond",
                **{"Retry-After": "1"},
            )
        try:
            return answer()
        finally:
            self._may_use_disk.release()


def _health(view: View | None) -> Answer:
    """The condition of the watchdog: no thread is overdue. It does not depend on VOD, on sinks or on the disk."""
    overdue = view.overdue() if view is not None else {}
    if not overdue:
        return Answer(body=b"ok")
    text = "; ".join(f"{step} is overdue by {secs:.0f} s" for step, secs in overdue.items())
    return _text_answer(HTTPStatus.SERVICE_UNAVAILABLE, text)


def _readiness(view: View | None) -> Answer:
    if view is not None and view.is_ready():
        return Answer(body=b"ok")
    return _text_answer(HTTPStatus.SERVICE_UNAVAILABLE, "the daemon is starting or stopping")


def _refusal(access: Access, environ: "WSGIEnvironment") -> Answer | None:
    """The answer that denies this request; None if it is permitted."""
    host = environ.get("HTTP_HOST", "")
    if _without_port(host).lower() not in access.hosts:
        return _text_answer(HTTPStatus.MISDIRECTED_REQUEST, "this host is not one of listener.hosts")
    if access.password is None or _has_password(access.password.get(), environ.get("HTTP_AUTHORIZATION", "")):
        return None
    return _text_answer(
        HTTPStatus.UNAUTHORIZED,
        f"log in as user {USER} with the password in listener.password_file",
        **{"WWW-Authenticate": 'Basic realm="vodpoller", charset="UTF-8"'},
    )


def _without_port(host: str) -> str:
    """A host of the header `Host`, without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isascii() and port.isdecimal() else host


def _has_password(password: str, authorization: str) -> bool:
    """Whether the header holds the password. The time of the comparison does not reveal which part is right."""
    scheme, _, encoded = authorization.partition(" ")
    try:
        given = b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        given = b""
    is_right = hmac.compare_digest(given, f"{USER}:{password}".encode())
    return is_right and scheme.lower() == "basic"


def _metrics(view: View, environ: "WSGIEnvironment") -> Answer:
    content_type, body = exposition(view, environ.get("HTTP_ACCEPT", ""))
    return Answer(body=body, content_type=content_type)


def _json(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _text_answer(status: HTTPStatus, text: str, **headers: str) -> Answer:
    return Answer(body=f"{text}\n".encode(errors="replace"), status=status, headers=headers)
