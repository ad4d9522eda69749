"""The body of an event in the formats that sinks send.

Sources: "CloudEvents - Version 1.0.2" (attributes, type system) and its "JSON Event Format".
"""

import base64
import re
from collections.abc import Mapping
from typing import Any, Literal, assert_never

import orjson

from vodpoller.events.codec import encode_json
from vodpoller.events.event import Event
from vodpoller.events.snapshots import file_id_of

Format = Literal["callback", "cloudevents"]

_KEY_HEX = re.compile(r"[0-9a-f]{64}")
# "Type System", String: no control characters, no surrogates without a partner, no code points that Unicode calls
# noncharacters (the last two of each plane among them).
_NOT_IN_ATTRIBUTES = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufdd0-\\ufdef"
    + "".join(f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(17))
    + "]"
)


def encode(event: Event, body_format: Format) -> bytes:
    """The body of an event as a sink sends it.

    Args:
        event: Any event.
        body_format: As configured.
    """
    match body_format:
        case "callback":
            return event.body
        case "cloudevents":
            return _cloudevent(event)
        case _:
            assert_never(body_format)


def content_type(body_format: Format) -> str:
    """The media type of the result of `encode`.

    Args:
        body_format: As configured.
    """
    match body_format:
        case "callback":
            return "application/json"
        case "cloudevents":
            return "application/cloudevents+json"
        case _:
            assert_never(body_format)


def cloudevent_key(document: Mapping[str, Any]) -> bytes | None:
    """The key of the event that a CloudEvent holds.

    Args:
        document: A parsed JSON document.

    Returns:
        The key; None if the document is not a CloudEvent that `encode` could have made.
    """
    if document.get("specversion") != "1.0" or not all(
        isinstance(document.get(name), str) and document[name] for name in ("id", "source", "type")
    ):
        return None
    key_hex = document["id"]
    return bytes.fromhex(key_hex) if _KEY_HEX.fullmatch(key_hex) else None


def _cloudevent(event: Event) -> bytes:
    # A body that could never be parsed (a dead letter that is replayed) must not be embedded as JSON.
    readable = bool(event.content) or _is_json(event.body)
    attributes = {
        "specversion": "1.0",
        "id": event.key.hex(),
        "source": f"//vod.tencentcloudapi.com/{event.sub_app_id or 0}",
        "type": f"com.tencent.vod.{_attribute(event.type) or 'Unknown'}",
    }
    if file_id := _attribute(file_id_of(event)):
        attributes["subject"] = file_id
    attributes["datacontenttype"] = "application/json" if readable else "application/octet-stream"
    data = b'"data":' + event.body if readable else b'"data_base64":"' + base64.b64encode(event.body) + b'"'
    # The parts are joined, and not encoded as a whole, so that the body stays the same byte for byte.
    return encode_json(attributes)[:-1] + b"," + data + b"}"


def _attribute(text: str) -> str:
    """The text with a replacement character for each character that an attribute must not hold."""
    return _NOT_IN_ATTRIBUTES.sub("\N{REPLACEMENT CHARACTER}", text)


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True
