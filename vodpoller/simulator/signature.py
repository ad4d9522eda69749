"""The check of a request's signature.

It shares no code with `vodpoller.vod.signature`, so that the simulator and the client agree only if both follow Tencent
Cloud's document.
"""

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import Final

from vodpoller.simulator.errors import ApiError
from vodpoller.simulator.server import DIGITS, Request

_SIGNATURE_SECS: Final = 300
_AUTHORIZATION: Final = re.compile(
    r"TC3-HMAC-SHA256 Credential=(?P<id>[^/\s,]+)/(?P<date>[^/\s,]+)/(?P<service>[^/\s,]+)/tc3_request, ?"
    r"SignedHeaders=(?P<headers>[a-z0-9;-]+), ?Signature=(?P<signature>[0-9a-f]+)"
)
_PORT: Final = re.compile(r":[0-9]+\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The key with a SecretId.

    Args:
        secret_key: Its SecretKey.
        token: Its token; None for a permanent key.
        ends_at: Unix time at which it expires, in seconds.
    """

    secret_key: str
    token: str | None = None
    ends_at: float = inf


def verify(request: Request, *, key_of: Callable[[str], Key | None], now: float, service: str = "vod") -> None:
    """Check a request's TC3-HMAC-SHA256 signature as the documents of signature v3 (product/266/38490) describe it.

    Args:
        request: A request with the headers `X-TC-Timestamp` and `Authorization`.
        key_of: Returns the key with a SecretId; None if it does not exist.
        now: Unix time, in seconds.
        service: The service of the API, as it is signed.

    Raises:
        ApiError: The signature is not valid. The code is the one that Tencent uses.
    """
    headers = request.headers
    timestamp = headers["x-tc-timestamp"]
    claim = _AUTHORIZATION.fullmatch(headers["authorization"])
    if claim is None:
        raise ApiError("AuthFailure.InvalidAuthorization", "The Authorization header is not that of signature v3.")
    key = key_of(claim["id"])
    if key is None:
        raise ApiError("AuthFailure.SecretIdNotFound", "The SecretId is not found.")
    if not DIGITS.fullmatch(timestamp) or abs(now - int(timestamp)) > _SIGNATURE_SECS:
        raise ApiError("AuthFailure.SignatureExpire", f"X-TC-Timestamp is more than {_SIGNATURE_SECS} s off.")
    names = claim["headers"].split(";")
    failure = ApiError("AuthFailure.SignatureFailure", "The signature is not that of this request and SecretKey.")
    if not {"content-type", "host"} <= set(names) <= set(headers) or names != sorted(names):
        raise failure
    date = datetime.fromtimestamp(int(timestamp), UTC).strftime("%Y-%m-%d")
    if (claim["date"], claim["service"]) != (date, service):
        raise failure
    if not _is_signed(request, claim, key.secret_key, service):
        raise failure
    if key.token is not None and headers.get("x-tc-token") != key.token:
        raise ApiError("AuthFailure.TokenFailure", "X-TC-Token is not the token of this SecretId.")
    if now >= key.ends_at:
        raise ApiError("AuthFailure.TokenFailure", "The token has expired.")


def _is_signed(request: Request, claim: re.Match[str], secret_key: str, service: str) -> bool:
    headers, date = request.headers, claim["date"]
    key = b"TC3" + secret_key.encode()
    for part in (date, service, "tc3_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    digest = hashlib.sha256(request.body).hexdigest()
    # VOD's host never has a port, so the document does not say whether a port is signed: the Python SDK signs the whole
    # header, the Node.js SDK leaves the port out.
    for host in {headers["host"], _PORT.sub("", headers["host"])}:
        values = {**headers, "host": host}
        signed = "".join(f"{name}:{values[name].lower()}\n" for name in claim["headers"].split(";"))
        canonical = "\n".join(("POST", "/", "", signed, claim["headers"], digest))
        canonical_digest = hashlib.sha256(canonical.encode("latin-1")).hexdigest()
        scope = f"{date}/{service}/tc3_request"
        text = "\n".join(("TC3-HMAC-SHA256", headers["x-tc-timestamp"], scope, canonical_digest))
        if hmac.compare_digest(hmac.digest(key, text.encode(), "sha256").hex(), claim["signature"]):
            return True
    return False
