"""The signature of Tencent Cloud's API 3.0, as an auth class for requests.

The method is TC3-HMAC-SHA256, from Tencent Cloud's document "Signature v3"; tests compare it with the official SDK.
"""

import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from requests import PreparedRequest
from requests.auth import AuthBase

from vodpoller.httpclient.address import host_header
from vodpoller.vod.credentials import Credentials

_DAY_SECS = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class _SigningKey:
    """The signing key of one day, and the values from which it was derived."""

    secret_key: str
    day: int
    scope: str
    key: bytes


class Tc3Auth(AuthBase):
    """Signs requests to the root path of an endpoint of API 3.0, where all actions are.

    Args:
        credentials: Called for each request, so that a renewed key is used at once.
        service: The product's name in the signature.
        wall: Unix time in seconds, as exact as possible: Tencent refuses an error of more than 300 s.
    """

    def __init__(
        self, credentials: Callable[[], Credentials], *, service: str = "vod", wall: Callable[[], float] = time.time
    ) -> None:
        self._credentials = credentials
        self._service = service
        self._wall = wall
        # Caches of one entry each, replaced as a whole: a race between threads only computes the same value twice.
        self._signing_key: _SigningKey | None = None
        self._host: tuple[str, str] = ("", "")

    def __call__(self, prepared: PreparedRequest) -> PreparedRequest:
        """Set Host, X-TC-Timestamp, X-TC-Token and Authorization.

        Args:
            prepared: A POST request whose body and Content-Type are final.
        """
        credentials = self._credentials()
        timestamp = int(self._wall())
        host = self._host_of(prepared.url or "")
        headers = prepared.headers
        headers["Host"] = host
        headers["X-TC-Timestamp"] = str(timestamp)
        if credentials.token:
            headers["X-TC-Token"] = credentials.token
        else:
            headers.pop("X-TC-Token", None)

        body = prepared.body or b""
        payload_hash = sha256(body.encode() if isinstance(body, str) else body).hexdigest()
        canonical = (
            f"POST\n/\n\ncontent-type:{headers['Content-Type']}\nhost:{host}\n\ncontent-type;host\n{payload_hash}"
        )
        signing = self._key_of(credentials.secret_key, timestamp // _DAY_SECS)
        to_sign = f"TC3-HMAC-SHA256\n{timestamp}\n{signing.scope}\n{sha256(canonical.encode()).hexdigest()}"
        signature = hmac.digest(signing.key, to_sign.encode(), "sha256").hex()
        headers["Authorization"] = (
            f"TC3-HMAC-SHA256 Credential={credentials.secret_id}/{signing.scope}, "
            f"SignedHeaders=content-type;host, Signature={signature}"
        )
        return prepared

    def _key_of(self, secret_key: str, day: int) -> _SigningKey:
        known = self._signing_key
        if known is not None and known.day == day and known.secret_key == secret_key:
            return known
        date = datetime.fromtimestamp(day * _DAY_SECS, UTC).strftime("%Y-%m-%d")
        key = f"TC3{secret_key}".encode()
        for part in (date, self._service, "tc3_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        scope = f"{date}/{self._service}/tc3_request"
        self._signing_key = known = _SigningKey(secret_key=secret_key, day=day, scope=scope, key=key)
        return known

    def _host_of(self, url: str) -> str:
        known_url, host = self._host
        if url == known_url:
            return host
        host = host_header(url)
        self._host = (url, host)
        return host
