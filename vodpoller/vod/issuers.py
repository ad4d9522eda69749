"""The issuers of the temporary keys of a role: the metadata service of the machine, and STS.

Facts are from Tencent Cloud's documents "Instance role" (product/213/47668) and "AssumeRole" (product/1312/48197), and
from the official SDK's `credential.py`. No answer is ever quoted, not even an invalid one: it may hold part of a key.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote

import requests
from requests import PreparedRequest
from requests.structures import CaseInsensitiveDict

from vodpoller import __version__
from vodpoller.errors import NoAnswerError, OperatorError, TransientError, VodpollerError
from vodpoller.events.codec import UnreadableError, decode_json, encode_json
from vodpoller.httpclient.address import Environment, environment_of, host_and_port
from vodpoller.httpclient.deadline import Deadline
from vodpoller.httpclient.transport import CALL_ERRORS, DeadlineAdapter, Transport
from vodpoller.httpclient.trust import RootsError
from vodpoller.httpclient.words import REDIRECTS, UnusableProxyError, failure_text, http_date, status_text
from vodpoller.vod.credentials import AssumedRole, Credentials, CvmRole, IssuedKey, StaticCredentials
from vodpoller.vod.signature import Tc3Auth

METADATA_SECS: Final = 2.0
STS_SECS: Final = 10.0
LIFE_MAX_SECS: Final = 43_200.0  # the maximum lifetime of a key of STS; an answer with a later end is wrong

_ANSWER_MAX_BYTES: Final = 64 * 1024
_METADATA_PATH: Final = "/latest/meta-data/cam/security-credentials/"
_NEVER: Final = 10**12
_STS_VERSION: Final = "2018-08-13"
_CLOCK_OFF_SECS: Final = 60.0
_ROLE_NAME: Final = re.compile(r"[\w+=,.@-]{1,128}", re.ASCII)
_KEY_PART: Final = re.compile(r"[!-~]+")
_CODE: Final = re.compile(r"[A-Za-z0-9.]{1,100}")
_MESSAGE_CHARS: Final = 300
# Prefixes of STS error codes that may be temporary.
_TRANSIENT_CODES: Final = ("InternalError", "RequestLimitExceeded", "ResourceUnavailable")
_SIGNATURE_EXPIRED: Final = "AuthFailure.SignatureExpire"


class Issuer(Protocol):
    """Issues keys."""

    def __call__(self) -> IssuedKey:
        """Request a key, within the issuer's time limit.

        Raises:
            TransientError: No usable key was received.
            OperatorError: No key will be issued until the operator acts.
        """

    def reopen(self) -> None:
        """Read the root certificates again.

        Raises:
            ConfigError: They cannot be read; those that were read before stay in use.
        """

    def close(self) -> None:
        """Close the connections."""


class MetadataService:
    """Issues keys of the role that is bound to this machine. Requests to it never go through a proxy.

    Args:
        settings: The role, and the address of the metadata service.
        transport: Sends the requests; None: a `DeadlineAdapter`.
        monotonic: The clock of the time limit, in seconds.
        wall: Unix time, in seconds; used only if an answer has no date.
    """

    def __init__(
        self,
        settings: CvmRole,
        *,
        transport: Transport | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._transport = transport or DeadlineAdapter(connections=1, monotonic=monotonic)
        self._monotonic = monotonic
        self._wall = wall
        self._where = f"the metadata service {host_and_port(settings.metadata_endpoint)}"

    def __call__(self) -> IssuedKey:
        """As `Issuer`: one call, and one before it if the role's name must be requested, within 2 s in total."""
        deadline = Deadline(METADATA_SECS, self._monotonic)
        role = self._settings.role or self._role(deadline)
        answer = self._call(quote(role, safe=""), deadline)
        if answer.status == HTTPStatus.NOT_FOUND:
            raise OperatorError(
                f"{self._where} does not know a role {role} of this machine",
                advice="correct credentials.role, or leave it out to use the role that is bound to the machine",
            )
        content = answer.json_object()
        if content.get("Code") != "Success":
            given = content.get("Code")
            code = given if isinstance(given, str) and _CODE.fullmatch(given) else "an answer without a code"
            raise TransientError(f"{self._where} returned no key of role {role}: {code}")
        return answer.issued(content, content.get("ExpiredTime"), f"role {role} of this machine", self._wall)

    def reopen(self) -> None:
        """Do nothing: the metadata service uses plain HTTP, or a certificate of a public CA."""

    def close(self) -> None:
        """As `Issuer`."""
        self._transport.close()

    def _role(self, deadline: Deadline) -> str:
        answer = self._call("", deadline)
        lines = [] if answer.status == HTTPStatus.NOT_FOUND else answer.text().split()
        if not lines:
            raise OperatorError(
                f"{self._where} does not know any role of this machine",
                advice="bind a role to the instance in the console of CVM (More, Instance settings, Bind role)",
            )
        if not _ROLE_NAME.fullmatch(lines[0]):
            raise TransientError(f"{self._where} sent an answer that is not the name of a role")
        return lines[0]

    def _call(self, path: str, deadline: Deadline) -> "_Answer":
        request = PreparedRequest()
        request.method = "GET"
        request.url = self._settings.metadata_endpoint + _METADATA_PATH + path
        request.headers = CaseInsensitiveDict({"User-Agent": f"vodpoller/{__version__}", "Accept": "*/*"})
        answer = _exchange(self._transport, request, Environment(proxy=""), deadline, self._monotonic, self._where)
        if answer.status not in (HTTPStatus.OK, HTTPStatus.NOT_FOUND):
            raise answer.failure("is credentials.metadata_endpoint right?")
        return answer


class Sts:
    """Issues keys of a role that a permanent key may assume.

    Args:
        settings: The role, and the address of STS.
        key: The permanent key.
        key_renewal: What the operator must do after replacing the permanent key, so that the new one is used.
        ca_file: PEM file with the root certificates for the certificate of STS; None: those of the environment, or of
            the public CAs.
        transport: Sends the requests; None: a `DeadlineAdapter` with `ca_file`.
        monotonic: The clock of the time limit, in seconds.
        wall: Unix time, in seconds.
    """

    def __init__(
        self,
        settings: AssumedRole,
        *,
        key: StaticCredentials,
        key_renewal: str,
        ca_file: Path | None = None,
        transport: Transport | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._key_renewal = key_renewal
        self._transport = transport or DeadlineAdapter(connections=1, ca_file=ca_file, monotonic=monotonic)
        self._monotonic = monotonic
        self._wall = wall
        self._offset_secs = 0.0
        self._url = f"{settings.sts_endpoint}/"
        self._environment = environment_of(self._url)
        self._where = f"STS {host_and_port(self._url)}"
        self._sign = Tc3Auth(key, service="sts", wall=lambda: wall() + self._offset_secs)

    def __call__(self) -> IssuedKey:
        """As `Issuer`. A request that is refused because of this machine's clock is repeated with the time of STS."""
        deadline = Deadline(STS_SECS, self._monotonic)
        answer = self._call(deadline)
        response = answer.response()
        if _code_in(response) == _SIGNATURE_EXPIRED and self._clock_was_off(answer):
            answer = self._call(deadline)
            response = answer.response()
        if response.get("Error") is not None:
            raise self._refusal(response)
        key = response.get("Credentials")
        if not isinstance(key, dict):
            raise answer.unusable("it has no Credentials")
        return answer.issued(key, response.get("ExpiredTime"), f"role {self._settings.role_arn}", self._wall)

    def reopen(self) -> None:
        """As `Issuer`."""
        self._transport.reread_roots("api.ca_file")

    def close(self) -> None:
        """As `Issuer`."""
        self._transport.close()

    def _call(self, deadline: Deadline) -> "_Answer":
        settings = self._settings
        wanted: dict[str, Any] = {
            "RoleArn": settings.role_arn,
            "RoleSessionName": settings.role_session_name,
            "DurationSeconds": settings.duration_secs,
        }
        body = encode_json(wanted | ({"ExternalId": settings.external_id} if settings.external_id else {}))
        request = PreparedRequest()
        request.method = "POST"
        request.url = self._url
        request.body = body
        request.headers = CaseInsensitiveDict(
            {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "User-Agent": f"vodpoller/{__version__}",
                "Accept": "application/json",
                "X-TC-Action": "AssumeRole",
                "X-TC-Version": _STS_VERSION,
                "X-TC-Region": settings.sts_region,
            }
        )
        return _exchange(
            self._transport, self._sign(request), self._environment, deadline, self._monotonic, self._where
        )

    def _clock_was_off(self, answer: "_Answer") -> bool:
        if answer.date is None:
            return False
        before, self._offset_secs = self._offset_secs, answer.date - self._wall()
        return abs(self._offset_secs - before) > _CLOCK_OFF_SECS

    def _refusal(self, response: Mapping[str, Any]) -> VodpollerError:
        error = response["Error"]
        code = _code_in(response)
        text = str(error.get("Message") or "")[:_MESSAGE_CHARS] if isinstance(error, dict) else ""
        request_id = response.get("RequestId")
        request_id = request_id if isinstance(request_id, str) else ""
        message = f"{self._where} refused AssumeRole with {code or 'an error without a code'}: {text}"
        if not code or code.startswith(_TRANSIENT_CODES):
            return TransientError(message, error_code=code, request_id=request_id)
        return OperatorError(
            message,
            advice="is role_arn right, does the role trust the account of the permanent key, and may that key call"
            f" sts:AssumeRole? After replacing the permanent key, {self._key_renewal}",
            error_code=code,
            request_id=request_id,
        )


# --- one exchange -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """An answer whose body has been read.

    Args:
        where: The service that sent it, for messages.
        sent_at: Monotonic time at which sending the request began.
        status: The HTTP status.
        date: The header `Date` as Unix time in seconds; None if there is none.
        body: The received part of the body.
        is_complete: Whether `body` is the complete body.
    """

    where: str
    sent_at: float
    status: int
    date: float | None
    body: bytes
    is_complete: bool

    def text(self) -> str:
        try:
            return self.body.decode()
        except UnicodeDecodeError:
            raise self.unusable("it is not text") from None

    def json_object(self) -> Mapping[str, Any]:
        try:
            content = decode_json(self.text())
        except UnreadableError:  # not chained: it quotes the text that it cannot read
            raise self.unusable("it is not JSON") from None
        if not isinstance(content, dict):
            raise self.unusable("it is not an object")
        return content

    def response(self) -> Mapping[str, Any]:
        if self.status != HTTPStatus.OK:
            raise self.failure("is credentials.sts_endpoint right?")
        response = self.json_object().get("Response")
        if not isinstance(response, dict):
            raise self.unusable("it has no Response")
        return response

    def issued(self, key: Mapping[str, Any], ends_at: object, role: str, wall: Callable[[], float]) -> IssuedKey:
        """The key in the answer.

        Args:
            key: The object with `TmpSecretId`, `TmpSecretKey` and `Token`.
            ends_at: The answer's `ExpiredTime`.
            role: As in `IssuedKey`.
            wall: Unix time, in seconds; used only if the answer has no date.
        """
        parts = [key.get(name) for name in ("TmpSecretId", "TmpSecretKey", "Token")]
        texts = [part for part in parts if isinstance(part, str) and _KEY_PART.fullmatch(part)]
        if len(texts) != len(parts):
            raise self.unusable("it lacks a part of the key")
        if not isinstance(ends_at, int | float) or isinstance(ends_at, bool):
            raise self.unusable("it does not say when the key ends")
        # `Date` is rounded down to whole seconds, and the answer took time: a key must not be used after its end.
        now = wall() if self.date is None else self.date + 1
        life_secs = max(min(ends_at, _NEVER), 0) - now
        if life_secs <= 0:
            raise self.unusable(f"its key ended {-life_secs:.0f} s ago")
        life_secs = min(life_secs, LIFE_MAX_SECS)
        return IssuedKey(
            credentials=Credentials(*texts), role=role, life_secs=life_secs, ends_at=self.sent_at + life_secs
        )

    def failure(self, hint: str) -> TransientError:
        if self.status in REDIRECTS:
            hint = f"which is not followed: {hint}"
        return TransientError(f"{self.where} answered {status_text(self.status)} ({hint})")

    def unusable(self, why: str) -> TransientError:
        cut = "" if self.is_complete else "; it is incomplete or far too long"
        return TransientError(f"the answer of {self.where} cannot be used: {why}{cut}")


def _code_in(response: Mapping[str, Any]) -> str:
    error = response.get("Error")
    code = error.get("Code") if isinstance(error, dict) else None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""


def _exchange(
    transport: Transport,
    request: PreparedRequest,
    environment: Environment,
    deadline: Deadline,
    monotonic: Callable[[], float],
    where: str,
) -> _Answer:
    """Send a request and read the answer, within the time that the deadline leaves."""
    sent_at = monotonic()
    # Not chained: these exceptions may quote the token, or a proxy's password.
    try:
        response = transport.send_within(request, environment, deadline.left_secs())
    except (RootsError, UnusableProxyError) as error:
        raise OperatorError(f"{where} cannot be called: {error}") from None
    except CALL_ERRORS as error:
        raise NoAnswerError(f"{where} {failure_text(error, deadline)}") from None
    try:
        body, is_complete = _read(response)
    finally:
        response.close()
    date = http_date(response.headers.get("Date"))
    return _Answer(
        where=where, sent_at=sent_at, status=response.status_code, date=date, body=body, is_complete=is_complete
    )


def _read(response: requests.Response) -> tuple[bytes, bool]:
    """The part of the body that is received in time, and whether it is complete."""
    body = b""
    try:
        while chunk := response.raw.read1(_ANSWER_MAX_BYTES, decode_content=True):
            body += chunk
            if len(body) > _ANSWER_MAX_BYTES:
                return body, False
    except CALL_ERRORS:
        return body, False
    return body, True
