"""Events as calls of Tencent Cloud's API 3.0: any action of any service, signed with the daemon's own key.

Sources: Tencent Cloud's documents "Request structure", "Signature v3" and "Common error codes", which are the same for
all services.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from http import HTTPStatus
from math import ceil
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import requests
from pydantic import Field, ValidationInfo, field_validator

from vodpoller import __version__
from vodpoller.errors import (
    NO_KEY_RETRY_SECS,
    ConfigError,
    NoAnswerError,
    NoKeyError,
    RejectedError,
    SkippedError,
    ThrottledError,
    TransientError,
    VodpollerError,
)
from vodpoller.events.codec import decode_json
from vodpoller.events.event import Event
from vodpoller.expressions import EvaluationError, Expression, ExpressionText, encode_found
from vodpoller.httpclient.address import environment_of, host_and_port
from vodpoller.httpclient.transport import CALL_ERRORS, DeadlineAdapter
from vodpoller.httpclient.trust import RootsError, validity
from vodpoller.httpclient.words import failure_text, http_date, retry_after_secs, status_text
from vodpoller.logs import searched_for
from vodpoller.sinks.contract import Sink, SinkConfig, SinkContext
from vodpoller.sinks.formats import encode
from vodpoller.vod.answers import Answer, advice_on_key, is_refused_token, is_throttling, take_apart, unusable_answer
from vodpoller.vod.endpoint import bare_endpoint
from vodpoller.vod.limiter import RateLimiter
from vodpoller.vod.signature import Tc3Auth

_ANSWER_MAX_BYTES: Final = 8 * 1024 * 1024  # the longest known answer is a function's result of at most 6 MB
_CALL_MAX_SECS: Final = 300.0
_CLOCK_OFF_SECS: Final = 60.0
_KEY_RENEWAL: Final = "reload the daemon, or restart the service if systemd loads the key"

# Error codes with these prefixes are about the parameters, which are made of the event. All others are about the key,
# the service or the configuration.
_PARAMETER_CODES: Final = ("InvalidParameter", "MissingParameter", "UnknownParameter", "RequestSizeLimitExceeded")


class TencentConfig(SinkConfig):
    """The settings of an action of Tencent Cloud's API."""

    type: Literal["tencent"] = Field(
        description="For each event an action of Tencent Cloud's API is called, with the daemon's key."
    )
    service: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=63)] = Field(
        description="The service: the first part of the host name of its API.", examples=["eb"]
    )
    version: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")] = Field(
        description="The version of its API.", examples=["2021-04-16"]
    )
    action: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=100)] = Field(
        description="The action.", examples=["PutEvents"]
    )
    params: ExpressionText = Field(
        description="JMESPath over the event in the form that `format` names. The result must be an object, the"
        " action's parameters. If the result is null, nothing is sent, and the event counts as delivered (`skipped`).",
        examples=["{EventBusId: 'eb-12345678', EventList: [{Source: 'vod', Type: EventType, Data: to_string(@)}]}"],
    )
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] | None = Field(
        default=None, description="The region. Most services need one.", examples=["ap-guangzhou"]
    )
    endpoint: str | None = Field(
        default=None,
        description="The URL of the API, without a path. Left out: https://SERVICE.tencentcloudapi.com.",
        examples=["https://eb.tencentcloudapi.com"],
    )
    requests_per_sec: Annotated[float, Field(ge=1, le=10_000)] = Field(
        default=20.0,
        description="Maximum number of requests per second, evenly spaced: the quota of the action, or less.",
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=300)] = Field(
        default=10.0, description="Time limit of a request, from the name lookup to the end of the answer."
    )
    concurrency: Annotated[int, Field(ge=1, le=512)] = Field(
        default=4, description="Maximum number of requests at the same time."
    )

    @field_validator("endpoint")
    @classmethod
    def _is_bare_url(cls, value: str | None, info: ValidationInfo) -> str | None:
        return value and bare_endpoint(value, _endpoint_of(info.data.get("service", "eb")))

    def place(self) -> str:
        """The API's host and the action."""
        return f"{urlsplit(self.url).netloc} {self.action}"

    @property
    def url(self) -> str:
        """The URL of all requests."""
        return f"{self.endpoint or _endpoint_of(self.service)}/"


class TencentSink(Sink[TencentConfig]):
    """Calls an action for each event.

    An answer without an error accepts the event. A refusal of the parameters rejects it; every other failure is
    transient. A request may be sent twice (see `DeadlineAdapter`). If a request is refused because this machine's clock
    is wrong, it is sent once more with the server's time.

    Args:
        name: Name of the sink.
        config: Its settings.
        context: The log, the clocks and the API key.
        sleep: Waits that number of seconds, to keep to the quota.

    Raises:
        ConfigError: The API key is missing, or the proxy or certificate settings of the environment cannot be used.
    """

    Config = TencentConfig
    needs_key = True

    def __init__(
        self,
        name: str,
        config: TencentConfig,
        context: SinkContext,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(name, config, context)
        rate = config.requests_per_sec
        # With more threads, a request would wait longer for its slot than for its answer.
        self.concurrency = min(config.concurrency, ceil(rate * config.timeout_secs))
        # Time for a slot, too: the limiter keeps below the quota, and may have halved its rate.
        self.timeout_secs = min(config.timeout_secs + 2 * self.concurrency / rate, _CALL_MAX_SECS)
        self._closed = False
        self._offset_secs = 0.0
        self._expression = Expression(config.params)
        self._limiter = RateLimiter(rate, monotonic=context.monotonic, sleep=sleep)
        if context.credentials is None:
            raise ConfigError([f"sinks.{name}: the API key that signs its requests is missing (see [credentials])"])
        self._sign = Tc3Auth(context.credentials, service=config.service, wall=self._time)
        self._headers = _headers(config)
        self._host = host_and_port(config.url)
        self._environment = environment_of(config.url)
        if self._environment.problem:
            raise ConfigError([f"sinks.{name}.endpoint: {self._environment.problem}"])
        self._adapter = DeadlineAdapter(connections=self.concurrency, monotonic=context.monotonic)
        if config.url.startswith("https:"):
            try:
                self._adapter.check_roots()
            except RootsError as error:
                raise ConfigError([f"sinks.{name}.endpoint: {error}"]) from None

    @classmethod
    def probe(cls, name: str, config: TencentConfig, context: SinkContext) -> str:
        """Check that a connection is accepted and, for https, its certificate is trusted. No request is sent."""
        sink = cls(name, config, context)
        try:
            return sink._check_connection()
        finally:
            sink.close()

    def examine(self, event: Event) -> None:
        """Evaluate `params` on the event; raise the error of `_body_of` if nothing can or should be sent for it."""
        self._body_of(event)

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Call the action for one event."""
        (event,) = events
        if self._closed:
            raise TransientError(f"{self._host}: the sink is closed")
        body = self._body_of(event)
        ends_at = self.context.monotonic() + timeout_secs
        if not self._limiter.acquire(max(timeout_secs - self.config.timeout_secs, timeout_secs / 2)):
            raise ThrottledError(
                f"{self.config.action} was not sent: sinks.{self.name}.requests_per_sec allowed no request in time"
            )
        answer = self._answer_to(body, ends_at)
        if is_throttling(answer):
            self._limiter.throttled()
        if answer.error_code is not None:
            raise self._refusal(answer)
        if answer.status != HTTPStatus.OK:
            raise self._http_failure(answer)
        if answer.response is None:
            raise unusable_answer(answer)

    def reopen(self) -> None:
        """Read the trusted CA certificates again. The API key is obtained anew for each request.

        Raises:
            ConfigError: They cannot be read; those that were read before stay in use.
        """
        self._adapter.reread_roots(f"sinks.{self.name}.endpoint")

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their answer has been read."""
        self._closed = True
        self._adapter.close()

    def _check_connection(self) -> str:
        proxy = self._environment.proxy
        peer = f"the proxy {host_and_port(proxy)}" if proxy else self._host
        try:
            ends_at = self._adapter.connect_within(self.config.url, self._environment, self.config.timeout_secs)
        except CALL_ERRORS as error:
            failure = failure_text(error, self.config.timeout_secs)
            raise ConfigError([f"sinks.{self.name}.endpoint: {peer} {failure}"]) from None
        if proxy:
            return f"{peer} accepts connections (the server behind it was not tried)"
        if ends_at is None:
            return f"{peer} accepts connections"
        valid = validity(ends_at, self.context.wall())
        return f"{peer} accepts connections, its certificate is trusted, and {valid}"

    # --- requests ---

    def _body_of(self, event: Event) -> bytes:
        """The action's parameters for an event, as JSON.

        Raises:
            SkippedError: Nothing is to be sent.
            RejectedError: `params` cannot be evaluated on this event, or its result is not an object.
        """
        key = f"sinks.{self.name}.params"
        if self.config.format == "cloudevents" and event.content:
            event = replace(event, content=decode_json(encode(event, "cloudevents").decode()))
        params = self._expression.shape(event, key)
        if params is None:
            raise SkippedError(f"{key}: the result is null")
        if not isinstance(params, dict):
            raise RejectedError(
                f"{key}: for this event the result is {_kind_of(params)}, but the parameters of an action are an object"
                " (if such events are not meant for this sink, exclude them in the routes: see `where`)"
            )
        try:
            return encode_found(params)
        except EvaluationError as error:
            raise RejectedError(f"{key}: {error}") from error

    def _answer_to(self, body: bytes, ends_at: float) -> Answer:
        offset_secs = self._offset_secs
        answer = self._exchange(body, ends_at)
        if answer.error_code == "AuthFailure.SignatureExpire" and self._clock_was_off(answer, offset_secs):
            answer = self._exchange(body, ends_at)
        return answer

    def _clock_was_off(self, answer: Answer, used_offset_secs: float) -> bool:
        """Whether the request was signed with a wrong time; if so, the server's time is used from now on."""
        server_time = http_date(answer.headers.get("Date"))
        if server_time is None:
            return False
        offset_secs = server_time - self.context.wall()
        if abs(offset_secs - used_offset_secs) <= _CLOCK_OFF_SECS:
            return False
        if self._offset_secs == used_offset_secs:  # else another thread has corrected it meanwhile
            self._offset_secs = offset_secs
            self.context.log.warning("clock.corrected", skew_secs=round(offset_secs, 1), request_id=answer.request_id)
        return True

    def _time(self) -> float:
        return self.context.wall() + self._offset_secs

    def _exchange(self, body: bytes, ends_at: float) -> Answer:
        prepared = requests.PreparedRequest()
        prepared.method, prepared.url, prepared.body = "POST", self.config.url, body
        prepared.headers = requests.structures.CaseInsensitiveDict(self._headers)
        prepared.headers["Content-Length"] = str(len(body))
        signed = self._sign(prepared)  # may wait for the first temporary key
        sent_at = self.context.monotonic()
        timeout_secs = min(self.config.timeout_secs, ends_at - sent_at)
        # Not chained: the texts of these exceptions may hold the token, or a proxy's password.
        try:
            response = self._adapter.send_within(signed, self._environment, timeout_secs)
            try:
                content: bytes = response.raw.read(_ANSWER_MAX_BYTES + 1, decode_content=True)
            finally:
                response.close()  # a connection whose answer was read to its end stays open in the pool
        except CALL_ERRORS as error:
            raise NoAnswerError(f"{self._host} {failure_text(error, timeout_secs)}") from None
        cut = f"it is longer than {_ANSWER_MAX_BYTES} bytes" if len(content) > _ANSWER_MAX_BYTES else ""
        took_secs = self.context.monotonic() - sent_at
        content = _without_token(signed.headers.get("X-TC-Token"), content)
        answer = take_apart(response, content, cut, sent_at=sent_at, took_secs=took_secs)
        if self.context.on_refused_token is not None and is_refused_token(answer):
            self.context.on_refused_token(prepared.headers["X-TC-Token"])
            raise self._no_key(answer)
        return answer

    # --- errors ---

    def _no_key(self, answer: Answer) -> NoKeyError:
        return NoKeyError(
            f"{self.config.action} was refused with {answer.error_code}: {answer.error_message}; a new key was"
            " requested",
            retry_after_secs=NO_KEY_RETRY_SECS,
            error_code=answer.error_code or "",
            request_id=answer.request_id,
        )

    def _refusal(self, answer: Answer) -> VodpollerError:
        code, request_id = answer.error_code or "", answer.request_id
        message = f"{self.config.action} was refused with {code or 'an error without a code'}: {answer.error_message}"
        if is_throttling(answer):
            pause_secs = _retry_after_secs(answer)
            return ThrottledError(message, retry_after_secs=pause_secs, error_code=code, request_id=request_id)
        # If a request was sent twice, the refusal of the second one proves nothing about the first one.
        if code.startswith(_PARAMETER_CODES) and not answer.repeated:
            return RejectedError(message, error_code=code, request_id=request_id)
        advice = advice_on_key(code, f"{self.config.service}:{self.config.action}", _KEY_RENEWAL)
        return TransientError(
            f"{message} | {advice}" if advice else message,
            retry_after_secs=_retry_after_secs(answer),
            error_code=code,
            request_id=request_id,
        )

    def _http_failure(self, answer: Answer) -> TransientError:
        hint = "" if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR else f" (is sinks.{self.name}.endpoint right?)"
        return TransientError(
            f"{self._host} answered {status_text(answer.status)}{hint}: {answer.excerpt!r}",
            retry_after_secs=_retry_after_secs(answer),
            request_id=answer.request_id,
        )


def _endpoint_of(service: str) -> str:
    return f"https://{service}.tencentcloudapi.com"


def _headers(config: TencentConfig) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"vodpoller/{__version__}",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "X-TC-Action": config.action,
        "X-TC-Version": config.version,
    }
    return {**headers, "X-TC-Region": config.region} if config.region else headers


def _without_token(token: str | None, content: bytes) -> bytes:
    """An answer without the token, the only secret that it may repeat: its text is stored with the event, and shown."""
    for form in searched_for((token, token.replace("/", "\\/"))) if token else ():
        content = content.replace(form.encode(), b"[secret]")
    return content


def _retry_after_secs(answer: Answer) -> float | None:
    """Number of seconds for which the answer asks to send nothing; a date is compared with the server's time."""
    return retry_after_secs(answer.headers, http_date(answer.headers.get("Date")))


def _kind_of(found: Any) -> str:
    """The kind of a JSON value, for an error."""
    match found:
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case _:
            return "a list"
