"""Reads the body of a request: an event, an event that cannot be read, or a body that is not from VOD. Pure functions.

`Sign` is the MD5 of the key that is set at VOD, followed by `T`, the time at which the signature expires. It covers
neither body nor path. Both are members beside those of the event and do not belong to it.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, Final, Protocol

from vodpoller.callback.refusal import (
    BAD_SIGNATURE,
    NO_EVENT,
    NOT_JSON,
    OLD_AND_UNSIGNED,
    RefusedError,
)
from vodpoller.events.codec import UnreadableError, decode_json, encode_json
from vodpoller.events.event import Malformed, PulledEvent, make_event, make_malformed
from vodpoller.secret import Secret

_SIGN: Final = re.compile(r"[0-9A-Fa-f]{32}")
_TIME: Final = re.compile(r"[0-9]{1,12}")
_SIGN_IN_TEXT: Final = re.compile(r'"Sign"\s*+:\s*+"[0-9A-Fa-f]{32}"')
_TIME_IN_TEXT: Final = re.compile(r'"T"\s*+:\s*+(?:"[0-9]{1,12}"|[0-9]{1,12}\b)')
_OLD: Final = "it has the format 4.0 of old callback URLs: set the callback format to 3.0 in VOD"
_LOOKS_LIKE_AN_EVENT: Final = '"EventType"'

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class CallbackSource(Protocol):
    """The settings of a source that are needed to read its callbacks; see the table of keys."""

    @property
    def name(self) -> str:
        """As in the configuration."""

    @property
    def sub_app_id(self) -> int | None:
        """As in the configuration."""

    @property
    def sign_key(self) -> Secret | None:
        """As in the configuration."""

    @property
    def allow_from(self) -> Sequence[Network] | None:
        """As in the configuration."""

    @property
    def forwarded_from(self) -> Sequence[Network] | None:
        """As in the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Callback:
    """A body that VOD sent.

    Args:
        event: The event; `Malformed` if the body cannot be read as an event.
        expired_secs: Seconds since the signature expired; 0 if it has not expired or is not checked.
    """

    event: PulledEvent | Malformed
    expired_secs: float = 0.0


def read_callback(body: bytes, handle: str, source: CallbackSource, *, now: float) -> Callback:
    """Read the body of a request.

    Args:
        body: The received body.
        handle: The handle of its connection.
        source: The source to which its path belongs.
        now: The current time in seconds since 1970.

    Raises:
        RefusedError: It is not an event of VOD, or not correctly signed.
    """
    text = body.decode(errors="surrogateescape")
    try:
        content = decode_json(body.decode())
    except (UnreadableError, UnicodeDecodeError) as error:
        if source.sign_key is not None:  # its signature cannot be read
            raise RefusedError(NOT_JSON) from None
        if _LOOKS_LIKE_AN_EVENT not in text:
            raise RefusedError(NOT_JSON) from None
        return Callback(event=_malformed(text, str(error), handle, source))
    if not isinstance(content, dict):
        raise RefusedError(NO_EVENT)
    is_old = content.get("version") in ("4.0", 4, 4.0) and "eventType" in content
    signed, expires_at = _take_signature(content, source, is_old=is_old)
    if not is_old and not _is_event(content):
        raise RefusedError(NO_EVENT)
    try:
        if is_old:
            return Callback(event=_malformed(encode_json(content).decode(), _OLD, handle, source))
        event = make_event(content, source=source.name, sub_app_id=source.sub_app_id)
    except UnreadableError as error:
        return Callback(event=_malformed(text, str(error), handle, source))
    return Callback(
        event=PulledEvent(handle=handle, event=event),
        expired_secs=max(now - expires_at, 0.0) if signed else 0.0,
    )


def _take_signature(content: dict[str, Any], source: CallbackSource, *, is_old: bool) -> tuple[bool, int]:
    """Remove `Sign` and `T` from the content, if both are there and have the right form, and check the signature.

    Returns:
        Whether the content is signed with the source's key, and the time at which the signature expires, in seconds
        since 1970.

    Raises:
        RefusedError: The source has a key, and the content is not signed with it.
    """
    sign, expires = content.get("Sign"), content.get("T")
    if isinstance(expires, int) and not isinstance(expires, bool):
        expires = str(expires)
    has_both = isinstance(sign, str) and isinstance(expires, str) and _SIGN.fullmatch(sign) and _TIME.fullmatch(expires)
    if has_both:
        del content["Sign"], content["T"]
    if source.sign_key is None:
        return False, 0
    if not has_both:
        raise RefusedError(OLD_AND_UNSIGNED if is_old else BAD_SIGNATURE)
    expected = hashlib.md5(f"{source.sign_key.get()}{expires}".encode(), usedforsecurity=False).hexdigest()
    if not hmac.compare_digest(expected, str(sign).lower()):
        raise RefusedError(BAD_SIGNATURE)
    return True, int(str(expires))


def _is_event(content: dict[str, Any]) -> bool:
    """Whether it is an event: each documented sample has `EventType`, or an object as its payload, or both."""
    return isinstance(content.get("EventType"), str) or any(isinstance(value, dict) for value in content.values())


def _malformed(text: str, why: str, handle: str, source: CallbackSource) -> Malformed:
    """Make a malformed event of a text, without the signature: it differs at each try, and would fit any body."""
    if _SIGN_IN_TEXT.search(text):
        text = _TIME_IN_TEXT.sub('"T":""', _SIGN_IN_TEXT.sub('"Sign":""', text))
    found = make_malformed(text, why=why, has_handle=False, source=source.name, sub_app_id=source.sub_app_id)
    return replace(found, handle=handle)


# --- the address of the client ----------------------------------------------------------------------------------------


def is_allowed(source: CallbackSource, peer: str, forwarded_for: str) -> bool:
    """Whether a source accepts callbacks from this client.

    Args:
        source: The source, with its networks.
        peer: The address of the other end of the connection.
        forwarded_for: The value of `X-Forwarded-For`, in which proxies give the client's address.
    """
    if source.allow_from is None:
        return True
    client = _address(peer)
    forwarded = forwarded_for.split(",")
    # Each proxy appends the address of its own peer. Only an address that a trusted proxy appended is reliable.
    while client is not None and forwarded and forwarded != [""] and _is_in(client, source.forwarded_from or ()):
        client = _address(forwarded.pop().strip())
    return client is not None and _is_in(client, source.allow_from)


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _address(text: str) -> Address | None:
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
