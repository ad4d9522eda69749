"""Removes a webhook's secrets from texts: an answer of a receiver may repeat what it was sent."""

import base64
import binascii
import html
import re
from collections.abc import Iterator
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from vodpoller.sinks.webhook.config import WebhookConfig
from vodpoller.sinks.webhook.signing import SECRET_PREFIX

_SECRET_MIN_CHARACTERS: Final = 8  # a shorter one would also match parts of ordinary words
_PATH_SECRET_MIN_CHARACTERS: Final = 20


def without_secrets(text: str, config: WebhookConfig) -> str:
    """The text with *** in place of each secret.

    Args:
        text: Any text; it may hold a receiver's answer.
        config: Holds the secrets.
    """
    hidden = {form for value in _secrets(config) for form in _forms(value) if len(form) >= _SECRET_MIN_CHARACTERS}
    for form in sorted(hidden, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def _secrets(config: WebhookConfig) -> Iterator[str]:
    """Everything that may be secret: header values and their parts, the signing secret, parts of the URL."""
    for value in config.headers.values():
        yield value
        yield from _tokens(value)
    if config.secret is not None:
        yield config.secret.get()
        yield config.secret.get().removeprefix(SECRET_PREFIX)
    parts = urlsplit(config.address)
    if config.url_file is not None:
        yield config.url_file.get()
        yield parts.path
    yield parts.query
    yield from (value for _, value in parse_qsl(parts.query))
    # Robots of chat programs have their token in the path.
    yield from (part for part in parts.path.split("/") if len(part) >= _PATH_SECRET_MIN_CHARACTERS)


def _tokens(value: str) -> Iterator[str]:
    """The parts of a header's value that may be secrets themselves, such as TOKEN in "Bearer TOKEN"."""
    yield from re.split(r"[\s,;=\"]+", value)
    scheme, _, encoded = value.partition(" ")
    if scheme.lower() == "basic":  # RFC 7617: base64 of user:password
        try:
            decoded = base64.b64decode(encoded, validate=True).decode(errors="replace")
        except (binascii.Error, ValueError):
            return
        yield decoded
        yield decoded.partition(":")[2]


def _forms(value: str) -> tuple[str, ...]:
    """The value as it is, and as it may be written in JSON, HTML and URLs."""
    return value, value.replace("/", "\\/"), html.escape(value), quote(value, safe=""), unquote(value)
