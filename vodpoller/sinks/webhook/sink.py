"""Events as HTTP POST requests, signed as Standard Webhooks asks for.

Sources: "Standard Webhooks" specification (headers, signature, secrets), RFC 9110 (status codes, Retry-After).
"""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from contextlib import closing
from http import HTTPStatus
from urllib.parse import urljoin, urlsplit

import requests

from vodpoller import __version__
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events.event import Event
from vodpoller.httpclient.address import bracketed, environment_of, host_and_port, proxy_parts, shown_url
from vodpoller.httpclient.transport import CALL_ERRORS, DeadlineAdapter
from vodpoller.httpclient.trust import RootsError, validity
from vodpoller.httpclient.words import failure_text, retry_after_secs, status_text
from vodpoller.sinks.contract import Sink, SinkContext
from vodpoller.sinks.formats import content_type, encode
from vodpoller.sinks.webhook.config import WebhookConfig
from vodpoller.sinks.webhook.hiding import without_secrets
from vodpoller.sinks.webhook.signing import SECRET_HELP, signing_key

_REJECTING = frozenset({400, 413, 415, 422})
_ANSWER_MAX_BYTES = 1 << 16
_SHOWN_CHARACTERS = 200


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
                key = signing_key(secret)
            except ValueError as error:
                raise TransientError(
                    f"sinks.{self.name}.secret_file no longer holds a signing secret: {error} (right: {SECRET_HELP};"
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
        return without_secrets(text, self.config)


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
