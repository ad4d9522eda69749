"""The keys of a webhook.

Source: RFC 9110 (headers).
"""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

import requests
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from vodpoller.httpclient.trust import CaFile
from vodpoller.secret import Secret
from vodpoller.sinks.contract import SinkConfig
from vodpoller.sinks.webhook.signing import SECRET_HELP, signing_key

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
    """An HTTP receiver."""

    type: Literal["webhook"] = Field(description="Each event is the body of a POST request.")
    url: Annotated[str, Field(min_length=1, max_length=2048)] = Field(
        description="Where requests go: http or https. Credentials belong in `headers`.",
        examples=["https://app.example/vod/callback"],
    )
    secret_file: Annotated[str, Field(max_length=4096)] | None = Field(
        default=None, description="The file that holds the secret.", examples=["hook_secret"]
    )
    secret: Secret | None = Field(
        default=None,
        description="Signs the requests as Standard Webhooks describes: whsec_ and base64 of 24 to 64 bytes,"
        " or that base64 alone. Left out: requests are not signed.",
    )
    headers: Annotated[dict[str, str], Field(max_length=50)] = Field(
        default_factory=dict,
        repr=False,
        description="Sent with every request, such as Authorization. Their values are never shown.",
    )
    ca_file: CaFile | None = Field(
        default=None,
        description="PEM with the certificates that vouch for the receiver's, in place of the public CAs'. Left out:"
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
    def _can_be_posted_to(cls, value: str) -> str:
        example = "for example https://app.example/vod/callback"
        try:
            parts = urlsplit(value)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or not re.fullmatch(r"[!-~]+", value):
            raise ValueError(f"it is not an http or https address ({example})")
        if "@" in parts.netloc:
            raise ValueError(
                "it holds credentials, which would be shown in logs (put them into headers: Authorization)"
            )
        try:
            requests.Request("POST", value).prepare()
        except (requests.RequestException, ValueError):
            raise ValueError(f"it is not an http or https address ({example})") from None
        return value

    @field_validator("secret")
    @classmethod
    def _can_sign(cls, value: Secret | None, info: ValidationInfo) -> Secret | None:
        if value is not None:
            try:
                signing_key(value.get())
            except ValueError as error:
                key = "secret_file" if info.data.get("secret_file") else ""
                problem = {"why": f"it is not a signing secret: {error} (right: {SECRET_HELP})", "key": key}
                raise PydanticCustomError("vodpoller", "{why}", problem) from None
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
                raise ValueError(f"the value of {name} cannot be sent (printable ASCII, no blanks at either end)")
            seen.add(lower)
        return value
