"""Signatures of requests.

Source: "Standard Webhooks" specification (signature, secrets).
"""

import base64
import binascii
from typing import Final

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what every such secret starts with, not a secret
_SECRET_BYTES: Final = range(24, 65)  # the specification's bounds
SECRET_HELP: Final = "whsec_ and base64 of 24 to 64 random bytes; `openssl rand -base64 32` makes one"  # noqa: S105 - as above


def signing_key(secret: str) -> bytes:
    """The bytes that sign.

    Raises:
        ValueError: Says what is wrong with the secret without showing it.
    """
    text = secret.removeprefix(SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is not base64") from None
    if len(key) not in _SECRET_BYTES:
        raise ValueError(f"it is {len(key)} bytes long")
    return key
