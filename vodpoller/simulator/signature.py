"""The check of a request's signature, by code that shares nothing with `vodpoller.vod.signature`.

So that the simulator and the client agree only if both do as Tencent Cloud's document says.
"""

import hashlib
import hmac
import re
from datetime import UTC, datetime
from typing import Final

from vodpoller.simulator.errors import ApiError
from vodpoller.simulator.server import DIGITS, Request

_SIGNATURE_SECS: Final = 300
_AUTHORIZATION: Final = re.compile(
    r"TC3-HMAC-SHA256 Credential=(?P<id>[^/\s,]+)/(?P<date>[^/\s,]+)/(?P<service>[^/\s,]+)/tc3_request, ?"
    r"SignedHeaders=(?P<headers>[a-z0-9;-]+), ?Signature=(?P<signature>[0-9a-f]+)"
)
_PORT: Final = re.compile(r":[0-9]+\Z")


def verify(request: Request, *, secret_id: str, secret_key: str, token: str | None, now: float) -> None:
    """Check a request's TC3-HMAC-SHA256 signature as the documents of signature v3 (product/266/38490) describe it.

    Args:
        request: With the headers `X-TC-Timestamp` and `Authorization`.
        secret_id: The only one that exists.
        secret_key: That of `secret_id`.
        token: That of `secret_id`; None if it needs none.
        now: Unix time, in seconds.

    Raises:
        ApiError: With the code that Tencent gives the failure.
    """
    headers = request.headers
    timestamp = headers["x-tc-timestamp"]
    claim = _AUTHORIZATION.fullmatch(headers["authorization"])
    if claim is None:
        raise ApiError("AuthFailure.InvalidAuthorization", "The Authorization header is not that of signature v3.")
    if claim["id"] != secret_id:
        raise ApiError("AuthFailure.SecretIdNotFound", "There is no such SecretId.")
    if not DIGITS.fullmatch(timestamp) or abs(now - int(timestamp)) > _SIGNATURE_SECS:
        raise ApiError("AuthFailure.SignatureExpire", f"X-TC-Timestamp is more than {_SIGNATURE_SECS} s off.")
    names = claim["headers"].split(";")
    failure = ApiError("AuthFailure.SignatureFailure", "The signature is not that of this request and SecretKey.")
    if not {"content-type", "host"} <= set(names) <= set(headers) or names != sorted(names):
        raise failure
    date = datetime.fromtimestamp(int(timestamp), UTC).strftime("%Y-%m-%d")
    if (claim["date"], claim["service"]) != (date, "vod"):
        raise failure
    key = b"TC3" + secret_key.encode()
    for part in (date, "vod", "tc3_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    # VOD's host never has a port, so that the document leaves open what is signed of one: Python's SDK signs the whole
    # header, that of Node.js leaves the port out.
    for host in {headers["host"], _PORT.sub("", headers["host"])}:
        values = {**headers, "host": host}
        signed = "".join(f"{name}:{values[name].lower()}\n" for name in names)
        digest = hashlib.sha256(request.body).hexdigest()
        canonical = "\n".join(("POST", "/", "", signed, claim["headers"], digest))
        canonical_digest = hashlib.sha256(canonical.encode("latin-1")).hexdigest()
        text = "\n".join(("TC3-HMAC-SHA256", timestamp, f"{date}/vod/tc3_request", canonical_digest))
        if hmac.compare_digest(hmac.digest(key, text.encode(), "sha256").hex(), claim["signature"]):
            break
    else:
        raise failure
    if token is not None and headers.get("x-tc-token") != token:
        raise ApiError("AuthFailure.TokenFailure", "X-TC-Token is not the token of this SecretId.")
