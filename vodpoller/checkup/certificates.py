"""Checks of certificates: how long the certificate of VOD and those in each `ca_file` are valid."""

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from vodpoller.checkup.finding import Finding, Level
from vodpoller.config.model import Config
from vodpoller.errors import VodpollerError
from vodpoller.httpclient.trust import days_until, validity
from vodpoller.vod.client import VodClient

_SOON_DAYS: Final = 14


def check_endpoint(vod: VodClient, now: float) -> Iterator[Finding]:
    """Check how long the certificate of the API endpoint is valid. No finding without TLS, or behind a proxy.

    Args:
        vod: Makes the connection.
        now: In seconds since 1970.
    """
    try:
        ends_at = vod.certificate_ends_at()
    except VodpollerError:  # the check of the source reports this
        return
    if ends_at is None:
        return
    is_soon = days_until(ends_at, now) < _SOON_DAYS
    yield Finding(
        what="certificate of VOD",
        level=Level.WARNING if is_soon else Level.GOOD,
        text=f"it is trusted, and {validity(ends_at, now)}",
        remedy="if it belongs to a proxy or gateway of yours, and not to Tencent, renew it there" if is_soon else "",
    )


def check_ca_files(config: Config, now: float) -> Iterator[Finding]:
    """Find certificates in the `ca_file`s of the configuration that have ended or will end soon.

    Args:
        config: Valid, so that each file holds certificates.
        now: In seconds since 1970.
    """
    files: dict[str, Path | None] = {"api": config.api.ca_file}
    files |= {f"sinks.{name}": getattr(sink, "ca_file", None) for name, sink in config.sinks.items()}
    for where, path in files.items():
        if path is not None:
            yield from _check_ca_file(f"{where}.ca_file", path, now)


def _check_ca_file(key: str, path: Path, now: float) -> Iterator[Finding]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:
        yield Finding(what=key, level=Level.PROBLEM, text=f"{path} cannot be read: {error.strerror or error}")
        return
    ends = [ssl.cert_time_to_seconds(str(found["notAfter"])) for found in context.get_ca_certs()]
    ending = sorted(ends_at for ends_at in ends if days_until(ends_at, now) < _SOON_DAYS)
    if ending:
        does = "has ended" if ending[0] <= now else "ends"
        yield Finding(
            what=key,
            level=Level.WARNING,
            text=f"{len(ending)} of {len(ends)} certificates in {path}: the first {does} on {_date(ending[0])}. From"
            " then on, certificates that it has signed are not trusted",
            remedy="add its successor to the file; SIGHUP reads the file again",
        )
    elif ends:
        yield Finding(
            what=key, level=Level.GOOD, text=f"{len(ends)} certificates in {path}, {validity(min(ends), now)}"
        )


def _date(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).date().isoformat()
