"""The VOD event API: one request, one answer, whose meaning is in `answers` and `application`.

The caller decides what to try again.

Facts are from Tencent Cloud's API documents "PullEvents" (product/266/34183), "ConfirmEvents" (266/34184) and "Request
structure", and from what public consumers of the API have met.
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

ANSWER_MAX_BYTES: Final = 8 * 1024 * 1024  # sixteen events of VOD's take some 100 KiB

_VERSION: Final = "2018-07-17"
_CHUNK_BYTES: Final = 64 * 1024
_CONNECT_SECS: Final = 5.0
_CONNECTIONS: Final = 64
_CLOCK_OFF_SECS: Final = 60.0
# What VOD allows of an action per second if that is less than the account's quota may be, and the share left unused.
# Slots of confirms come a little more often than those of pulls. If both came equally often, a confirm that had to wait
# for its slot once would have to wait as long after each pull that follows, up to a slot's length.
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
    """What the configuration says of the API; the arguments of `VodClient` say more of each."""

    @property
    def endpoint(self) -> str:
        """URL of the API."""

    @property
    def region(self) -> str | None:
        """`X-TC-Region`; None leaves it out."""

    @property
    def requests_per_sec(self) -> float:
        """The account's quota for each API action."""

    @property
    def timeout_secs(self) -> float:
        """For a pull."""

    @property
    def confirm_timeout_secs(self) -> float:
        """For a confirm."""

    @property
    def lease_secs(self) -> float:
        """How long a pull's handles can be confirmed."""

    @property
    def ca_file(self) -> Path | None:
        """PEM with what vouches for VOD's certificate."""


class VodClient:
    """Pulls and confirms events, and asks about them. Every call is one signed request and one answer, from any thread.

    The one exception: a request that is refused because this machine's clock is wrong is sent again, once, with the
    server's time.

    Args:
        endpoint: URL of the API: `https://vod.tencentcloudapi.com`.
        region: `X-TC-Region`; empty leaves it out.
        credentials: Asked at each request.
        requests_per_sec: The account's quota for each API action.
        timeout_secs: For a pull, from the name lookup to the answer's last byte. VOD lets an empty pull hang for 5 s
            and recommends 10. The same for questions about an application.
        confirm_timeout_secs: The same for a confirm.
        lease_secs: How long a pull's handles can be confirmed.
        ca_file: PEM with what vouches for VOD's certificate; None is what the environment says, or the public CAs.
        key_renewal: What a person must do so that another key is used once it is in place of the present one.
        on_refused_token: Told the token of a temporary key that VOD refuses, and returns at once: another key will come
            by itself. None if it will not.
        log: Where to.
        transport: Sends the requests; a `DeadlineAdapter` with `ca_file` unless told otherwise.
        monotonic: The clock of leases and timeouts, in seconds.
        wall: Unix time, in seconds.
        sleep: Waits that number of seconds.
        answer_max_bytes: What is read of an answer, at most, after decompression.
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
        # Asking the environment at each request would cost as much again as the request.
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
        """The client that a configuration describes.

        Args:
            api: The table `[api]`.
            credentials: Asked at each request.
            key_renewal: What a person must do so that another key is used once it is in place of the present one.
            on_refused_token: As of the client.
            log: Where to.
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
        """Take up to 16 events from the queue; hangs up to 5 s while it is empty.

        Args:
            source: Name of the source, for the events.
            sub_app_id: Tencent's SubAppId, None for an account without.

        Raises:
            ThrottledError: The quota is used up, or leaves no slot within `timeout_secs`.
            TransientError: Nothing usable came.
            OperatorError: Credentials, rights or configuration are wrong, or the answer is larger than VOD's can be
                and no event in its beginning is whole.
            StoppingError: `stop_pulling` was called before the request was sent.
        """
        answer = self._ask(self._pull, _named(sub_app_id), timeout_secs=self._timeout_secs, has_slot=False)
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
        """Wait for a slot of the quota of confirms; the caller then sends one.

        Args:
            timeout_secs: How long to wait at most.

        Returns:
            False, at once, if none comes within the time.
        """
        return self._confirm.limiter.acquire(timeout_secs)

    def confirm(self, sub_app_id: int | None, handles: Sequence[str], timeout_secs: float | None = None) -> str:
        """Let VOD forget events: one request, sent at once. `await_confirm_slot` gives leave to send it.

        Args:
            sub_app_id: As it was at the pull.
            handles: 1 to 16, of one pull.
            timeout_secs: What is left of the lease; the request takes `confirm_timeout_secs` at most.

        Returns:
            Tencent's RequestId, empty if the answer has none.

        Raises:
            RefusedHandlesError: Some handle is stale, or of another SubAppId. None may have been confirmed.
            ThrottledError: The quota is used up, or no time is left: nothing was confirmed.
            TransientError: It is not known whether the handles are confirmed.
            OperatorError: Credentials, rights or configuration are wrong.
        """
        content: dict[str, Any] = {"EventHandles": list(handles)}
        if sub_app_id is not None:
            content["SubAppId"] = sub_app_id
        own_secs = self._confirm_timeout_secs
        timeout_secs = own_secs if timeout_secs is None else min(timeout_secs, own_secs)
        answer = self._ask(self._confirm, encode_json(content), timeout_secs=timeout_secs, has_slot=True)
        if answer.error_code is not None:
            raise _refusal(CONFIRM, answer, self._key_renewal)
        response_of(answer)
        return answer.request_id

    def event_config(self, sub_app_id: int | None) -> EventConfig:
        """Ask how an application sends its events.

        Args:
            sub_app_id: Tencent's SubAppId, None for an account without.

        Raises:
            ThrottledError: The quota is used up, or leaves no slot within `timeout_secs`.
            TransientError: Nothing usable came.
            OperatorError: Credentials, rights or configuration are wrong; `is_missing_right` tells the rights apart.
        """
        return event_config_in(self._told(self._event_config, sub_app_id))

    def waiting_events(self, sub_app_id: int | None) -> int:
        """Ask for the number of events that wait to be pulled; it is up to 3 minutes old, so nothing may depend on it.

        Args:
            sub_app_id: Tencent's SubAppId, None for an account without.

        Raises:
            ThrottledError: As `event_config`, and so are the others.
            TransientError: See above.
            OperatorError: See above.
        """
        return waiting_events_in(self._told(self._events_state, sub_app_id))

    @property
    def skew_secs(self) -> float | None:
        """What must be added to this machine's clock to get VOD's, by the date of its last answer; None without."""
        header, received_at = self._last_date or (None, 0.0)
        server_time = http_date(header)
        return None if server_time is None else server_time - received_at

    @property
    def has_answered(self) -> bool:
        """Whether any answer came, with or without a date."""
        return self._last_date is not None

    def certificate_ends_at(self) -> float | None:
        """Connect to the endpoint, and ask nothing. Without TLS, or behind a proxy, not even that.

        Returns:
            When the certificate that it shows ends, in seconds since 1970; None if it was not asked for one.

        Raises:
            TransientError: It cannot be reached, or its certificate is not trusted.
            OperatorError: The configuration or the environment is wrong.
        """
        if self._environment.proxy or not self._url.startswith("https:"):
            return None
        try:
            return self._transport.connect_within(self._url, self._environment, self._timeout_secs)
        except CALL_ERRORS as error:  # not chained, as in `_sent`
            raise self._unanswered(error, self._timeout_secs) from None

    def stop_pulling(self) -> None:
        """Send no further pull, also of those that wait for a slot."""
        self._pulls_stopped = True

    def reopen(self) -> None:
        """Read what vouches for certificates again.

        Raises:
            ConfigError: It cannot be read; what was read before stays in use.
        """
        self._transport.reread_roots("api.ca_file")

    def close(self) -> None:
        """Close the connections. A call that is under way may fail."""
        self._transport.close()

    # --- one exchange -------------------------------------------------------------------------------------------------

    def _told(self, action: _Action, sub_app_id: int | None) -> Answer:
        """What VOD says to a question about an application; one that it refuses is an error."""
        answer = self._ask(action, _named(sub_app_id), timeout_secs=self._timeout_secs, has_slot=False)
        if answer.error_code is not None:
            raise refusal_in(action.name, answer, self._key_renewal)
        return answer

    def _ask(self, action: _Action, body: bytes, *, timeout_secs: float, has_slot: bool) -> Answer:
        offset_secs = self._clock_offset_secs
        answer = self._exchange(action, body, timeout_secs=timeout_secs, has_slot=has_slot)
        if answer.error_code == "AuthFailure.SignatureExpire" and self._clock_was_off(answer, offset_secs):
            answer = self._exchange(action, body, timeout_secs=timeout_secs, has_slot=has_slot)
        return answer

    def _clock_was_off(self, answer: Answer, used_offset_secs: float) -> bool:
        """Whether the server's time is another than the request was signed with; if so it is used from now on."""
        server_time = http_date(answer.headers.get("Date"))
        if server_time is None:
            return False
        offset_secs = server_time - self._wall()
        if abs(offset_secs - used_offset_secs) <= _CLOCK_OFF_SECS:
            return False
        with self._clock_lock:
            corrected = self._clock_offset_secs == used_offset_secs  # else another thread has done it meanwhile
            if corrected:
                self._clock_offset_secs = offset_secs
        if corrected:
            self._log.warning("clock.corrected", skew_secs=round(offset_secs, 1), request_id=answer.request_id)
        return True

    def _exchange(self, action: _Action, body: bytes, *, timeout_secs: float, has_slot: bool) -> Answer:
        """Wait for a slot, sign, send, and read the answer.

        Args:
            action: Which.
            body: Of the request.
            timeout_secs: For request and answer; as long a slot is waited for.
            has_slot: The caller has waited for one.
        """
        got_slot = timeout_secs > 0 and (has_slot or action.limiter.acquire(timeout_secs))
        prepared = self._prepare(action, body) if got_slot else None
        sent_at = self._monotonic()
        if self._pulls_stopped and action is self._pull:
            raise StoppingError(f"{action.name} was not sent: the daemon is stopping")
        if prepared is None:
            raise ThrottledError(f"{action.name} was not sent: api.requests_per_sec left no room for it in time")
        try:
            answer = self._sent(prepared, sent_at, timeout_secs)
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
                f"{action.name} was refused with {answer.error_code}: {answer.error_message}; a new key is asked for",
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

    def _sent(self, prepared: PreparedRequest, sent_at: float, timeout_secs: float) -> Answer:
        try:
            response = self._transport.send_within(
                prepared, self._environment, timeout_secs, connect_secs=_CONNECT_SECS
            )
        # Not chained: what these exceptions quote may be the token, or a proxy's password.
        except CALL_ERRORS as error:
            raise self._unanswered(error, timeout_secs) from None
        try:
            body, cut = self._read_body(response)
        finally:
            response.close()  # a connection whose answer was read to its end is in the pool by now and stays open
        return take_apart(response, body, cut, sent_at=sent_at, took_secs=self._monotonic() - sent_at)

    def _unanswered(self, error: Exception, timeout_secs: float) -> VodpollerError:
        """The error for a request without an answer."""
        match error:
            case RootsError():
                return OperatorError(f"no request can be sent to {self._where}: {error} (see api.ca_file)")
            case UnusableProxyError():
                return OperatorError(f"no request can be sent to {self._where}: {error}")
            case requests.ConnectTimeout():
                timeout_secs = min(timeout_secs, _CONNECT_SECS)
            case InvalidURL() | InvalidSchema() | MissingSchema():
                return OperatorError(
                    f"no request can be sent to {self._where}: it is not an address (see api.endpoint)"
                )
            case ValueError() if not isinstance(error, requests.RequestException):
                return OperatorError(
                    "the request cannot be sent: secret_id, token or region hold characters that no HTTP header may"
                    " hold"
                )
        said = f"{self._where} {failure_text(error, timeout_secs)}"
        if isinstance(error, requests.Timeout):
            whence = f": {said}" if isinstance(error, requests.ConnectTimeout) else f" from {self._where}"
            return NoAnswerError(f"no answer within {timeout_secs:.1f} s{whence}")
        return NoAnswerError(
            f"VOD cannot be asked: {said} (if this lasts: is api.endpoint right, and does it get through DNS, firewall"
            " and proxy?)"
        )

    def _read_body(self, response: requests.Response) -> tuple[bytes, str]:
        """All of the body that can be had in time, and why it is not all; empty if it is."""
        chunks: list[bytes] = []
        left = self._answer_max_bytes
        try:
            # read1 hands out what has come: read would keep it back, and lose it when the connection breaks.
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
        """Event by event, what can be read of an answer that cannot be as a whole."""
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


def _named(sub_app_id: int | None) -> bytes:
    """The body of a request that says no more than which application is meant."""
    return orjson.dumps({} if sub_app_id is None else {"SubAppId": sub_app_id})


def _headers(action: str, region: str) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"vodpoller/{__version__}",
        "Accept": "application/json",
        # Compression would cost more time than it saves, and hide the events of an answer that is cut.
        "Accept-Encoding": "identity",
        "X-TC-Action": action,
        "X-TC-Version": _VERSION,
    }
    return {**headers, "X-TC-Region": region} if region else headers


def _reason(error: Exception) -> str:
    """Why a body ends before its end."""
    if isinstance(error, DecodeError):
        return str(error.args[0])  # which encoding it is not in
    return f"VOD {failure_text(error, 0.0)}"


def _refusal(action: str, answer: Answer, key_renewal: str) -> VodpollerError:
    """What an answer with an error code is; of a request that was sent twice, it says nothing of the first time."""
    refusal = refusal_in(action, answer, key_renewal)
    if not answer.repeated:
        return refusal
    return TransientError(
        f"{refusal} | it was sent again after the connection broke: the first one may have been carried out",
        error_code=refusal.error_code,
        request_id=refusal.request_id,
    )
