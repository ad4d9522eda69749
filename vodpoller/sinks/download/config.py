"""The configuration of a download sink."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vodpoller.httpclient.trust import CaFile
from vodpoller.sinks.contract import SinkConfig
from vodpoller.sinks.download.path_template import PathTemplate


class DownloadConfig(SinkConfig):
    """The settings of a folder of images."""

    type: Literal["download"] = Field(description="The images of a snapshot event are fetched and saved as files.")
    path: Annotated[str, Field(min_length=1, max_length=2048)] = Field(
        description="The path of an image. Fields: {file_id}, {task_id}, {key} (at least one of them),"
        " {time_offset_ms}, {index} (at least one), {definition}, {ext}. An image whose file exists is not"
        " fetched, even if the file belongs to another event: with {definition} and {task_id}, each event has its own"
        " files. Nothing is written outside the folder before the first field.",
        examples=["/srv/snapshots/{file_id}/{definition}-{time_offset_ms}-{task_id}.{ext}"],
    )
    hosts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="The hosts from which images may be fetched, as globs; they also limit redirects.",
        examples=[["*.vod2.myqcloud.com"]],
    )
    allow_private: bool = Field(
        default=False,
        description="Whether these hosts may have addresses that are not public. If the environment names a proxy,"
        " the proxy makes the connections, and addresses are not checked.",
    )
    max_bytes: Annotated[int, Field(ge=1, le=1 << 34)] = Field(
        default=20 << 20, description="Maximum size of an image, in bytes; an event with a larger image is rejected."
    )
    ca_file: CaFile | None = Field(
        default=None,
        description="A PEM file of CA certificates that replace the public CAs for these hosts. Left out:"
        " $SSL_CERT_FILE and $SSL_CERT_DIR, then $REQUESTS_CA_BUNDLE, then the public CAs. Read again at SIGHUP.",
        examples=["/etc/vodpoller/ca.pem"],
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=300)] = Field(
        default=60.0, description="Time limit for fetching all images of an event together."
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="Maximum number of events whose images are fetched at the same time."
    )

    @field_validator("path")
    @classmethod
    def _names_each_image(cls, value: str) -> str:
        PathTemplate(value)
        return value

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not re.fullmatch(r"[!-.0-9;-~]+|\[?[0-9A-Fa-f:.*?]+\]?", host):
                raise ValueError(f"{host!r} is not the name of a host (such as *.vod2.myqcloud.com, without https://)")
        return tuple(host.lower().strip("[]") if ":" in host else host.lower() for host in value)
