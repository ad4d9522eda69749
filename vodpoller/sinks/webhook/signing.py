"""Signatures of requests, in the forms that receivers require.

Sources: "Standard Webhooks" specification (signature, secrets); DingTalk, "Custom robot access" (signature); Feishu,
"Custom bot usage guide" (signature).
"""

import base64
import binascii
import hashlib
import hmac
import re
from typing import Final, Literal, assert_never
from urllib.parse import quote_plus

Sign = Literal["standard", "dingtalk", "feishu"]

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what every such secret starts with, not a secret
_SECRET_BYTES: Final = range(24, 65)  # the specification's bounds
_PRINTABLE: Final = re.compile(r"[!-~]+")


def problem_in_secret(secret: str, sign: Sign) -> str:
    """What is wrong with a secret and what would be right, without any part of the secret; empty if it is usable.

    Args:
        secret: The secret.
        sign: The form of signature that it is used for.
    """
    match sign:
        case "standard":
            try:
                _signing_key(secret)
            except ValueError as error:
                right = "whsec_ and base64 of 24 to 64 random bytes; `openssl rand -base64 32` makes one"
                return f"{error} (right: {right})"
        case "dingtalk":
            if not (secret.startswith("SEC") and _PRINTABLE.fullmatch(secret)):
                return "it does not begin with SEC (right: the secret that the robot's settings show)"
        case "feishu":
            if secret.startswith(SECRET_PREFIX) or not _PRINTABLE.fullmatch(secret):
                return "it is not the secret of a Feishu bot (right: the secret that the bot's settings show)"
        case _:
            assert_never(sign)
    return ""


def standard_signature(secret: str, *, message_id: str, timestamp: str, body: bytes) -> str:
    """The value of the header `webhook-signature`.

    Args:
        secret: A secret without a problem.
        message_id: The value of `webhook-id`.
        timestamp: The value of `webhook-timestamp`.
        body: The request's body.
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    return f"v1,{_base64_hmac(_signing_key(secret), signed)}"


def dingtalk_query(secret: str, now: float) -> str:
    """The signature that DingTalk requires at the end of the URL's query.

    Args:
        secret: A secret without a problem.
        now: Unix time, in seconds.
    """
    timestamp = str(int(now * 1000))
    signature = _base64_hmac(secret.encode(), f"{timestamp}\n{secret}".encode())
    return f"timestamp={timestamp}&sign={quote_plus(signature)}"


def feishu_members(secret: str, now: float) -> dict[str, str]:
    """The signature that Feishu requires in the body, as members of the message.

    Args:
        secret: A secret without a problem.
        now: Unix time, in seconds.
    """
    timestamp = str(int(now))
    return {"timestamp": timestamp, "sign": _base64_hmac(f"{timestamp}\n{secret}".encode(), b"")}


def _base64_hmac(key: bytes, message: bytes) -> str:
    return base64.b64encode(hmac.digest(key, message, hashlib.sha256)).decode()


def _signing_key(secret: str) -> bytes:
    """The key of the HMAC.

    Raises:
        ValueError: The text says what is wrong with the secret, without showing it.
    """
    text = secret.removeprefix(SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not base64") from None
    if len(key) not in _SECRET_BYTES:
        raise ValueError(f"it is {len(key)} bytes long")
    return key
