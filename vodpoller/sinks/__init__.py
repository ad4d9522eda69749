"""The sinks, one file each, and what their configurations and bodies have in common.

What a CloudEvent is: "CloudEvents - Version 1.0.2" (attributes, type system) and its "JSON Event Format".
"""

import base64
import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never
from urllib.parse import urlsplit

import orjson
from pydantic import ConfigDict, Field

from vodpoller.events import Event, encode_json, file_id_of
from vodpoller.secret import HasSecrets

ENTRY_POINT_GROUP = "vodpoller.sinks"

Format = Literal["callback", "cloudevents"]

_KEY_HEX = re.compile(r"[0-9a-f]{64}")
# "Type System", String: no control characters, no surrogates without a partner, no code points that Unicode calls
# noncharacters (the last two of each plane among them).
_NOT_IN_ATTRIBUTES = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufdd0-\\ufdef"
    + "".join(f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(17))
    + "]"
)


class SinkConfig(HasSecrets):
    """The keys that every sink has; a sink's own model adds to them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    type: str = Field(description="Which sink this is: the name of an entry point.")
    format: Format = Field(
        default="callback",
        description="The body of an event: `callback` is that of a normal callback, `cloudevents` is the same inside a"
        " CloudEvent 1.0 (JSON).",
    )
    queue_max_events: Annotated[int, Field(ge=16, le=100_000)] = Field(
        default=1024,
        description="How many events may wait for the sink in memory; more are stored at once.",
    )
    breaker_failures: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=5, description="So many distinct events failing in a row stop attempts until a probe succeeds."
    )
    give_up_after_secs: Annotated[float, Field(gt=0)] = Field(
        default=604_800.0, description="How old a stored event gets before it becomes a dead letter."
    )

    def claims(self) -> frozenset[str]:
        """What only one sink may hold: two sinks with a claim in common are an error.

        A file is "file:" and its real path; the journal claims its own in the same way.
        """
        return frozenset()

    def place(self) -> str:
        """Where events go, as `check` shows it: a path, a program, or the host of a URL, whose rest may be a secret."""
        found = {name: getattr(self, name, None) for name in ("path", "url", "command")}
        match found:
            case {"path": str(path)}:
                return str(Path(path).absolute())
            case {"url": str(url)}:
                return urlsplit(url).netloc.rpartition("@")[2]
            case {"command": [str(program), *_]}:
                return program
            case _:
                return ""


def available_sinks() -> dict[str, EntryPoint]:
    """The sink types that are installed, by name; none of them is loaded by asking."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def encode(event: Event, body_format: Format) -> bytes:
    """The event as a sink hands it on.

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
    """The media type of what `encode` makes.

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
    """The key of the event that a CloudEvent was made of.

    Args:
        document: A JSON document that was read again.

    Returns:
        None where it is no CloudEvent that `encode` could have made.
    """
    if document.get("specversion") != "1.0" or not all(
        isinstance(document.get(name), str) and document[name] for name in ("id", "source", "type")
    ):
        return None
    key_hex = document["id"]
    return bytes.fromhex(key_hex) if _KEY_HEX.fullmatch(key_hex) else None


def _cloudevent(event: Event) -> bytes:
    # What could never be read (a dead letter that is delivered after all) is no JSON and must not be put in as such.
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
    # Put together and not encoded as a whole: the body stays byte for byte what it is without the envelope.
    return encode_json(attributes)[:-1] + b"," + data + b"}"


def _attribute(text: str) -> str:
    """The text as an attribute may hold it."""
    return _NOT_IN_ATTRIBUTES.sub("\N{REPLACEMENT CHARACTER}", text)


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True
