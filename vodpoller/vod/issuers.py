"""Who hands out the temporary keys of a role: the metadata service of the machine, and STS.

Facts are from Tencent Cloud's documents "Instance role" (product/213/47668) and "AssumeRole" (product/1312/48197), and
from the official SDK's `credential.py`. No answer is ever quoted, not even a broken one: it may hold half of a key.
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
LIFE_MAX_SECS: Final = 43_200.0  # no key of STS lives longer; a later end is a mistake of the answer

_ANSWER_MAX_BYTES: Final = 64 * 1024
_METADATA_PATH: Final = "/latest/meta-data/cam/security-credentials/"
_NEVER: Final = 10**12
_STS_VERSION: Final = "2018-08-13"
_CLOCK_OFF_SECS: Final = 60.0
_ROLE_NAME: Final = re.compile(r"[\w+=,.@-]{1,128}", re.ASCII)
_OF_A_KEY: Final = re.compile(r"[!-~]+")
_CODE: Final = re.compile(r"[A-Za-z0-9.]{1,100}")
_MESSAGE_CHARS: Final = 300
# Codes of STS that begin so may go away by themselves.
_TRANSIENT_CODES: Final = ("InternalError", "RequestLimitExceeded", "ResourceUnavailable")
_SIGNATURE_EXPIRED: Final = "AuthFailure.SignatureExpire"


class Issuer(Protocol):
    """What hands out keys."""

    def __call__(self) -> IssuedKey:
        """Ask for a key, within the issuer's time limit.

        Raises:
            TransientError: No key came that can be used.
            OperatorError: None will come until a person acts.
        """

    def reopen(self) -> None:
        """Read what vouches for certificates again.

        Raises:
            ConfigError: It cannot be read; what was read before stays in use.
        """

    def close(self) -> None:
        """Close the connections."""


class MetadataService:
    """Hands out the keys of the role that is bound to this machine. It is asked directly, whatever the proxies are.

    Args:
        settings: Which role, and where.
        transport: Sends the requests.
        monotonic: The clock of the time limit, in seconds.
        wall: Unix time, in seconds; counts only if an answer has no date.
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
        """As `Issuer`: one call, and one more if the role's name has to be asked for, within 2 s in all."""
        deadline = Deadline(METADATA_SECS, self._monotonic)
        role = self._settings.role or self._role(deadline)
        answer = self._ask(quote(role, safe=""), deadline)
        if answer.status == HTTPStatus.NOT_FOUND:
            raise OperatorError(
                f"{self._where} knows no role {role} of this machine",
                advice="correct credentials.role, or leave it out to take the one that is bound to the machine",
            )
        content = answer.json_object()
        if content.get("Code") != "Success":
            said = content.get("Code")
            code = said if isinstance(said, str) and _CODE.fullmatch(said) else "an answer without a code"
            raise TransientError(f"{self._where} gave no key of role {role}: {code}")
        return answer.issued(content, content.get("ExpiredTime"), f"role {role} of this machine", self._wall)

    def reopen(self) -> None:
        """There is nothing to read: it speaks plain HTTP, or the public CAs vouch for it."""

    def close(self) -> None:
        """As `Issuer`."""
        self._transport.close()

    def _role(self, deadline: Deadline) -> str:
        answer = self._ask("", deadline)
        lines = [] if answer.status == HTTPStatus.NOT_FOUND else answer.text().split()
        if not lines:
            raise OperatorError(
                f"{self._where} knows no role of this machine",
                advice="bind one to the instance in the console of CVM (More, Instance settings, Bind role)",
            )
        if not _ROLE_NAME.fullmatch(lines[0]):
            raise TransientError(f"{self._where} answered with what is not the name of a role")
        return lines[0]

    def _ask(self, path: str, deadline: Deadline) -> "_Answer":
        request = PreparedRequest()
        request.method = "GET"
        request.url = self._settings.metadata_endpoint + _METADATA_PATH + path
        request.headers = CaseInsensitiveDict({"User-Agent": f"vodpoller/{__version__}", "Accept": "*/*"})
        answer = _asked(self._transport, request, Environment(proxy=""), deadline, self._monotonic, self._where)
        if answer.status not in (HTTPStatus.OK, HTTPStatus.NOT_FOUND):
            raise answer.failure("is credentials.metadata_endpoint right?")
        return answer


class Sts:
    """Hands out the keys of a role that a lasting key may assume.

    Args:
        settings: Which role, and where.
        key: The lasting key.
        key_renewal: What a person must do so that another lasting key is used.
        ca_file: PEM with what vouches for its certificate; None is what the environment says, or the public CAs.
        transport: Sends the requests; a `DeadlineAdapter` with `ca_file` unless told otherwise.
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
        """As `Issuer`. If it is refused because this machine's clock is wrong, it is asked again with its own time."""
        deadline = Deadline(STS_SECS, self._monotonic)
        answer = self._ask(deadline)
        response = answer.response()
        if _code_in(response) == _SIGNATURE_EXPIRED and self._clock_was_off(answer):
            answer = self._ask(deadline)
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

    def _ask(self, deadline: Deadline) -> "_Answer":
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
        return _asked(self._transport, self._sign(request), self._environment, deadline, self._monotonic, self._where)

    def _clock_was_off(self, answer: "_Answer") -> bool:
        if answer.date is None:
            return False
        before, self._offset_secs = self._offset_secs, answer.date - self._wall()
        return abs(self._offset_secs - before) > _CLOCK_OFF_SECS

    def _refusal(self, response: Mapping[str, Any]) -> VodpollerError:
        error = response["Error"]
        code = _code_in(response)
        said = str(error.get("Message") or "")[:_MESSAGE_CHARS] if isinstance(error, dict) else ""
        request_id = response.get("RequestId")
        request_id = request_id if isinstance(request_id, str) else ""
        message = f"{self._where} refused AssumeRole with {code or 'an error without a code'}: {said}"
        if not code or code.startswith(_TRANSIENT_CODES):
            return TransientError(message, error_code=code, request_id=request_id)
        return OperatorError(
            message,
            advice="is role_arn right, does the role trust the account of the lasting key, and may that key call"
            f" sts:AssumeRole? After another lasting key was put in place, {self._key_renewal}",
            error_code=code,
            request_id=request_id,
        )


# --- one exchange -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """An answer whose body was read.

    Args:
        where: Whose it is, for messages.
        asked_at: Monotonic time at which its request was sent.
        status: Of HTTP.
        date: Of its head, Unix time in seconds; None without.
        body: The beginning of it.
        is_whole: Whether that is all.
    """

    where: str
    asked_at: float
    status: int
    date: float | None
    body: bytes
    is_whole: bool

    def text(self) -> str:
        try:
            return self.body.decode()
        except UnicodeDecodeError:
            raise self.unusable("it is not text") from None

    def json_object(self) -> Mapping[str, Any]:
        try:
            content = decode_json(self.text())
        except UnreadableError:  # it quotes what it could not read
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
        """The key in it.

        Args:
            key: Has `TmpSecretId`, `TmpSecretKey` and `Token`.
            ends_at: Its `ExpiredTime`.
            role: As in `IssuedKey`.
            wall: Unix time, in seconds; counts only if the answer has no date.
        """
        parts = [key.get(name) for name in ("TmpSecretId", "TmpSecretKey", "Token")]
        texts = [part for part in parts if isinstance(part, str) and _OF_A_KEY.fullmatch(part)]
        if len(texts) != len(parts):
            raise self.unusable("it lacks a part of the key")
        if not isinstance(ends_at, int | float) or isinstance(ends_at, bool):
            raise self.unusable("it does not say when the key ends")
        # A date is cut to whole seconds, and the answer took its time: the key must not be used after its end.
        now = wall() if self.date is None else self.date + 1
        life_secs = max(min(ends_at, _NEVER), 0) - now
        if life_secs <= 0:
            raise self.unusable(f"its key has ended {-life_secs:.0f} s ago")
        life_secs = min(life_secs, LIFE_MAX_SECS)
        return IssuedKey(
            credentials=Credentials(*texts), role=role, life_secs=life_secs, ends_at=self.asked_at + life_secs
        )

    def failure(self, hint: str) -> TransientError:
        if self.status in REDIRECTS:
            hint = f"which is not followed: {hint}"
        return TransientError(f"{self.where} answered {status_text(self.status)} ({hint})")

    def unusable(self, why: str) -> TransientError:
        cut = "" if self.is_whole else "; it is cut off or far too long"
        return TransientError(f"the answer of {self.where} cannot be used: {why}{cut}")


def _code_in(response: Mapping[str, Any]) -> str:
    error = response.get("Error")
    code = error.get("Code") if isinstance(error, dict) else None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""


def _asked(
    transport: Transport,
    request: PreparedRequest,
    environment: Environment,
    deadline: Deadline,
    monotonic: Callable[[], float],
    where: str,
) -> _Answer:
    """Send a request and read the answer, within what is left of the time."""
    asked_at = monotonic()
    # Not chained: what these exceptions quote may be the token, or a proxy's password.
    try:
        response = transport.send_within(request, environment, deadline.left_secs())
    except (RootsError, UnusableProxyError) as error:
        raise OperatorError(f"{where} cannot be asked: {error}") from None
    except CALL_ERRORS as error:
        raise NoAnswerError(f"{where} {failure_text(error, deadline)}") from None
    try:
        body, is_whole = _read(response)
    finally:
        response.close()
    date = http_date(response.headers.get("Date"))
    return _Answer(where=where, asked_at=asked_at, status=response.status_code, date=date, body=body, is_whole=is_whole)


def _read(response: requests.Response) -> tuple[bytes, bool]:
    """The body as far as it came in time, and whether that is all of it."""
    body = b""
    try:
        while chunk := response.raw.read1(_ANSWER_MAX_BYTES, decode_content=True):
            body += chunk
            if len(body) > _ANSWER_MAX_BYTES:
                return body, False
    except CALL_ERRORS:
        return body, False
    return body, True
