"""The settings of a folder of images."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vodpoller.httpclient.trust import CaFile
from vodpoller.sinks.contract import SinkConfig
from vodpoller.sinks.download.places import Places


class DownloadConfig(SinkConfig):
    """A folder of images."""

    type: Literal["download"] = Field(description="The images of a snapshot event are fetched and saved as files.")
    path: Annotated[str, Field(min_length=1, max_length=2048)] = Field(
        description="Where an image goes. Fields: {file_id}, {task_id}, {key} (at least one of them), {time_offset_ms},"
        " {index} (at least one), {definition}, {ext}. An image whose file exists is not fetched, even if the file is"
        " another event's: with {definition} and {task_id}, each has a file of its own. Nothing is written outside the"
        " folder before the first field.",
        examples=["/srv/snapshots/{file_id}/{definition}-{time_offset_ms}-{task_id}.{ext}"],
    )
    hosts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="The hosts that images are fetched from, redirects included, as globs.",
        examples=[["*.vod2.myqcloud.com"]],
    )
    allow_private: bool = Field(
        default=False,
        description="Whether these hosts may have addresses that are not public. If the environment names a proxy,"
        " it is the proxy that connects, and addresses are not looked at.",
    )
    max_bytes: Annotated[int, Field(ge=1, le=1 << 34)] = Field(
        default=20 << 20, description="Maximum size of an image, in bytes; an event with a larger one is rejected."
    )
    ca_file: CaFile | None = Field(
        default=None,
        description="PEM with the certificates that vouch for these hosts', in place of the public CAs'. Left out:"
        " $SSL_CERT_FILE and $SSL_CERT_DIR, then $REQUESTS_CA_BUNDLE, then the public CAs. Read again at SIGHUP.",
        examples=["/etc/vodpoller/ca.pem"],
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=300)] = Field(
        default=60.0, description="Time limit of fetching all images of an event together."
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="Maximum number of events whose images are fetched at the same time."
    )

    @field_validator("path")
    @classmethod
    def _names_each_image(cls, value: str) -> str:
        Places(value)
        return value

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not re.fullmatch(r"[!-.0-9;-~]+|\[?[0-9A-Fa-f:.*?]+\]?", host):
                raise ValueError(f"{host!r} is not the name of a host (such as *.vod2.myqcloud.com, without https://)")
        return tuple(host.lower().strip("[]") if ":" in host else host.lower() for host in value)
