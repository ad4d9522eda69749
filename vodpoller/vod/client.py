"""The client of the VOD event API: one request and one answer. `answers` and `application` interpret the answers.

It does not retry; the caller decides that.

Facts are from Tencent Cloud's API documents "PullEvents" (product/266/34183), "ConfirmEvents" (266/34184) and "Request
structure", and from the code of public consumers of the API.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, Final, Protocol, Self

import orjson
import requests
from requests import PreparedRequest
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import DecodeError

from vodpoller import __version__
from vodpoller.errors import (
    NO_KEY_RETRY_SECS,
    NoAnswerError,
    NoKeyError,
    OperatorError,
    StoppingError,
    ThrottledError,
    TransientError,
    VodpollerError,
)
from vodpoller.events.codec import UnreadableError, encode_json
from vodpoller.events.event import Lease, Malformed, PulledEvent, read_event
from vodpoller.events.salvage import salvage_events
from vodpoller.httpclient.address import environment_of, host_and_port
from vodpoller.httpclient.transport import CALL_ERRORS, DeadlineAdapter, Transport
from vodpoller.httpclient.trust import RootsError
from vodpoller.httpclient.words import UnusableProxyError, causes, failure_text, http_date
from vodpoller.logs import Logger
from vodpoller.vod.answers import (
    ANSWER_TOO_LARGE,
    CONFIRM,
    EVENTS_MAX,
    PULL,
    Answer,
    Pull,
    check_number,
    event_set,
    is_empty_queue,
    is_refused_token,
    is_throttling,
    refusal_in,
    response_of,
    take_apart,
    too_large_answer,
    unusable_answer,
)
from vodpoller.vod.application import (
    EVENT_CONFIG,
    EVENTS_STATE,
    STATE_REQUESTS_PER_SEC,
    EventConfig,
    event_config_in,
    waiting_events_in,
)
from vodpoller.vod.credentials import Credentials
from vodpoller.vod.limiter import RateLimiter
from vodpoller.vod.signature import Tc3Auth

ANSWER_MAX_BYTES: Final = 8 * 1024 * 1024  # sixteen events of VOD take about 100 KiB

_VERSION: Final = "2018-07-17"
_CHUNK_BYTES: Final = 64 * 1024
_CONNECT_SECS: Final = 5.0
_CONNECTIONS: Final = 64
_CLOCK_OFF_SECS: Final = 60.0
# Per action: VOD's limit in requests per second, if it is lower than the account's quota may be, and the share of the
# quota that is left unused. Slots of confirms are a little closer together than those of pulls. With equal spacing, a
# confirm that had to wait for its slot once would wait as long after each following pull, up to the time of one slot.
_QUOTAS: Final[Mapping[str, tuple[float, float]]] = {
    PULL: (inf, 0.03),
    CONFIRM: (inf, 0.02),
    EVENT_CONFIG: (inf, 0.03),
    EVENTS_STATE: (STATE_REQUESTS_PER_SEC, 0.03),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Action:
    name: str
    headers: Mapping[str, str]
    limiter: RateLimiter


class ApiSettings(Protocol):
    """The configuration of the API; the arguments of `VodClient` describe each setting in detail."""

    @property
    def endpoint(self) -> str:
        """URL of the API."""

    @property
    def region(self) -> str | None:
        """`X-TC-Region`; None: the header is not sent."""

    @property
    def requests_per_sec(self) -> float:
        """The account's quota for each API action."""

    @property
    def timeout_secs(self) -> float:
        """Time limit of a pull."""

    @property
    def confirm_timeout_secs(self) -> float:
        """Time limit of a confirm."""

    @property
    def lease_secs(self) -> float:
        """The time in which a pull's handles can be confirmed."""

    @property
    def ca_file(self) -> Path | None:
        """PEM file with the root certificates for VOD's certificate."""


class VodClient:
    """Pulls and confirms events, and reads facts about an application. Any thread may call it.

    Each call is one signed request and one answer, with one exception: a request that is refused because this machine's
    clock is wrong is sent again, once, with the server's time.

    Args:
        endpoint: URL of the API: `https://vod.tencentcloudapi.com`.
        region: `X-TC-Region`; empty: the header is not sent.
        credentials: Called for each request; returns the key.
        requests_per_sec: The account's quota for each API action.
        timeout_secs: Time limit of a pull, from the name lookup to the last byte of the answer; also of `event_config`
            and `waiting_events`. VOD holds a pull for 5 s while its queue is empty, and recommends a limit of 10 s.
        confirm_timeout_secs: The same for a confirm.
        lease_secs: The time in which a pull's handles can be confirmed.
        ca_file: PEM file with the root certificates for VOD's certificate; None: those of the environment, or of the
            public CAs.
        key_renewal: What the operator must do after replacing the key, so that the new key is used; for messages.
        on_refused_token: Called with the token of a temporary key that VOD refuses; must return at once and start the
            renewal of the key. None if keys are not renewed automatically.
        log: Destination of the log lines.
        transport: Sends the requests; None: a `DeadlineAdapter` with `ca_file`.
        monotonic: The clock of leases and timeouts, in seconds.
        wall: Unix time, in seconds.
        sleep: Waits that number of seconds.
        answer_max_bytes: The maximum number of bytes that are read of an answer, after decompression.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        region: str = "",
        credentials: Callable[[], Credentials],
        requests_per_sec: float = 100.0,
        timeout_secs: float = 10.0,
        confirm_timeout_secs: float = 2.0,
        lease_secs: float = 30.0,
        ca_file: Path | None = None,
        key_renewal: str = "send SIGHUP",
        on_refused_token: Callable[[str], None] | None = None,
        log: Logger,
        transport: Transport | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        answer_max_bytes: int = ANSWER_MAX_BYTES,
    ) -> None:
        self._timeout_secs = timeout_secs
        self._confirm_timeout_secs = confirm_timeout_secs
        self._lease_secs = lease_secs
        self._key_renewal = key_renewal
        self._on_refused_token = on_refused_token
        self._log = log
        self._monotonic = monotonic
        self._wall = wall
        self._answer_max_bytes = answer_max_bytes

        self._url = requests.Request("POST", endpoint).prepare().url or endpoint
        # Reading the environment for each request would take as much CPU time as the request itself.
        self._environment = environment_of(self._url)
        self._transport = transport or DeadlineAdapter(connections=_CONNECTIONS, ca_file=ca_file, monotonic=monotonic)
        self._where = host_and_port(self._url)

        self._pulls_stopped = False
        self._clock_lock = threading.Lock()
        self._clock_offset_secs = 0.0
        self._last_date: tuple[str | None, float] | None = None
        self._sign = Tc3Auth(credentials, wall=lambda: wall() + self._clock_offset_secs)
        self._pull, self._confirm, self._event_config, self._events_state = (
            _Action(
                name=name,
                headers=_headers(name, region),
                limiter=RateLimiter(min(requests_per_sec, quota), spare=spare, monotonic=monotonic, sleep=sleep),
            )
            for name, (quota, spare) in _QUOTAS.items()
        )

    @classmethod
    def configured(
        cls,
        api: ApiSettings,
        *,
        credentials: Callable[[], Credentials],
        key_renewal: str,
        on_refused_token: Callable[[str], None] | None = None,
        log: Logger,
    ) -> Self:
        """Make a client from the configuration.

        Args:
            api: The table `[api]`.
            credentials: As for the client.
            key_renewal: As for the client.
            on_refused_token: As for the client.
            log: Destination of the log lines.
        """
        return cls(
            endpoint=api.endpoint,
            region=api.region or "",
            credentials=credentials,
            requests_per_sec=api.requests_per_sec,
            timeout_secs=api.timeout_secs,
            confirm_timeout_secs=api.confirm_timeout_secs,
            lease_secs=api.lease_secs,
            ca_file=api.ca_file,
            key_renewal=key_renewal,
            on_refused_token=on_refused_token,
            log=log,
        )

    def pull(self, source: str, sub_app_id: int | None) -> Pull:
        """Take up to 16 events from the queue; takes up to 5 s while the queue is empty.

        Args:
            source: Name of the source, for the events.
            sub_app_id: Tencent's SubAppId; None for an account without.

        Raises:
            ThrottledError: The quota is used up, or leaves no slot within `timeout_secs`.
            TransientError: No usable answer was received.
            OperatorError: Credentials, rights or configuration are wrong, or the answer is larger than an answer of VOD
                can be and its beginning holds no complete event.
            StoppingError: `stop_pulling` was called before the request was sent.
        """
        answer = self._call(self._pull, _sub_app_body(sub_app_id), timeout_secs=self._timeout_secs, has_slot=False)
        items: Sequence[PulledEvent | Malformed]
        if answer.error_code is not None:
            if not is_empty_queue(answer):
                raise _refusal(PULL, answer, self._key_renewal)
            items = ()
        elif answer.status == HTTPStatus.OK and answer.unreadable:
            items = self._salvaged(answer, answer.cut or answer.unreadable, source, sub_app_id)
        else:
            elements = event_set(answer)
            check_number(len(elements), answer)
            try:
                items = [read_event(item, source=source, sub_app_id=sub_app_id) for item in elements]
            except UnreadableError as error:
                items = self._salvaged(answer, str(error), source, sub_app_id)
        if items and all(item.handle is None for item in items):
            raise unusable_answer(answer, "none of its elements has a usable EventHandle")
        return Pull(
            events=tuple([item for item in items if isinstance(item, PulledEvent)]),
            malformed=tuple([item for item in items if isinstance(item, Malformed)]),
            lease=Lease(starts_at=answer.sent_at, secs=self._lease_secs),
            hung_secs=answer.took_secs,
            request_id=answer.request_id,
            may_lack_events=answer.repeated or bool(answer.unreadable) or any(item.handle is None for item in items),
        )

    def await_confirm_slot(self, timeout_secs: float) -> bool:
        """Wait for a slot of the quota of confirms. The caller must then send one confirm.

        Args:
            timeout_secs: The maximum time to wait.

        Returns:
            False, without waiting, if no slot comes within the time.
        """
        return self._confirm.limiter.acquire(timeout_secs)

    def confirm(self, sub_app_id: int | None, handles: Sequence[str], timeout_secs: float | None = None) -> str:
        """Confirm events, so that VOD deletes them: one request, sent at once. Call `await_confirm_slot` before it.

        Args:
            sub_app_id: The SubAppId of the pull.
            handles: 1 to 16 handles of this SubAppId.
            timeout_secs: The time that is left of the lease. The request takes at most `confirm_timeout_secs` in any
                case.

        Returns:
            Tencent's RequestId; empty if the answer has none.

        Raises:
            RefusedHandlesError: At least one handle is stale or belongs to another SubAppId. Possibly no handle was
                confirmed.
            ThrottledError: The quota is used up, or no time is left: nothing was confirmed.
            TransientError: It is not known whether the handles are confirmed.
            OperatorError: Credentials, rights or configuration are wrong.
        """
        content: dict[str, Any] = {"EventHandles": list(handles)}
        if sub_app_id is not None:
            content["SubAppId"] = sub_app_id
        own_secs = self._confirm_timeout_secs
        timeout_secs = own_secs if timeout_secs is None else min(timeout_secs, own_secs)
        answer = self._call(self._confirm, encode_json(content), timeout_secs=timeout_secs, has_slot=True)
        if answer.error_code is not None:
            raise _refusal(CONFIRM, answer, self._key_renewal)
        response_of(answer)
        return answer.request_id

    def event_config(self, sub_app_id: int | None) -> EventConfig:
        """Call DescribeEventConfig: how an application sends its events.

        Args:
            sub_app_id: Tencent's SubAppId; None for an account without.

        Raises:
            ThrottledError: The quota is used up, or leaves no slot within `timeout_secs`.
            TransientError: No usable answer was received.
            OperatorError: Credentials, rights or configuration are wrong; `is_missing_right` recognises missing rights.
        """
        return event_config_in(self._describe(self._event_config, sub_app_id))

    def waiting_events(self, sub_app_id: int | None) -> int:
        """Call DescribeEventsState: the number of events that wait to be pulled.

        The number is up to 3 minutes old, so no decision may depend on it.

        Args:
            sub_app_id: Tencent's SubAppId; None for an account without.

        Raises:
            ThrottledError: As in `event_config`.
            TransientError: As in `event_config`.
            OperatorError: As in `event_config`.
        """
        return waiting_events_in(self._describe(self._events_state, sub_app_id))

    @property
    def skew_secs(self) -> float | None:
        """VOD's time minus this machine's time, by the date of VOD's last answer; None without such a date."""
        header, received_at = self._last_date or (None, 0.0)
        server_time = http_date(header)
        return None if server_time is None else server_time - received_at

    @property
    def has_answered(self) -> bool:
        """Whether any answer has been received, with or without a date."""
        return self._last_date is not None

    def certificate_ends_at(self) -> float | None:
        """Connect to the endpoint to read its certificate; no request is sent.

        Returns:
            The end of the certificate's validity, in seconds since 1970. None, without a connection, if the endpoint
            does not use TLS or is reached through a proxy.

        Raises:
            TransientError: The endpoint cannot be reached, or its certificate is not trusted.
            OperatorError: The configuration or the environment is wrong.
        """
        if self._environment.proxy or not self._url.startswith("https:"):
            return None
        try:
            return self._transport.connect_within(self._url, self._environment, self._timeout_secs)
        except CALL_ERRORS as error:  # not chained, as in `_send`
            raise self._no_answer_error(error, self._timeout_secs) from None

    def stop_pulling(self) -> None:
        """Send no further pull. Pulls that wait for a slot are not sent either."""
        self._pulls_stopped = True

    def reopen(self) -> None:
        """Read the root certificates again.

        Raises:
            ConfigError: They cannot be read; those that were read before stay in use.
        """
        self._transport.reread_roots("api.ca_file")

    def close(self) -> None:
        """Close the connections. A running call may fail."""
        self._transport.close()

    # --- one exchange -------------------------------------------------------------------------------------------------

    def _describe(self, action: _Action, sub_app_id: int | None) -> Answer:
        """Call one of the actions that describe an application; raises an error if VOD refuses it."""
        answer = self._call(action, _sub_app_body(sub_app_id), timeout_secs=self._timeout_secs, has_slot=False)
        if answer.error_code is not None:
            raise refusal_in(action.name, answer, self._key_renewal)
        return answer

    def _call(self, action: _Action, body: bytes, *, timeout_secs: float, has_slot: bool) -> Answer:
        offset_secs = self._clock_offset_secs
        answer = self._exchange(action, body, timeout_secs=timeout_secs, has_slot=has_slot)
        if answer.error_code == "AuthFailure.SignatureExpire" and self._clock_was_off(answer, offset_secs):
            answer = self._exchange(action, body, timeout_secs=timeout_secs, has_slot=has_slot)
        return answer

    def _clock_was_off(self, answer: Answer, used_offset_secs: float) -> bool:
        """Whether the request was signed with a wrong time; if so, the server's time is used from now on."""
        server_time = http_date(answer.headers.get("Date"))
        if server_time is None:
            return False
        offset_secs = server_time - self._wall()
        if abs(offset_secs - used_offset_secs) <= _CLOCK_OFF_SECS:
            return False
        with self._clock_lock:
            corrected = self._clock_offset_secs == used_offset_secs  # else another thread has corrected it
            if corrected:
                self._clock_offset_secs = offset_secs
        if corrected:
            self._log.warning("clock.corrected", skew_secs=round(offset_secs, 1), request_id=answer.request_id)
        return True

    def _exchange(self, action: _Action, body: bytes, *, timeout_secs: float, has_slot: bool) -> Answer:
        """Wait for a slot, sign, send, and read the answer.

        Args:
            action: The API action.
            body: The body of the request.
            timeout_secs: The time limit for request and answer. The wait for a slot has a limit of the same length.
            has_slot: The caller has already waited for a slot.
        """
        got_slot = timeout_secs > 0 and (has_slot or action.limiter.acquire(timeout_secs))
        prepared = self._prepare(action, body) if got_slot else None
        sent_at = self._monotonic()
        if self._pulls_stopped and action is self._pull:
            raise StoppingError(f"{action.name} was not sent: the daemon is stopping")
        if prepared is None:
            raise ThrottledError(f"{action.name} was not sent: api.requests_per_sec left no room for it in time")
        try:
            answer = self._send(prepared, sent_at, timeout_secs)
        except VodpollerError as error:
            took_secs = round(self._monotonic() - sent_at, 6)
            self._log.debug("api.answered", action=action.name, duration_secs=took_secs, **error.fields())
            raise
        self._last_date = (answer.headers.get("Date"), self._wall())
        self._log.debug(
            "api.answered",
            action=action.name,
            request_id=answer.request_id,
            duration_secs=round(answer.took_secs, 6),
            status=answer.status,
            error_code=answer.error_code,
        )
        if is_throttling(answer):
            action.limiter.throttled()
        if self._on_refused_token is not None and is_refused_token(answer):
            self._on_refused_token(prepared.headers["X-TC-Token"])
            raise NoKeyError(
                f"{action.name} was refused with {answer.error_code}: {answer.error_message}; a new key is requested",
                retry_after_secs=NO_KEY_RETRY_SECS,
                error_code=answer.error_code or "",
                request_id=answer.request_id,
            )
        return answer

    def _prepare(self, action: _Action, body: bytes) -> PreparedRequest:
        prepared = PreparedRequest()
        prepared.method = "POST"
        prepared.url = self._url
        prepared.headers = CaseInsensitiveDict(action.headers)
        prepared.headers["Content-Length"] = str(len(body))
        prepared.body = body
        return self._sign(prepared)

    def _send(self, prepared: PreparedRequest, sent_at: float, timeout_secs: float) -> Answer:
        try:
            response = self._transport.send_within(
                prepared, self._environment, timeout_secs, connect_secs=_CONNECT_SECS
            )
        # Not chained: these exceptions may quote the token, or a proxy's password.
        except CALL_ERRORS as error:
            raise self._no_answer_error(error, timeout_secs) from None
        try:
            body, cut = self._read_body(response)
        finally:
            response.close()  # a connection whose answer was read to its end is already in the pool and stays open
        return take_apart(response, body, cut, sent_at=sent_at, took_secs=self._monotonic() - sent_at)

    def _no_answer_error(self, error: Exception, timeout_secs: float) -> VodpollerError:
        """The error for a request that has no answer."""
        match error:
            case RootsError():
                return OperatorError(f"no request can be sent to {self._where}: {error} (see api.ca_file)")
            case UnusableProxyError():
                return OperatorError(f"no request can be sent to {self._where}: {error}")
            case requests.ConnectTimeout():
                timeout_secs = min(timeout_secs, _CONNECT_SECS)
            case InvalidURL() | InvalidSchema() | MissingSchema():
                return OperatorError(
                    f"no request can be sent to {self._where}: it is not a valid address (see api.endpoint)"
                )
            case ValueError() if not isinstance(error, requests.RequestException):
                return OperatorError(
                    "the request cannot be sent: secret_id, token or region contains a character that is not allowed in"
                    " an HTTP header"
                )
        failure = f"{self._where} {failure_text(error, timeout_secs)}"
        if isinstance(error, requests.Timeout):
            origin = f": {failure}" if isinstance(error, requests.ConnectTimeout) else f" from {self._where}"
            return NoAnswerError(f"no answer within {timeout_secs:.1f} s{origin}")
        return NoAnswerError(
            f"VOD cannot be called: {failure} (if this lasts: is api.endpoint right, and do DNS, firewall and proxy"
            " work?)"
        )

    def _read_body(self, response: requests.Response) -> tuple[bytes, str]:
        """The part of the body that is received in time, and why it is incomplete; empty if it is complete."""
        chunks: list[bytes] = []
        left = self._answer_max_bytes
        try:
            # read1 returns what has been received; read would hold it back, and lose it if the connection breaks.
            while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=True):
                chunks.append(chunk)
                left -= len(chunk)
                if left < 0:
                    return b"".join(chunks), f"it is longer than {self._answer_max_bytes} bytes"
        except CALL_ERRORS as error:
            in_time = not any(isinstance(cause, TimeoutError) for cause in causes(error))
            return b"".join(chunks), _reason(error) if in_time else "it did not end in time"
        return b"".join(chunks), ""

    def _salvaged(self, answer: Answer, why: str, source: str, sub_app_id: int | None) -> list[PulledEvent | Malformed]:
        """Read single events from an answer that cannot be read as a whole."""
        text = answer.body.decode(errors="surrogateescape")
        salvaged = salvage_events(text, cut=bool(answer.cut), source=source, sub_app_id=sub_app_id)
        items = list(islice(salvaged, EVENTS_MAX + 1))
        check_number(len(items), answer)
        too_large = len(answer.body) > self._answer_max_bytes
        if all(item.handle is None for item in items):
            raise too_large_answer(answer) if too_large else unusable_answer(answer)
        events = sum(1 for item in items if isinstance(item, PulledEvent))
        fields = {
            "source": source,
            "events": events,
            "malformed": len(items) - events,
            "answer_bytes": len(answer.body),
            "error_message": why,
        }
        if too_large:
            self._log.error("answer.salvaged", error_code=ANSWER_TOO_LARGE, **fields)
        else:
            self._log.warning("answer.salvaged", **fields)
        return items


def _sub_app_body(sub_app_id: int | None) -> bytes:
    """The body of a request whose only parameter is the application."""
    return orjson.dumps({} if sub_app_id is None else {"SubAppId": sub_app_id})


def _headers(action: str, region: str) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"vodpoller/{__version__}",
        "Accept": "application/json",
        # Compression would take more time than it saves, and events of an incomplete answer could not be read.
        "Accept-Encoding": "identity",
        "X-TC-Action": action,
        "X-TC-Version": _VERSION,
    }
    return {**headers, "X-TC-Region": region} if region else headers


def _reason(error: Exception) -> str:
    """Why a body is incomplete."""
    if isinstance(error, DecodeError):
        return str(error.args[0])  # names the content encoding that is wrong
    return f"VOD {failure_text(error, 0.0)}"


def _refusal(action: str, answer: Answer, key_renewal: str) -> VodpollerError:
    """The error for an answer with an error code. If the request was sent twice, the first one may have succeeded."""
    refusal = refusal_in(action, answer, key_renewal)
    if not answer.repeated:
        return refusal
    return TransientError(
        f"{refusal} | it was sent again after the connection broke: the first one may have been carried out",
        error_code=refusal.error_code,
        request_id=refusal.request_id,
    )
