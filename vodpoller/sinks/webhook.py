"""Events as HTTP POST requests, signed as Standard Webhooks asks for.

Sources: "Standard Webhooks" specification (headers, signature, secrets), RFC 9110 (status codes, Retry-After).
"""

import base64
import binascii
import hashlib
import hmac
import http.client
import io
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urljoin, urlsplit

import requests
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.exceptions import TimeoutError as Urllib3TimeoutError
from urllib3.poolmanager import ProxyManager

from vodpoller import __version__
from vodpoller.delivery import Sink
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events import Event
from vodpoller.secret import Secret
from vodpoller.sinks import SinkConfig, encode

_REJECTING = frozenset({400, 413, 415, 422})
_ANSWER_MAX_BYTES = 1 << 16
_SHOWN_CHARACTERS = 200
_PIECE_BYTES = 1 << 16
_RETRY_AFTER_MAX_SECS = 86_400.0

_SECRET_PREFIX = "whsec_"  # noqa: S105 - what every such secret starts with, not a secret
_SECRET_BYTES = range(24, 65)  # the specification's bounds
_SECRET_HELP = "whsec_ and base64 of 24 to 64 random bytes; `openssl rand -base64 32` makes one"  # noqa: S105 - as above

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[!-~]([ \t!-~]*[!-~])?")
_RESERVED_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class WebhookConfig(SinkConfig):
    """An HTTP receiver."""

    type: Literal["webhook"] = Field(description="Each event is the body of a POST request.")
    url: Annotated[str, Field(min_length=1, max_length=2048)] = Field(
        description="Where requests go: http or https. Credentials belong into `headers`.",
        examples=["https://app.example/vod/callback"],
    )
    secret_file: Annotated[str, Field(max_length=4096)] | None = Field(
        default=None, description="The file that holds the secret.", examples=["hook_secret"]
    )
    secret: Secret | None = Field(
        default=None,
        description="Signs the requests as Standard Webhooks describes: whsec_ and base64 of 24 to 64 bytes,"
        " or that base64 alone. Left out: requests are not signed.",
    )
    headers: Annotated[dict[str, str], Field(max_length=50)] = Field(
        default_factory=dict,
        repr=False,
        description="Sent with every request, such as Authorization. Their values are never shown.",
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=300)] = Field(
        default=5.0, description="How long a request may take in all, from the name lookup to the end of the answer."
    )
    concurrency: Annotated[int, Field(ge=1, le=512)] = Field(
        default=8, description="How many requests may be under way at once."
    )

    @field_validator("url")
    @classmethod
    def _can_be_posted_to(cls, value: str) -> str:
        example = "for example https://app.example/vod/callback"
        try:
            parts = urlsplit(value)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or not re.fullmatch(r"[!-~]+", value):
            raise ValueError(f"it is not an http or https address ({example})")
        if "@" in parts.netloc:
            raise ValueError(
                "it holds credentials, which would be shown in logs (put them into headers: Authorization)"
            )
        try:
            requests.Request("POST", value).prepare()
        except (requests.RequestException, ValueError):
            raise ValueError(f"it is not an http or https address ({example})") from None
        return value

    @field_validator("secret")
    @classmethod
    def _can_sign(cls, value: Secret | None, info: ValidationInfo) -> Secret | None:
        if value is not None:
            try:
                _signing_key(value.get())
            except ValueError as error:
                key = "secret_file" if info.data.get("secret_file") else ""
                problem = {"why": f"it is no signing secret: {error} (right: {_SECRET_HELP})", "key": key}
                raise PydanticCustomError("vodpoller", "{why}", problem) from None
        return value

    @field_validator("headers")
    @classmethod
    def _can_be_sent(cls, value: dict[str, str]) -> dict[str, str]:
        seen = set()
        for name, content in value.items():
            lower = name.lower()
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a header (letters, digits and hyphens)")
            if lower in _RESERVED_HEADERS or lower.startswith("webhook-"):
                raise ValueError(f"{name} is set by vodpoller itself (leave it out)")
            if lower in seen:
                raise ValueError(f"{name} is given twice (keep one of the two)")
            if not _HEADER_VALUE.fullmatch(content):
                raise ValueError(f"the value of {name} cannot be sent (printable ASCII, no blanks at either end)")
            seen.add(lower)
        return value


class WebhookSink(Sink):
    """Posts each event to a URL.

    An answer of 2xx accepts. 400, 413, 415 and 422 say that this event will never be taken; all else may pass.
    Redirects are not followed, cookies not kept. The proxies and the CA bundle of the environment are looked up once.

    Args:
        name: Of the sink.
        config: Its settings.
        wall: The time that is sent, in seconds since the epoch.
        monotonic: The clock of the time limit, in seconds.

    Raises:
        ConfigError: The CA bundle that the environment names does not exist.
    """

    Config = WebhookConfig

    def __init__(
        self,
        name: str,
        config: WebhookConfig,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.concurrency = config.concurrency
        self.batch_events = 1
        self.timeout_secs = config.timeout_secs
        self._name = name
        self._config = config
        self._wall = wall
        self._call = _Call(monotonic)
        self._closed = False
        self._signing: tuple[str, bytes] = ("", b"")
        headers = {"User-Agent": f"vodpoller/{__version__}", **config.headers, "Content-Type": "application/json"}
        self._template = requests.Request("POST", config.url, headers=headers).prepare()
        # The adapter is used without a session: what a session adds (redirects, cookies, a look at the environment and
        # at ~/.netrc for each request) must not happen here, and it reads the bodies of redirects without bound.
        with requests.Session() as session:
            surroundings = session.merge_environment_settings(config.url, {}, stream=True, verify=True, cert=None)
        self._proxies = surroundings["proxies"]
        self._verify: bool | str = surroundings["verify"] or True
        if isinstance(self._verify, str) and not Path(self._verify).exists():
            raise ConfigError(
                [f"sinks.{name}.url: $REQUESTS_CA_BUNDLE or $CURL_CA_BUNDLE is {self._verify}, which does not exist"]
            )
        self._adapter = _Adapter(self._call, connections=config.concurrency)
        self._where = _where(config.url, select_proxy(config.url, self._proxies))

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Post one event."""
        (event,) = events
        if self._closed:
            raise TransientError(f"{self._where}: the sink is closed")
        request = self._request(event)
        self._call.start(timeout_secs)
        try:
            response = self._adapter.send(
                request, stream=True, timeout=timeout_secs, verify=self._verify, proxies=self._proxies
            )
        # Not chained: the texts of these exceptions hold the whole URL, whose query may be a secret.
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            raise TransientError(self._sentence(error, timeout_secs)) from None
        answer = _read_bounded(response)
        if not 200 <= response.status_code < 300:  # noqa: PLR2004 - RFC 9110, section 15.3: these are success
            raise self._refusal(response, answer)

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their answer is in."""
        self._closed = True
        self._adapter.close()

    # --- asking ---

    def _request(self, event: Event) -> requests.PreparedRequest:
        body = encode(event, self._config.format)
        message_id = event.key.hex()
        timestamp = str(int(self._wall()))
        request = self._template.copy()
        request.body = body
        request.headers["Content-Length"] = str(len(body))
        request.headers["webhook-id"] = message_id
        request.headers["webhook-timestamp"] = timestamp
        if self._config.secret is not None:
            signed = f"{message_id}.{timestamp}.".encode() + body
            digest = hmac.digest(self._key(self._config.secret.get()), signed, hashlib.sha256)
            request.headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
        return request

    def _key(self, secret: str) -> bytes:
        """The secret's bytes; the file may have been read again since the last call."""
        known, key = self._signing
        if secret != known:
            try:
                key = _signing_key(secret)
            except ValueError as error:
                raise TransientError(
                    f"sinks.{self._name}.secret_file now holds no signing secret: {error} (right: {_SECRET_HELP};"
                    " then reload)"
                ) from None
            self._signing = (secret, key)
        return key

    # --- saying what came of it ---

    def _refusal(self, response: requests.Response, answer: bytes) -> RejectedError | TransientError:
        status = response.status_code
        said = f"{self._where} answered {status}{_phrase(status)}"
        if status in _REJECTING:
            text = " ".join(self._without_secrets(answer.decode(errors="replace")).split())[:_SHOWN_CHARACTERS]
            return RejectedError(f"{said}: {text}" if text else said)
        location = response.headers.get("Location")
        if 300 <= status < 400 and location:  # noqa: PLR2004 - RFC 9110, section 15.4: these are redirects
            target = self._without_secrets(_shown_target(self._config.url, location))[:_SHOWN_CHARACTERS]
            return TransientError(
                f"{said} and points to {target}: redirects are not followed"
                f" (put the right address into sinks.{self._name}.url)"
            )
        retry_after_secs = _retry_after_secs(response.headers, self._wall())
        return TransientError(f"{said}{self._advice(status)}", retry_after_secs=retry_after_secs)

    def _advice(self, status: int) -> str:
        match status:
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                return f" (does it expect other headers or another secret than sinks.{self._name} has?)"
            case HTTPStatus.NOT_FOUND | HTTPStatus.METHOD_NOT_ALLOWED | HTTPStatus.GONE:
                return f" (is sinks.{self._name}.url the right address for POST?)"
            case HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
                return " (the proxy wants other credentials than $http_proxy or $https_proxy give)"
            case _:
                return ""

    def _without_secrets(self, text: str) -> str:
        """A receiver may echo what it was sent."""
        secret = self._config.secret
        hidden = [*self._config.headers.values(), *([secret.get()] if secret else [])]
        for value in sorted(hidden, key=len, reverse=True):
            text = text.replace(value, "***")
        return text

    def _sentence(self, error: Exception, timeout_secs: float) -> str:
        said = (self._said_by(cause, timeout_secs) for cause in _causes(error))
        return f"{self._where} {next(filter(None, said), f'cannot be reached: {type(error).__name__}')}"

    def _said_by(self, cause: BaseException, timeout_secs: float) -> str:
        """What a person should know of the cause; empty where it only wraps another one."""
        said = ""
        match cause:
            case socket.gaierror():
                said = f"cannot be found: {cause.strerror} (is the name right, does DNS work?)"
            case ssl.SSLCertVerificationError():
                said = f"cannot be trusted: {cause.verify_message} (is its certificate right?)"
            case ssl.SSLError():
                said = f"failed at TLS: {cause.reason or 'it hung up'} (does it speak https?)"
            case TimeoutError() | Urllib3TimeoutError() if self._call.connecting:
                said = f"could not be reached within {timeout_secs:g} s (is a firewall in between?)"
            case TimeoutError() | Urllib3TimeoutError():
                said = f"did not answer within {timeout_secs:g} s"
            case ConnectionRefusedError():
                said = "refused the connection (is the receiver running?)"
            case http.client.HTTPException() | ConnectionError():
                said = "closed the connection without a whole answer"
            case OSError(strerror=str(why)):
                said = f"cannot be reached: {why}"
        return said


def _signing_key(secret: str) -> bytes:
    """The bytes that sign.

    Raises:
        ValueError: Says what is wrong with the secret without showing it.
    """
    text = secret.removeprefix(_SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not base64") from None
    if len(key) not in _SECRET_BYTES:
        raise ValueError(f"it is {len(key)} bytes long")
    return key


def _where(url: str, proxy: str | None) -> str:
    """Host and port, as errors name them."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    where = f"{_bracketed(parts.hostname)}:{port}"
    if not proxy:
        return where
    by = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return f"{where} (by the proxy {_bracketed(by.hostname)})"


def _bracketed(host: str | None) -> str:
    return f"[{host}]" if host and ":" in host else host or "?"


def _shown_target(url: str, location: str) -> str:
    """Where a redirect points, without what may be secret in it: credentials, query."""
    try:
        parts = urlsplit(urljoin(url, location))
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an address that cannot be read"
    return f"{parts.scheme}://{_bracketed(parts.hostname)}{port}{parts.path}"


def _phrase(status: int) -> str:
    try:
        return f" {HTTPStatus(status).phrase}"
    except ValueError:
        return ""


def _retry_after_secs(headers: Mapping[str, str], now: float) -> float | None:
    """RFC 9110, section 10.2.3: seconds or a date. More than a day counts as a day."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text), _RETRY_AFTER_MAX_SECS)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return min(max(at - now, 0.0), _RETRY_AFTER_MAX_SECS)


def _read_bounded(response: requests.Response) -> bytes:
    """The answer's body, as far as it is wanted. The status is in, so that what fails here changes nothing any more."""
    try:
        body: bytes = response.raw.read(_ANSWER_MAX_BYTES + 1, decode_content=False)
    except (HTTPError, OSError, ValueError, http.client.HTTPException):
        response.close()
        return b""
    if len(body) > _ANSWER_MAX_BYTES:
        response.close()
    return body[:_ANSWER_MAX_BYTES]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it wraps. requests and urllib3 keep them in `args`, `reason` or `__cause__`."""
    yield error
    for inner in (*error.args, getattr(error, "reason", None), error.__cause__):
        if isinstance(inner, BaseException):
            yield from _causes(inner)


# --- one time limit for a whole call ----------------------------------------------------------------------------------
# A socket's timeout starts anew with each operation: a receiver that sends one byte a second never runs into it. Here
# each operation gets what is left of the call's time.


class _Call(threading.local):
    """The call that the current thread is making.

    Args:
        monotonic: The clock, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._ends_at = 0.0
        self.connecting = False

    def start(self, timeout_secs: float) -> None:
        """A call begins."""
        self._ends_at = self._monotonic() + timeout_secs
        self.connecting = False

    def left_secs(self) -> float:
        """How long it may still take.

        Raises:
            TimeoutError: No time is left.
        """
        left_secs = self._ends_at - self._monotonic()
        if left_secs <= 0:
            raise TimeoutError("the time of the call is over")
        return left_secs


class _Answer(io.RawIOBase):
    """What a socket brings in, as long as the call has time. Stands in the socket's place for http.client.

    Args:
        sock: The socket.
        call: The call.
    """

    def __init__(self, sock: socket.socket, call: _Call) -> None:
        super().__init__()
        self._sock = sock
        self._call = call
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._call.left_secs())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Connection(HTTPConnection):
    """A connection whose every step keeps to the time limit of the call that it serves."""

    call: _Call

    def _new_conn(self) -> socket.socket:
        self.call.connecting = True
        addresses = _look_up(self.host, self.port or self.default_port, self.call.left_secs())
        failure: OSError = OSError("it has no address")
        for tried, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                # An address that swallows packets must leave time for the next one.
                sock.settimeout(self.call.left_secs() / (len(addresses) - tried))
                sock.connect(address)
                sock.settimeout(self.call.left_secs())
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        self.call.connecting = False
        for at in range(0, len(data), _PIECE_BYTES):
            self.sock.settimeout(self.call.left_secs())
            super().send(memoryview(data)[at : at + _PIECE_BYTES])

    def response_class(  # type: ignore[override] # http.client only calls it
        self, sock: socket.socket, *args: Any, **kwargs: Any
    ) -> http.client.HTTPResponse:
        return http.client.HTTPResponse(_Answer(sock, self.call), *args, **kwargs)  # type: ignore[arg-type] # as above


class _TlsConnection(_Connection, HTTPSConnection):
    """The same, encrypted."""


def _look_up(host: str, port: int, timeout_secs: float) -> list[tuple[Any, ...]]:
    """As socket.getaddrinfo, which takes no time limit of its own."""
    found: Future[list[tuple[Any, ...]]] = Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.set_exception(error)

    threading.Thread(target=look_up, name=f"lookup of {host}", daemon=True).start()
    return found.result(timeout_secs)


class _Adapter(HTTPAdapter):
    """Sends requests over connections that keep to the time limit.

    Args:
        call: Which call a thread is making.
        connections: How many are kept open.
    """

    def __init__(self, call: _Call, *, connections: int) -> None:
        class Plain(_Connection):
            pass

        class Tls(_TlsConnection):
            pass

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class TlsPool(HTTPSConnectionPool):
            ConnectionCls = Tls

        Plain.call = Tls.call = call
        self._pools = {"http": PlainPool, "https": TlsPool}
        super().__init__(pool_connections=1, pool_maxsize=connections, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        if isinstance(manager, ProxyManager):  # one for SOCKS has connections of its own
            manager.pool_classes_by_scheme = self._pools
        return manager
