"""Events as HTTP requests.

Sources: "Standard Webhooks" specification (headers), RFC 9110 (status codes, Retry-After).
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import requests

from vodpoller import __version__
from vodpoller.errors import ConfigError, RejectedError, SkippedError, TransientError
from vodpoller.events.codec import decode_json
from vodpoller.events.event import Event
from vodpoller.expressions import EvaluationError, Expression, encode_found
from vodpoller.httpclient.address import Environment, bracketed, environment_of, host_and_port, proxy_parts, shown_url
from vodpoller.httpclient.transport import CALL_ERRORS, DeadlineAdapter
from vodpoller.httpclient.trust import RootsError, validity
from vodpoller.httpclient.words import REDIRECTS, SUCCESS, failure_text, retry_after_secs, status_text
from vodpoller.sinks.contract import Sink, SinkContext
from vodpoller.sinks.formats import content_type, encode
from vodpoller.sinks.webhook.config import WebhookConfig
from vodpoller.sinks.webhook.hiding import without_secrets
from vodpoller.sinks.webhook.signing import dingtalk_query, feishu_members, problem_in_secret, standard_signature

_REJECTING_STATUSES = frozenset({400, 413, 415, 422})
_ANSWER_MAX_BYTES = 1 << 16
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """The URL of the requests, and what all of them have in common.

    Args:
        address: The URL, as configured.
        template: The request without a body.
        environment: The proxy and certificate settings of the environment for this URL.
    """

    address: str
    template: requests.PreparedRequest
    environment: Environment

    @classmethod
    def of(cls, config: WebhookConfig) -> Self:
        """Look up the proxies of the environment, and prepare what all requests have in common."""
        has_own_body = config.body is not None
        headers = {
            "User-Agent": f"vodpoller/{__version__}",
            **config.headers,
            "Content-Type": "application/json" if has_own_body else content_type(config.format),
        }
        return cls(
            address=config.address,
            template=requests.Request(config.method, config.address, headers=headers).prepare(),
            environment=environment_of(config.address),
        )

    @property
    def host(self) -> str:
        """Host and port, and the proxy, for texts of errors."""
        host, proxy = host_and_port(self.address), self.environment.proxy
        return f"{host} (through the proxy {bracketed(proxy_parts(proxy).hostname)})" if proxy else host


class WebhookSink(Sink[WebhookConfig]):
    """Sends each event, or the result of `body` for it, to a URL.

    An answer of 2xx accepts the event if `accept_when` holds. 400, 413, 415 and 422 reject it, and so does an answer
    for which `reject_when` holds. With `reject_when`, 400 alone does not reject, since robots also answer it if too
    many requests come. Every other failure is transient. Redirects are not followed, and cookies are not kept. The
    proxies of the environment are looked up once for a URL. The CA certificates, and the URL if it is in a file, are
    read again by `reopen`. A request may be sent twice (see `DeadlineAdapter`) with the same `webhook-id`.

    Args:
        name: Name of the sink.
        config: Its settings.
        context: The log and the clocks; its wall clock is the time that is sent.

    Raises:
        ConfigError: The proxy or certificate settings of the environment cannot be used.
    """

    Config = WebhookConfig

    def __init__(self, name: str, config: WebhookConfig, context: SinkContext) -> None:
        super().__init__(name, config, context)
        self.concurrency = config.concurrency
        self.batch_events = 1
        self.timeout_secs = config.timeout_secs
        self.max_per_minute = config.max_per_minute
        self._closed = False
        self._usable_secret = ""
        self._body = Expression(config.body) if config.body else None
        self._accept_when = Expression(config.accept_when) if config.accept_when else None
        self._reject_when = Expression(config.reject_when) if config.reject_when else None
        self._reads_answers = self._accept_when is not None or self._reject_when is not None
        self._rejecting_statuses = (
            _REJECTING_STATUSES - {HTTPStatus.BAD_REQUEST} if config.reject_when else _REJECTING_STATUSES
        )
        self._adapter = DeadlineAdapter(
            connections=config.concurrency, ca_file=config.ca_file, monotonic=context.monotonic
        )
        self._target = self._make_target()

    @classmethod
    def probe(cls, name: str, config: WebhookConfig, context: SinkContext) -> str:
        """Check that a connection is accepted and, for https, its certificate is trusted. No request is sent.

        If there is a proxy, only the connection to the proxy can be checked without a request.
        """
        sink = cls(name, config, context)
        try:
            return sink._check_connection()
        finally:
            sink.close()

    def examine(self, event: Event) -> None:
        """Evaluate `body` on the event; raise the error of `_content` if nothing can or should be sent for it."""
        if self._body is not None:
            self._content(event)

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Send one event."""
        (event,) = events
        target = self._target
        if self._closed:
            raise TransientError(f"{target.host}: the sink is closed")
        request = self._request(target, event)
        try:
            response = self._adapter.send_within(request, target.environment, timeout_secs)
            answer = self._read(response)
        # Not chained: the texts of these exceptions hold the whole URL, whose query may be a secret.
        except CALL_ERRORS as error:
            failure = self._without_secrets(failure_text(error, timeout_secs))
            raise TransientError(f"{target.host} {failure}") from None
        if response.status_code in SUCCESS and not self._reads_answers:  # the common case needs no texts
            return
        refusal = self._refusal(target, response, answer)
        if refusal is not None:
            raise refusal

    def reopen(self) -> None:
        """Take the URL as it was last read from its file, and read the trusted CA certificates again.

        Raises:
            ConfigError: They cannot be used; what was read before stays in use.
        """
        self._adapter.reread_roots(f"sinks.{self.name}.ca_file")
        if self.config.address != self._target.address:
            self._target = self._make_target()

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their answer has been read."""
        self._closed = True
        self._adapter.close()

    def _make_target(self) -> _Target:
        key = f"sinks.{self.name}.{self.config.address_key}"
        target = _Target.of(self.config)
        if target.environment.problem:
            raise ConfigError([f"{key}: {target.environment.problem}"])
        if urlsplit(target.address).scheme == "https":
            try:
                self._adapter.check_roots()
            except RootsError as error:
                raise ConfigError([f"{key}: {error}"]) from None
        return target

    def _check_connection(self) -> str:
        target, proxy = self._target, self._target.environment.proxy
        peer = f"the proxy {host_and_port(proxy)}" if proxy else target.host
        try:
            ends_at = self._adapter.connect_within(target.address, target.environment, self.timeout_secs)
        # Not chained, as in `deliver`.
        except CALL_ERRORS as error:
            failure = self._without_secrets(failure_text(error, self.timeout_secs))
            raise ConfigError([f"sinks.{self.name}.{self.config.address_key}: {peer} {failure}"]) from None
        if proxy:
            return f"{peer} accepts connections (the server behind it was not tried)"
        if ends_at is None:
            return f"{peer} accepts connections"
        valid = validity(ends_at, self.context.wall())
        return f"{peer} accepts connections, its certificate is trusted, and {valid}"

    # --- requests ---

    def _request(self, target: _Target, event: Event) -> requests.PreparedRequest:
        body = self._content(event)
        message_id = event.key.hex()
        now = self.context.wall()
        timestamp = str(int(now))
        request = target.template.copy()
        request.body = body
        request.headers["Content-Length"] = str(len(body))
        request.headers["webhook-id"] = message_id
        request.headers["webhook-timestamp"] = timestamp
        secret = self._secret()
        if secret and self.config.sign == "standard":
            signature = standard_signature(secret, message_id=message_id, timestamp=timestamp, body=body)
            request.headers["webhook-signature"] = signature
        if secret and self.config.sign == "dingtalk":
            url = str(request.url)
            request.url = f"{url}{'&' if urlsplit(url).query else '?'}{dingtalk_query(secret, now)}"
        return request

    def _content(self, event: Event) -> bytes:
        """The body of the event's request.

        Raises:
            SkippedError: Nothing is to be sent.
            RejectedError: `body` has no result for this event that can be sent.
            TransientError: The secret cannot be used.
        """
        if self._body is None:
            return encode(event, self.config.format)
        key = f"sinks.{self.name}.body"
        found = self._body.shape(event, key)
        if found is None:
            raise SkippedError(f"{key}: the result is null")
        if self.config.sign == "feishu":
            if not isinstance(found, dict):
                raise RejectedError(f"{key}: the result is not an object, so it cannot hold a signature for Feishu")
            found = {**found, **feishu_members(self._secret(), self.context.wall())}
        try:
            return encode_found(found)
        except EvaluationError as error:
            raise RejectedError(f"{key}: {error}") from None

    def _secret(self) -> str:
        """The secret, empty if there is none. It is checked again after its file has been read again."""
        secret = self.config.secret.get() if self.config.secret is not None else ""
        if secret != self._usable_secret:
            if problem := problem_in_secret(secret, self.config.sign):
                raise TransientError(
                    f"sinks.{self.name}.secret_file no longer holds a signing secret: {problem}; correct it and reload"
                )
            self._usable_secret = secret
        return secret

    # --- answers ---

    def _read(self, response: requests.Response) -> bytes:
        """The answer's body, up to the bytes that are needed.

        Raises:
            Exception: One of `CALL_ERRORS`: the answer broke off, and an expression needs its body. Without
                expressions the status alone decides, and a failure to read the body is ignored.
        """
        # A connection whose answer was read to its end is in the pool by then, and `closing` does not close it.
        with closing(response):
            try:
                body: bytes = response.raw.read(_ANSWER_MAX_BYTES, decode_content=self._reads_answers)
            except CALL_ERRORS:
                if self._reads_answers:
                    raise
                return b""
        return body

    def _refusal(
        self, target: _Target, response: requests.Response, answer: bytes
    ) -> RejectedError | TransientError | None:
        """The error for an answer; None if the answer accepts the event."""
        status = response.status_code
        text = f"{target.host} answered {status_text(status)}"
        is_success = status in SUCCESS
        try:
            if status in self._rejecting_statuses or _holds(self._reject_when, "reject_when", answer, default=False):
                return RejectedError(f"{text}{self._quoted(answer)}")
            if is_success and _holds(self._accept_when, "accept_when", answer, default=True):
                return None
        except EvaluationError as error:
            if is_success:
                return TransientError(f"{text}, but sinks.{self.name}.{error}{self._quoted(answer)}")
        wait_secs = retry_after_secs(response.headers, self.context.wall())
        if is_success:
            why = f"sinks.{self.name}.accept_when does not hold{self._quoted(answer)}"
            return TransientError(f"{text}, but {why}", retry_after_secs=wait_secs)
        return self._transient(target, response, text, wait_secs)

    def _transient(
        self, target: _Target, response: requests.Response, text: str, wait_secs: float | None
    ) -> TransientError:
        status, location = response.status_code, response.headers.get("Location")
        if status in REDIRECTS and location:
            new_url = self._without_secrets(_redirect_url(target.address, location))[:_SHOWN_CHARACTERS]
            return TransientError(
                f"{text} and points to {new_url}: redirects are not followed"
                f" (put the right address into sinks.{self.name}.{self.config.address_key})"
            )
        return TransientError(f"{text}{self._advice(status)}", retry_after_secs=wait_secs)

    def _advice(self, status: int) -> str:
        match status:
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                return f" (does it expect other headers or another secret than sinks.{self.name} has?)"
            case HTTPStatus.NOT_FOUND | HTTPStatus.METHOD_NOT_ALLOWED | HTTPStatus.GONE:
                return f" (is sinks.{self.name}.{self.config.address_key} the right address for {self.config.method}?)"
            case HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
                return " (the proxy does not accept the credentials in $http_proxy or $https_proxy)"
            case _:
                return ""

    def _quoted(self, answer: bytes) -> str:
        text = " ".join(self._without_secrets(answer.decode(errors="replace")).split())[:_SHOWN_CHARACTERS]
        return f": {text}" if text else ""

    def _without_secrets(self, text: str) -> str:
        return without_secrets(text, self.config)


def _holds(expression: Expression | None, key: str, answer: bytes, *, default: bool) -> bool:
    """Whether an expression holds for an answer.

    Args:
        expression: The expression; None if it is not configured.
        key: Its key, for the error.
        answer: The answer's body. A body that is not JSON is a string for the expression.
        default: The result if the expression is not configured.

    Raises:
        EvaluationError: It cannot be evaluated on this answer. The text begins with the key.
    """
    if expression is None:
        return default
    text = answer.decode(errors="replace").strip()
    content: Any = text
    try:
        content = decode_json(text)
    except ValueError:
        if len(answer) >= _ANSWER_MAX_BYTES:
            raise EvaluationError(f"{key} cannot be evaluated on an answer of over {_ANSWER_MAX_BYTES} bytes") from None
    try:
        return expression.holds(content)
    except EvaluationError as error:
        raise EvaluationError(f"{key} cannot be evaluated on the answer: {error}") from None


def _redirect_url(url: str, location: str) -> str:
    """The URL that a redirect points to, as it may be shown."""
    try:
        return shown_url(urljoin(url, location))
    except ValueError:
        return "an address that cannot be read"
