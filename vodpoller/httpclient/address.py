"""Addresses: what of them may be shown, and by which proxy they are reached."""

import importlib.util
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit

import requests
from requests.utils import select_proxy
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

_PORTS: Final = {"http": 80, "https": 443}
_SOCKS_PORT: Final = 1080


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment says of calls to an address.

    Args:
        proxy: The proxy by which the address is reached; empty if there is none.
        problem: Why no call can be made; empty if one can.
    """

    proxy: str
    problem: str = ""


def environment_of(url: str) -> Environment:
    """Read `$http_proxy` and its kind, and `$no_proxy`.

    Args:
        url: Where calls go.
    """
    with requests.Session() as session:
        found = session.merge_environment_settings(url, {}, stream=True, verify=True, cert=None)
    proxy = select_proxy(url, dict(found["proxies"])) or ""
    return Environment(proxy=proxy, problem=_problem_of(proxy, urlsplit(url).scheme))


def _problem_of(proxy: str, scheme: str) -> str:
    """What is wrong with a proxy's address, without showing it: it may hold a password."""
    if not proxy:
        return ""
    try:
        parts = proxy_parts(proxy)
        usable = bool(parts.hostname and parse_url(parts.geturl()).host) and (parts.port is None or parts.port > 0)
    except (ValueError, LocationParseError):
        usable = False
    if not usable:
        return (
            f"the proxy that the environment names (${scheme}_proxy or $all_proxy) has no address that can be used"
            " (right: http://user:password@proxy.example:3128, with %23 for # and %2F for / in the password)"
        )
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socks") is None:
        return (
            f"the proxy that the environment names (${scheme}_proxy or $all_proxy) is one for SOCKS"
            " (install the package PySocks, or name a proxy for HTTP)"
        )
    return ""


def shown_url(url: str) -> str:
    """A URL without what may be secret in it: credentials, query, fragment."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an address that cannot be read"
    return f"{parts.scheme}://{bracketed(parts.hostname)}{port}{parts.path}"


def host_and_port(url: str) -> str:
    """Where a URL, or a proxy's address, leads, as errors name it."""
    parts = proxy_parts(url)
    return f"{bracketed(parts.hostname)}:{port_of(parts)}"


def host_header(url: str) -> str:
    """What a request to a URL says in `Host`: the port only if it is not the scheme's own (RFC 9110, section 7.2)."""
    parts = urlsplit(url)
    host = bracketed(parts.hostname) if parts.hostname else ""
    return host if parts.port in (None, _PORTS.get(parts.scheme)) else f"{host}:{parts.port}"


def bracketed(host: str | None) -> str:
    """A host as it stands before a colon and a port."""
    return f"[{host}]" if host and ":" in host else host or "?"


def port_of(parts: SplitResult) -> int:
    """The port of an address, or of a proxy, given or not."""
    return parts.port or _PORTS.get(parts.scheme, _SOCKS_PORT)


def proxy_parts(proxy: str) -> SplitResult:
    """The parts of a proxy's address, which may come without a scheme."""
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")
