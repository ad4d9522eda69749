"""Fetching images from hosts that are not trusted: which requests are sent, and which answers are accepted."""

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

_REDIRECTS_MAX: Final = 3
_GONE: Final = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_CHUNK_BYTES: Final = 1 << 16
SHOWN_CHARACTERS: Final = 200
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_PAGES: Final = frozenset({"text/html", "application/xhtml+xml"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """The fetching of all images of one event.

    Args:
        timeout_secs: Time limit for all images together, in seconds.
        ends_at: Monotonic time at which this time limit ends, in seconds.
        urls: The URL of each image, by its path below the root.
    """

    timeout_secs: float
    ends_at: float
    urls: dict[tuple[str, ...], str]


class Fetcher:
    """Fetches images, only from hosts and addresses that the settings allow.

    Neither cookies nor credentials are sent. A name is looked up once for each connection, and the address that is used
    for this connection must be public.

    Args:
        name: The sink's name, for texts of errors.
        config: The sink's settings.
        resolve: Used instead of `socket.getaddrinfo`, if given.
        wall: Unix time, in seconds.
        monotonic: The clock for the time limit, in seconds.

    Raises:
        ConfigError: The proxy or certificate settings of the environment cannot be used.
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
        """Read the trusted CA certificates again.

        Raises:
            ConfigError: They cannot be read; those that were read before stay in use.
        """
        self._adapter.reread_roots(f"sinks.{self._name}.ca_file")

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their image has been read."""
        self._adapter.close()

    def fetch(self, url: str, fetching: Fetching) -> requests.Response:
        """Request a URL and follow redirects. Returns the final answer, with its body unread.

        Raises:
            RejectedError: The URL, its host or its address is not allowed.
            TransientError: No answer came, or there were too many redirects.
        """
        for _ in range(1 + _REDIRECTS_MAX):
            request = self._request(url)
            where = str(request.url)
            try:
                response = self._adapter.send_within(request, environment_of(where), self._left_secs(fetching, where))
            # Not chained: the texts of these exceptions hold the whole URL, whose query may be a signature.
            except CALL_ERRORS as error:
                text = f"{shown(where)} {failure_text(error, fetching.timeout_secs)}"
                if any(isinstance(cause, ForbiddenAddressError) for cause in causes(error)):
                    hint = f"not a public address; sinks.{self._name}.allow_private = true allows it"
                    raise RejectedError(f"{text} ({hint})") from None
                raise TransientError(text) from None
            if not response.is_redirect:
                return response
            response.close()
            try:
                url = urljoin(where, response.headers["Location"])
            except ValueError:
                raise RejectedError(f"{shown(where)} redirects to an address that cannot be read") from None
        raise TransientError(f"{shown(where)} redirects more than {_REDIRECTS_MAX} times")

    def _request(self, url: str) -> requests.PreparedRequest:
        """The request for an image.

        Raises:
            RejectedError: The URL or its host is not allowed.
        """
        headers = {"User-Agent": f"vodpoller/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
        try:
            # The URL as `requests` has normalised it is checked, since `requests` connects to that one.
            request = requests.Request("GET", url, headers=headers).prepare()
            parts = http_parts(str(request.url))
        except (requests.RequestException, ValueError):
            raise RejectedError(f"{shown(url)!r} is not an http or https address") from None
        if "@" in parts.netloc:
            raise RejectedError(f"{shown(url)} holds credentials, which are not sent")
        if not any(fnmatchcase((parts.hostname or "").rstrip("."), glob) for glob in self._config.hosts):
            raise RejectedError(f"{shown(url)}: its host is not in sinks.{self._name}.hosts")
        return request

    def _left_secs(self, fetching: Fetching, where: str) -> float:
        left_secs = fetching.ends_at - self._monotonic()
        if left_secs <= 0:
            raise TransientError(
                f"{shown(where)} was not fetched: the time limit of {fetching.timeout_secs:g} s for the event is over"
                f" (it can be raised: sinks.{self._name}.timeout_secs)"
            )
        return left_secs

    def check(self, response: requests.Response) -> None:
        """Check the status and the headers of an answer.

        Raises:
            RejectedError: The image can never be fetched.
            TransientError: This answer has no image; a later request may get it.
        """
        status = response.status_code
        where = shown(str(response.url))
        if status != HTTPStatus.OK:
            text = f"{where} answered {status_text(status)}"
            if status in _GONE:
                raise RejectedError(f"{text}: the image does not exist, or not any more")
            raise TransientError(text, retry_after_secs=retry_after_secs(response.headers, self._wall()))
        if media_type_of(response) in _PAGES:
            raise RejectedError(f"{where} is a web page ({media_type_of(response)}), not an image")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding != "identity":
            raise TransientError(f"{where} sent a compressed answer, which was not requested")
        announced = response.headers.get("Content-Length", "")
        # As a float: int() refuses more than 4300 digits.
        if re.fullmatch("[0-9]+", announced) and float(announced) > self._config.max_bytes:
            raise self._too_long(where)

    def _too_long(self, where: str) -> RejectedError:
        return RejectedError(f"{where} is larger than sinks.{self._name}.max_bytes = {self._config.max_bytes}")

    def body(self, response: requests.Response, fetching: Fetching) -> Iterator[bytes]:
        """The image, in pieces.

        Raises:
            RejectedError: It is larger than `max_bytes`.
            TransientError: It did not arrive completely.
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
            raise TransientError(f"{where} sent an empty answer")


def is_public(address: str) -> bool:
    """Whether an address is a public one: not of this machine, of a private network, or for a special use.

    Args:
        address: The address, as getaddrinfo returns it.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        # IPv6 addresses that stand for an IPv4 address.
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        )
        if inner is None:
            return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_site_local)
        ip = inner
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def media_type_of(response: requests.Response) -> str:
    """The media type of the answer, in lower case."""
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def shown(url: str) -> str:
    """A URL for a log line: without its query, which may be a signature."""
    return "".join(character if character.isprintable() else "?" for character in shown_url(url)[:SHOWN_CHARACTERS])
