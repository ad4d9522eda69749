"""Events as HTTP POST requests, signed as Standard Webhooks asks for.

Sources: "Standard Webhooks" specification (headers, signature, secrets), RFC 9110 (status codes, Retry-After).
"""

import base64
import binascii
import hashlib
import hmac
import html
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from http import HTTPStatus
from typing import Annotated, Final, Literal
from urllib.parse import parse_qsl, quote, unquote, urljoin, urlsplit

import requests
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from vodpoller import __version__
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events.event import Event
from vodpoller.httpclient.address import bracketed, environment_of, host_and_port, proxy_parts, shown_url
from vodpoller.httpclient.transport import CALL_ERRORS, DeadlineAdapter
from vodpoller.httpclient.trust import CaFile, RootsError, validity
from vodpoller.httpclient.words import failure_text, retry_after_secs, status_text
from vodpoller.secret import Secret
from vodpoller.sinks.contract import Sink, SinkConfig, SinkContext
from vodpoller.sinks.formats import content_type, encode

_REJECTING = frozenset({400, 413, 415, 422})
_ANSWER_MAX_BYTES = 1 << 16
_SHOWN_CHARACTERS = 200
_HIDDEN_FROM_CHARACTERS: Final = 8  # what is shorter would be found in words that are not secret
_HIDDEN_PATH_FROM_CHARACTERS: Final = 20

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
        description="Where requests go: http or https. Credentials belong in `headers`.",
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
    ca_file: CaFile | None = Field(
        default=None,
        description="PEM with the certificates that vouch for the receiver's, in place of the public CAs'. Left out:"
        " $SSL_CERT_FILE and $SSL_CERT_DIR, then $REQUESTS_CA_BUNDLE, then the public CAs. Read again at SIGHUP.",
        examples=["/etc/vodpoller/ca.pem"],
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=300)] = Field(
        default=5.0, description="Time limit of a request, from the name lookup to the end of the answer."
    )
    concurrency: Annotated[int, Field(ge=1, le=512)] = Field(
        default=8, description="Maximum number of requests at the same time."
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
                problem = {"why": f"it is not a signing secret: {error} (right: {_SECRET_HELP})", "key": key}
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


class WebhookSink(Sink[WebhookConfig]):
    """Posts each event to a URL.

    An answer of 2xx accepts. 400, 413, 415 and 422 say that this event will never be taken; all else may pass.
    Redirects are not followed, cookies not kept. The proxies of the environment are looked up once, what vouches for
    certificates is read again at `reopen`. A request may be sent twice (see `DeadlineAdapter`): its `webhook-id` says
    that it is the same.

    Args:
        name: Of the sink.
        config: Its settings.
        context: The log and the clocks; its wall clock is the time that is sent.

    Raises:
        ConfigError: What the environment says of proxies or certificates cannot be used.
    """

    Config = WebhookConfig

    def __init__(self, name: str, config: WebhookConfig, context: SinkContext) -> None:
        super().__init__(name, config, context)
        self.concurrency = config.concurrency
        self.batch_events = 1
        self.timeout_secs = config.timeout_secs
        self._closed = False
        self._signing: tuple[str, bytes] = ("", b"")
        headers = {
            "User-Agent": f"vodpoller/{__version__}",
            **config.headers,
            "Content-Type": content_type(config.format),
        }
        self._template = requests.Request("POST", config.url, headers=headers).prepare()
        self._environment = environment_of(config.url)
        if self._environment.problem:
            raise ConfigError([f"sinks.{name}.url: {self._environment.problem}"])
        self._adapter = DeadlineAdapter(
            connections=config.concurrency, ca_file=config.ca_file, monotonic=context.monotonic
        )
        if urlsplit(config.url).scheme == "https":
            try:
                self._adapter.check_roots()
            except RootsError as error:
                raise ConfigError([f"sinks.{name}.url: {error}"]) from None
        self._where = _where(config.url, self._environment.proxy)

    @classmethod
    def probe(cls, name: str, config: WebhookConfig, context: SinkContext) -> str:
        """Whether a connection can be made and, for https, its certificate be trusted. No request is sent.

        If a proxy is in between, a connection to the proxy is all that can be had without a request.
        """
        sink = cls(name, config, context)
        try:
            return sink._reach()
        finally:
            sink.close()

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Post one event."""
        (event,) = events
        if self._closed:
            raise TransientError(f"{self._where}: the sink is closed")
        request = self._request(event)
        try:
            response = self._adapter.send_within(request, self._environment, timeout_secs)
        # Not chained: the texts of these exceptions hold the whole URL, whose query may be a secret.
        except CALL_ERRORS as error:
            said = self._without_secrets(failure_text(error, timeout_secs))
            raise TransientError(f"{self._where} {said}") from None
        answer = _read_bounded(response)
        if not 200 <= response.status_code < 300:  # noqa: PLR2004 - RFC 9110, section 15.3: these are success
            raise self._refusal(response, answer)

    def reopen(self) -> None:
        """Read what vouches for certificates again.

        Raises:
            ConfigError: It cannot be read; what was read before stays in use.
        """
        self._adapter.reread_roots(f"sinks.{self.name}.ca_file")

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their answer is in."""
        self._closed = True
        self._adapter.close()

    def _reach(self) -> str:
        url, proxy = self.config.url, self._environment.proxy
        where = f"the proxy {host_and_port(proxy)}" if proxy else self._where
        try:
            ends_at = self._adapter.connect_within(url, self._environment, self.timeout_secs)
        # Not chained, as in `deliver`.
        except CALL_ERRORS as error:
            said = self._without_secrets(failure_text(error, self.timeout_secs))
            raise ConfigError([f"sinks.{self.name}.url: {where} {said}"]) from None
        if proxy:
            return f"{where} accepts connections (what is behind it was not tried)"
        if ends_at is None:
            return f"{where} accepts connections"
        valid = validity(ends_at, self.context.wall())
        return f"{where} accepts connections, its certificate is trusted, and {valid}"

    # --- asking ---

    def _request(self, event: Event) -> requests.PreparedRequest:
        body = encode(event, self.config.format)
        message_id = event.key.hex()
        timestamp = str(int(self.context.wall()))
        request = self._template.copy()
        request.body = body
        request.headers["Content-Length"] = str(len(body))
        request.headers["webhook-id"] = message_id
        request.headers["webhook-timestamp"] = timestamp
        if self.config.secret is not None:
            signed = f"{message_id}.{timestamp}.".encode() + body
            digest = hmac.digest(self._key(self.config.secret.get()), signed, hashlib.sha256)
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
                    f"sinks.{self.name}.secret_file no longer holds a signing secret: {error} (right: {_SECRET_HELP};"
                    " then reload)"
                ) from None
            self._signing = (secret, key)
        return key

    # --- saying what came of it ---

    def _refusal(self, response: requests.Response, answer: bytes) -> RejectedError | TransientError:
        status = response.status_code
        said = f"{self._where} answered {status_text(status)}"
        if status in _REJECTING:
            text = " ".join(self._without_secrets(answer.decode(errors="replace")).split())[:_SHOWN_CHARACTERS]
            return RejectedError(f"{said}: {text}" if text else said)
        location = response.headers.get("Location")
        if 300 <= status < 400 and location:  # noqa: PLR2004 - RFC 9110, section 15.4: these are redirects
            target = self._without_secrets(_target(self.config.url, location))[:_SHOWN_CHARACTERS]
            return TransientError(
                f"{said} and points to {target}: redirects are not followed"
                f" (put the right address into sinks.{self.name}.url)"
            )
        return TransientError(
            f"{said}{self._advice(status)}", retry_after_secs=retry_after_secs(response.headers, self.context.wall())
        )

    def _advice(self, status: int) -> str:
        match status:
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                return f" (does it expect other headers or another secret than sinks.{self.name} has?)"
            case HTTPStatus.NOT_FOUND | HTTPStatus.METHOD_NOT_ALLOWED | HTTPStatus.GONE:
                return f" (is sinks.{self.name}.url the right address for POST?)"
            case HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
                return " (the proxy wants other credentials than $http_proxy or $https_proxy give)"
            case _:
                return ""

    def _without_secrets(self, text: str) -> str:
        """A receiver may echo what it was sent."""
        hidden = {form for value in self._secrets() for form in _forms(value) if len(form) >= _HIDDEN_FROM_CHARACTERS}
        for form in sorted(hidden, key=len, reverse=True):
            text = text.replace(form, "***")
        return text

    def _secrets(self) -> Iterator[str]:
        """All that may be one: the values of headers and what is in them, the signing secret, parts of the URL."""
        for value in self.config.headers.values():
            yield value
            yield from _tokens(value)
        if self.config.secret is not None:
            yield self.config.secret.get()
            yield self.config.secret.get().removeprefix(_SECRET_PREFIX)
        parts = urlsplit(self.config.url)
        yield parts.query
        yield from (value for _, value in parse_qsl(parts.query))
        # Robots of chat programs have their token in the path.
        yield from (part for part in parts.path.split("/") if len(part) >= _HIDDEN_PATH_FROM_CHARACTERS)


def _tokens(value: str) -> Iterator[str]:
    """The parts of a header's value that may be a secret of their own, such as TOKEN in "Bearer TOKEN"."""
    yield from re.split(r"[\s,;=\"]+", value)
    scheme, _, encoded = value.partition(" ")
    if scheme.lower() == "basic":  # RFC 7617: base64 of user:password
        try:
            decoded = base64.b64decode(encoded, validate=True).decode(errors="replace")
        except (binascii.Error, ValueError):
            return
        yield decoded
        yield decoded.partition(":")[2]


def _forms(value: str) -> tuple[str, ...]:
    """As it is, and as JSON, HTML and URLs may write it."""
    return value, value.replace("/", "\\/"), html.escape(value), quote(value, safe=""), unquote(value)


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


def _where(url: str, proxy: str) -> str:
    """Host and port, as errors name them."""
    where = host_and_port(url)
    return f"{where} (by the proxy {bracketed(proxy_parts(proxy).hostname)})" if proxy else where


def _target(url: str, location: str) -> str:
    """Where a redirect points."""
    try:
        return shown_url(urljoin(url, location))
    except ValueError:
        return "an address that cannot be read"


def _read_bounded(response: requests.Response) -> bytes:
    """The answer's body, as far as it is wanted. The status is in, so that what fails here changes nothing any more."""
    with closing(response):  # a connection whose answer was read to its end is in the pool by then and stays open
        try:
            body: bytes = response.raw.read(_ANSWER_MAX_BYTES, decode_content=False)
        except CALL_ERRORS:
            return b""
    return body
