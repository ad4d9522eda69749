"""Fetching what is not trusted: which hosts and addresses are asked, and what is taken from them."""

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urljoin

import requests

from vodpoller import __version__
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.httpclient.address import environment_of, shown_url
from vodpoller.httpclient.transport import CALL_ERRORS, DeadlineAdapter
from vodpoller.httpclient.trust import RootsError
from vodpoller.httpclient.url import http_parts
from vodpoller.httpclient.words import ForbiddenAddressError, causes, failure_text, retry_after_secs, status_text
from vodpoller.sinks.download.config import DownloadConfig

_REDIRECTS: Final = 3
_GONE: Final = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_CHUNK_BYTES: Final = 1 << 16
SHOWN_CHARACTERS: Final = 200
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_PAGES: Final = frozenset({"text/html", "application/xhtml+xml"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """Fetching the images of one event.

    Args:
        timeout_secs: Time limit of it all, in seconds.
        ends_at: Monotonic time, in seconds.
        urls: What went where, by the path below the root.
    """

    timeout_secs: float
    ends_at: float
    urls: dict[tuple[str, ...], str]


class Fetcher:
    """Asks the hosts that the settings name for images, and no address that they forbid.

    Neither cookies nor credentials are sent. A name is looked up once for each connection, and it is the address that
    is connected to which must be public.

    Args:
        name: The sink's name, for what it says.
        config: The sink's settings.
        resolve: In place of `socket.getaddrinfo`.
        wall: Unix time, in seconds.
        monotonic: The clock of the time limit, in seconds.

    Raises:
        ConfigError: What the environment says of proxies or certificates cannot be used.
    """

    def __init__(
        self,
        name: str,
        config: DownloadConfig,
        *,
        resolve: Callable[..., list[Any]] | None,
        wall: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._name = name
        self._config = config
        self._wall = wall
        self._monotonic = monotonic
        problem = environment_of("https://localhost/").problem
        if problem:
            raise ConfigError([f"sinks.{name}.hosts: {problem}"])
        self._adapter = DeadlineAdapter(
            connections=config.concurrency,
            ca_file=config.ca_file,
            resolve=resolve,
            permits=lambda address: config.allow_private or is_public(address),
            monotonic=monotonic,
        )
        try:
            self._adapter.check_roots()
        except RootsError as error:
            raise ConfigError([f"sinks.{name}.hosts: {error}"]) from None

    def reread_roots(self) -> None:
        """Read what vouches for certificates again.

        Raises:
            ConfigError: It cannot be read; what was read before stays in use.
        """
        self._adapter.reread_roots(f"sinks.{self._name}.ca_file")

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their image is in."""
        self._adapter.close()

    def fetch(self, url: str, fetching: Fetching) -> requests.Response:
        """The answer that is not a redirect, its body not read.

        Raises:
            RejectedError: Such a URL, host or address is not asked.
            TransientError: No answer came.
        """
        for _ in range(1 + _REDIRECTS):
            request = self._request(url)
            where = str(request.url)
            try:
                response = self._adapter.send_within(request, environment_of(where), self._left_secs(fetching, where))
            # Not chained: the texts of these exceptions hold the whole URL, whose query may be a signature.
            except CALL_ERRORS as error:
                said = f"{shown(where)} {failure_text(error, fetching.timeout_secs)}"
                if any(isinstance(cause, ForbiddenAddressError) for cause in causes(error)):
                    hint = f"not a public address; sinks.{self._name}.allow_private = true would let it"
                    raise RejectedError(f"{said} ({hint})") from None
                raise TransientError(said) from None
            if not response.is_redirect:
                return response
            response.close()
            try:
                url = urljoin(where, response.headers["Location"])
            except ValueError:
                raise RejectedError(f"{shown(where)} redirects to an address that cannot be read") from None
        raise TransientError(f"{shown(where)} redirects once more than the {_REDIRECTS} times that are followed")

    def _request(self, url: str) -> requests.PreparedRequest:
        """The request for an image.

        Raises:
            RejectedError: There is none to be sent to such a URL.
        """
        headers = {"User-Agent": f"vodpoller/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
        try:
            # What is looked at is what requests makes of it: that is where it connects to.
            request = requests.Request("GET", url, headers=headers).prepare()
            parts = http_parts(str(request.url))
        except (requests.RequestException, ValueError):
            raise RejectedError(f"{shown(url)!r} is not an address of http or https") from None
        if "@" in parts.netloc:
            raise RejectedError(f"{shown(url)} comes with credentials, which are not used")
        if not any(fnmatchcase((parts.hostname or "").rstrip("."), glob) for glob in self._config.hosts):
            raise RejectedError(f"{shown(url)} is at a host that sinks.{self._name}.hosts does not name")
        return request

    def _left_secs(self, fetching: Fetching, where: str) -> float:
        left_secs = fetching.ends_at - self._monotonic()
        if left_secs <= 0:
            raise TransientError(
                f"{shown(where)} was not fetched: the {fetching.timeout_secs:g} s for the event are over"
                f" (more of them: sinks.{self._name}.timeout_secs)"
            )
        return left_secs

    def check(self, response: requests.Response) -> None:
        """Look at the head of the answer.

        Raises:
            RejectedError: It says that the image cannot be had.
            TransientError: It says that there is none now.
        """
        status = response.status_code
        where = shown(str(response.url))
        if status != HTTPStatus.OK:
            said = f"{where} answered {status_text(status)}"
            if status in _GONE:
                raise RejectedError(f"{said}: the image is not there (any more)")
            raise TransientError(said, retry_after_secs=retry_after_secs(response.headers, self._wall()))
        if media_type_of(response) in _PAGES:
            raise RejectedError(f"{where} is a page ({media_type_of(response)}), not an image")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding != "identity":
            raise TransientError(f"{where} came compressed, which was not asked for")
        announced = response.headers.get("Content-Length", "")
        # Through a float: Python makes no integer of more than 4300 digits.
        if re.fullmatch("[0-9]+", announced) and float(announced) > self._config.max_bytes:
            raise self._too_long(where)

    def _too_long(self, where: str) -> RejectedError:
        return RejectedError(f"{where} is longer than sinks.{self._name}.max_bytes = {self._config.max_bytes}")

    def body(self, response: requests.Response, fetching: Fetching) -> Iterator[bytes]:
        """The image, in pieces.

        Raises:
            RejectedError: It is longer than may be.
            TransientError: It did not come whole.
        """
        where = shown(str(response.url))
        taken_bytes = 0
        try:
            while chunk := response.raw.read(_CHUNK_BYTES, decode_content=False):
                taken_bytes += len(chunk)
                if taken_bytes > self._config.max_bytes:
                    raise self._too_long(where)
                yield chunk
        except CALL_ERRORS as error:
            raise TransientError(f"{where} {failure_text(error, fetching.timeout_secs)}") from None
        if not taken_bytes:
            raise TransientError(f"{where} answered with nothing")


def is_public(address: str) -> bool:
    """Whether an address is one of the Internet: not of this machine, of a private network, or a special one.

    Args:
        address: As getaddrinfo has it.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        # Addresses of IPv6 behind which there is one of IPv4.
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        )
        if inner is None:
            return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_site_local)
        ip = inner
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def media_type_of(response: requests.Response) -> str:
    """The media type that the answer says it has, in small letters."""
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def shown(url: str) -> str:
    """A URL for a line of a log: without its query, which may be a signature."""
    return "".join(letter if letter.isprintable() else "?" for letter in shown_url(url)[:SHOWN_CHARACTERS])
