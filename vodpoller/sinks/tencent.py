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

_ANSWER_MAX_BYTES: Final = 8 * 1024 * 1024  # a function's result, the longest known answer, has 6 MB at most
_CALL_MAX_SECS: Final = 300.0
_CLOCK_OFF_SECS: Final = 60.0
_KEY_RENEWAL: Final = "reload the daemon, or restart the service if systemd loads the key"

# Codes that begin so are about the parameters, which are made of the event. All others are about the key, the service
# or the configuration.
_ABOUT_PARAMETERS: Final = ("InvalidParameter", "MissingParameter", "UnknownParameter", "RequestSizeLimitExceeded")


class TencentConfig(SinkConfig):
    """An action of Tencent Cloud's API."""

    type: Literal["tencent"] = Field(description="Each event is a call of Tencent Cloud's API, with the daemon's key.")
    service: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=63)] = Field(
        description="The service, as its API's host begins.", examples=["eb"]
    )
    version: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")] = Field(
        description="The version of its API.", examples=["2021-04-16"]
    )
    action: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=100)] = Field(
        description="The action.", examples=["PutEvents"]
    )
    params: ExpressionText = Field(
        description="JMESPath over the event, in the form that `format` says: makes the object of the action's"
        " parameters. If it makes null, nothing is sent, and the event counts as delivered (`skipped`).",
        examples=["{EventBusId: 'eb-12345678', EventList: [{Source: 'vod', Type: EventType, Data: to_string(@)}]}"],
    )
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] | None = Field(
        default=None, description="The region. Most services need one.", examples=["ap-guangzhou"]
    )
    endpoint: str | None = Field(
        default=None,
        description="Where the API is, without a path. Left out: https://SERVICE.tencentcloudapi.com.",
        examples=["https://eb.tencentcloudapi.com"],
    )
    requests_per_sec: Annotated[float, Field(ge=1, le=10_000)] = Field(
        default=20.0, description="Requests per second, evenly spaced: the quota of the action, or less."
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
        """Where requests go."""
        return f"{self.endpoint or _endpoint_of(self.service)}/"


class TencentSink(Sink[TencentConfig]):
    """Calls an action for each event.

    An answer without an error accepts. A refusal of the parameters rejects the event, all else may pass. A request may
    be sent twice (see `DeadlineAdapter`). One that is refused because this machine's clock is wrong is sent once more,
    with the server's time.

    Args:
        name: Of the sink.
        config: Its settings.
        context: The log, the clocks and the API key.
        sleep: Waits that number of seconds, for the quota.

    Raises:
        ConfigError: There is no API key, or what the environment says of proxies or certificates cannot be used.
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
        # With more threads, a request would wait for its slot longer than for its answer.
        self.concurrency = min(config.concurrency, ceil(rate * config.timeout_secs))
        # The limiter keeps below the quota, and may have halved it.
        self.timeout_secs = min(config.timeout_secs + 2 * self.concurrency / rate, _CALL_MAX_SECS)
        self._closed = False
        self._offset_secs = 0.0
        self._expression = Expression(config.params)
        self._limiter = RateLimiter(rate, monotonic=context.monotonic, sleep=sleep)
        if context.credentials is None:
            raise ConfigError([f"sinks.{name}: there is no API key to sign its requests with (see [credentials])"])
        self._sign = Tc3Auth(context.credentials, service=config.service, wall=self._time)
        self._headers = _headers(config)
        self._where = host_and_port(config.url)
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
        """Whether a connection can be made and, for https, its certificate be trusted. No request is sent."""
        sink = cls(name, config, context)
        try:
            return sink._reach()
        finally:
            sink.close()

    def examine(self, event: Event) -> None:
        """Raise what `_body_of` does, if nothing can or is to be sent for the event. Nothing is sent to find out."""
        self._body_of(event)

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Call the action for one event."""
        (event,) = events
        if self._closed:
            raise TransientError(f"{self._where}: the sink is closed")
        body = self._body_of(event)
        ends_at = self.context.monotonic() + timeout_secs
        if not self._limiter.acquire(max(timeout_secs - self.config.timeout_secs, timeout_secs / 2)):
            raise ThrottledError(
                f"{self.config.action} was not sent: sinks.{self.name}.requests_per_sec left no room for it in time"
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
        """Read what vouches for certificates again. The API key is asked for at each request.

        Raises:
            ConfigError: It cannot be read; what was read before stays in use.
        """
        self._adapter.reread_roots(f"sinks.{self.name}.endpoint")

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their answer is in."""
        self._closed = True
        self._adapter.close()

    def _reach(self) -> str:
        proxy = self._environment.proxy
        where = f"the proxy {host_and_port(proxy)}" if proxy else self._where
        try:
            ends_at = self._adapter.connect_within(self.config.url, self._environment, self.config.timeout_secs)
        except CALL_ERRORS as error:
            said = failure_text(error, self.config.timeout_secs)
            raise ConfigError([f"sinks.{self.name}.endpoint: {where} {said}"]) from None
        if proxy:
            return f"{where} accepts connections (what is behind it was not tried)"
        if ends_at is None:
            return f"{where} accepts connections"
        valid = validity(ends_at, self.context.wall())
        return f"{where} accepts connections, its certificate is trusted, and {valid}"

    # --- asking ---

    def _body_of(self, event: Event) -> bytes:
        """The parameters, as JSON.

        Raises:
            SkippedError: Nothing is to be sent.
            RejectedError: The expression makes none of this event.
        """
        key = f"sinks.{self.name}.params"
        if self.config.format == "cloudevents" and event.content:
            event = replace(event, content=decode_json(encode(event, "cloudevents").decode()))
        params = self._expression.shape(event, key)
        if params is None:
            raise SkippedError(f"{key} finds null")
        if not isinstance(params, dict):
            raise RejectedError(
                f"{key}: of this event it makes {_kind_of(params)}, and the parameters of an action are an object"
                " (if it is not for such events, let no route bring them here: see `where`)"
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
        """Whether the server's time is another than the request was signed with; if so it is used from now on."""
        server_time = http_date(answer.headers.get("Date"))
        if server_time is None:
            return False
        offset_secs = server_time - self.context.wall()
        if abs(offset_secs - used_offset_secs) <= _CLOCK_OFF_SECS:
            return False
        if self._offset_secs == used_offset_secs:  # else another thread has done it meanwhile
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
        signed = self._sign(prepared)  # may wait for the very first temporary key
        sent_at = self.context.monotonic()
        timeout_secs = min(self.config.timeout_secs, ends_at - sent_at)
        # Not chained: what these exceptions quote may be the token, or a proxy's password.
        try:
            response = self._adapter.send_within(signed, self._environment, timeout_secs)
            try:
                content: bytes = response.raw.read(_ANSWER_MAX_BYTES + 1, decode_content=True)
            finally:
                response.close()  # a connection whose answer was read to its end is in the pool by now and stays open
        except CALL_ERRORS as error:
            raise NoAnswerError(f"{self._where} {failure_text(error, timeout_secs)}") from None
        cut = f"it is longer than {_ANSWER_MAX_BYTES} bytes" if len(content) > _ANSWER_MAX_BYTES else ""
        took_secs = self.context.monotonic() - sent_at
        content = _without(signed.headers.get("X-TC-Token"), content)
        answer = take_apart(response, content, cut, sent_at=sent_at, took_secs=took_secs)
        if self.context.on_refused_token is not None and is_refused_token(answer):
            self.context.on_refused_token(prepared.headers["X-TC-Token"])
            raise self._no_key(answer)
        return answer

    # --- saying what came of it ---

    def _no_key(self, answer: Answer) -> NoKeyError:
        return NoKeyError(
            f"{self.config.action} was refused with {answer.error_code}: {answer.error_message}; a new key is asked"
            " for",
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
        # Of a request that was sent twice, the second refusal says nothing of the first one.
        if code.startswith(_ABOUT_PARAMETERS) and not answer.repeated:
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
            f"{self._where} answered {status_text(answer.status)}{hint}: {answer.excerpt!r}",
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


def _without(token: str | None, content: bytes) -> bytes:
    """An answer without the token, the one secret that it may echo: what it says is kept with the event, and shown."""
    for form in searched_for((token, token.replace("/", "\\/"))) if token else ():
        content = content.replace(form.encode(), b"[secret]")
    return content


def _retry_after_secs(answer: Answer) -> float | None:
    """How long the answer asks to be left alone; a date is compared with the server's own."""
    return retry_after_secs(answer.headers, http_date(answer.headers.get("Date")))


def _kind_of(found: Any) -> str:
    """What JSON calls a value."""
    match found:
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case _:
            return "a list"
