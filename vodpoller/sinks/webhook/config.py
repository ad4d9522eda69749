"""The configuration of a webhook sink.

Source: RFC 9110 (headers).
"""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

import requests
from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from vodpoller.expressions import ExpressionText
from vodpoller.httpclient.trust import CaFile
from vodpoller.httpclient.url import http_parts
from vodpoller.secret import Secret, SecretFile
from vodpoller.sinks.contract import SinkConfig
from vodpoller.sinks.webhook.signing import Sign, problem_in_secret

URL_MAX_CHARACTERS: Final = 2048
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[!-~]([ \t!-~]*[!-~])?")
_RESERVED_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class WebhookConfig(SinkConfig):
    """The settings of an HTTP receiver."""

    type: Literal["webhook"] = Field(description="Each event is the body of a request.")
    url: Annotated[str, Field(min_length=1, max_length=URL_MAX_CHARACTERS)] | None = Field(
        default=None,
        description="The URL of the requests, http or https; credentials belong in `headers`. Give this or `url_file`.",
        examples=["https://app.example/vod/callback"],
    )
    url_file: SecretFile | None = Field(
        default=None,
        description="A file whose first line is the URL, for a URL with a secret part, as chat robots have it. Read"
        " again at SIGHUP.",
        examples=["robot_url"],
    )
    method: Literal["POST", "PUT", "PATCH"] = Field(default="POST", description="The method of the requests.")
    sign: Sign = Field(
        default="standard",
        description="How a request is signed if there is a secret: as Standard Webhooks, or a robot of DingTalk or"
        " Feishu, requires it.",
    )
    secret_file: Annotated[str, Field(max_length=4096)] | None = Field(
        default=None, description="The file that holds the secret.", examples=["hook_secret"]
    )
    secret: Secret | None = Field(
        default=None,
        description="The secret that signs the requests. For `standard`: whsec_ and base64 of 24 to 64 bytes, or that"
        " base64 alone; for robots: the secret that their settings show. Left out: requests are not signed.",
    )
    headers: Annotated[dict[str, str], Field(max_length=50)] = Field(
        default_factory=dict,
        repr=False,
        description="Headers that are sent with every request, such as Authorization. Their values are never shown.",
    )
    body: ExpressionText | None = Field(
        default=None,
        description="A JMESPath expression over the event; its result is sent as JSON instead of the event. If the"
        " result is null, nothing is sent, and the event counts as delivered (`skipped`). Left out: the event is sent.",
        examples=["{msgtype: 'text', text: {content: EventType}}"],
    )
    accept_when: ExpressionText | None = Field(
        default=None,
        description="A JMESPath expression over the JSON of a 2xx answer (over its text, if it is not JSON): the event"
        " is accepted only if the result is true. Left out: 2xx accepts the event.",
        examples=["errcode == `0`"],
    )
    reject_when: ExpressionText | None = Field(
        default=None,
        description="A JMESPath expression over the JSON of any answer, as for `accept_when`: if the result is true,"
        " the event is rejected. With this key, the status 400 alone does not reject an event.",
        examples=["errcode == `45002`"],
    )
    max_per_minute: Annotated[int, Field(ge=1, le=60_000)] | None = Field(
        default=None,
        description="Maximum number of requests in any 60 s, evenly spaced. An event that would have to wait beyond its"
        " lease is stored (`sink_paused`). After a start the first request waits for `timeout_secs` and one spacing, so"
        " that the limit also holds over a restart.",
        examples=[20],
    )
    ca_file: CaFile | None = Field(
        default=None,
        description="A PEM file of CA certificates that replace the public CAs for this receiver. Left out:"
        " $SSL_CERT_FILE and $SSL_CERT_DIR, then $REQUESTS_CA_BUNDLE, then the public CAs. Read again at SIGHUP.",
        examples=["/etc/vodpoller/ca.pem"],
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=300)] = Field(
        default=5.0, description="Time limit of a request, from the name lookup to the end of the answer."
    )
    concurrency: Annotated[int, Field(ge=1, le=512)] = Field(
        default=8, description="Maximum number of requests at the same time."
    )

    @field_validator("url")
    @classmethod
    def _can_be_asked(cls, value: str | None) -> str | None:
        if value is not None and (problem := _problem_in_url(value)):
            raise ValueError(problem)
        return value

    @field_validator("url_file")
    @classmethod
    def _holds_a_url(cls, value: Secret | None) -> Secret | None:
        if value is not None and (problem := value.restrict(_problem_in_url)):
            raise ValueError(f"{value.path}: {problem}")
        return value

    @field_validator("secret")
    @classmethod
    def _can_sign(cls, value: Secret | None, info: ValidationInfo) -> Secret | None:
        sign = info.data.get("sign")
        if value is not None and sign is not None and (problem := problem_in_secret(value.get(), sign)):
            key = "secret_file" if info.data.get("secret_file") else "secret"
            raise _problem(key, f"it is not a signing secret: {problem}")
        return value

    @field_validator("headers")
    @classmethod
    def _can_be_sent(cls, value: dict[str, str]) -> dict[str, str]:
        seen = set()
        for name, content in value.items():
            lower = name.lower()
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a header (letters, digits and hyphens)")
            if lower in _RESERVED_HEADERS or lower.startswith("webhook-"):
                raise ValueError(f"{name} is set by vodpoller itself (leave it out)")
            if lower in seen:
                raise ValueError(f"{name} is given twice (keep one of the two)")
            if not _HEADER_VALUE.fullmatch(content):
                raise ValueError(f"the value of {name} cannot be sent (printable ASCII, no spaces at either end)")
            seen.add(lower)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.url is None and self.url_file is None:
            example = "https://app.example/vod/callback"
            raise _problem("url", f'is missing (for example: url = "{example}"; or url_file, if it is secret)')
        if self.url is not None and self.url_file is not None:
            raise _problem("url_file", "is given together with url (keep one of the two)")
        if self.sign != "standard" and self.secret is None:
            raise _problem("sign", f'"{self.sign}" needs a secret (add secret_file)')
        if self.sign == "feishu" and self.body is None:
            raise _problem("sign", '"feishu" puts the signature into the message (add body, which makes the message)')
        if self.body is not None and self.format != "callback":
            raise _problem("format", "has no effect together with body (keep one of the two)")
        return self

    @property
    def address(self) -> str:
        """The URL of the requests, as of the last read."""
        return self.url_file.get() if self.url_file is not None else self.url or ""

    @property
    def address_key(self) -> str:
        """The key that holds the URL."""
        return "url" if self.url_file is None else "url_file"

    def place(self) -> str:
        """As `SinkConfig.place`."""
        return urlsplit(self.address).netloc

    @classmethod
    def secret_file_keys(cls) -> Iterator[str]:
        """The keys that name files with secrets."""
        return chain(("url_file",), super().secret_file_keys())


def _problem(key: str, why: str) -> PydanticCustomError:
    """An error about another key than the one that is validated."""
    return PydanticCustomError("vodpoller", "{why}", {"why": why, "key": key})


def _problem_in_url(url: str) -> str:
    """Why requests cannot be sent to a URL, without any part of the URL; empty if they can."""
    unusable = "it is not an http or https address (for example https://app.example/vod/callback)"
    try:
        parts = http_parts(url)
    except ValueError:
        return unusable
    if not re.fullmatch(r"[!-~]+", url):
        return unusable
    if len(url) > URL_MAX_CHARACTERS:
        return f"it is longer than {URL_MAX_CHARACTERS} characters"
    if "@" in parts.netloc:
        return "it holds credentials, which would be shown in logs (put them into headers: Authorization)"
    try:
        requests.Request("POST", url).prepare()
    except (requests.RequestException, ValueError):
        return unusable
    return ""
