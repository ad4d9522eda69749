"""Addresses: the parts that may be shown, and the proxy through which an address is reached."""

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
    """The settings of the environment for calls to an address.

    Args:
        proxy: The proxy through which the address is reached; empty if there is none.
        problem: The reason why no call can be made; empty if calls are possible.
    """

    proxy: str
    problem: str = ""


def environment_of(url: str) -> Environment:
    """Read `$http_proxy`, `$https_proxy`, `$all_proxy` and `$no_proxy`.

    Args:
        url: The URL that is called.
    """
    with requests.Session() as session:
        found = session.merge_environment_settings(url, {}, stream=True, verify=True, cert=None)
    proxy = select_proxy(url, dict(found["proxies"])) or ""
    return Environment(proxy=proxy, problem=_problem_of(proxy, urlsplit(url).scheme))


def _problem_of(proxy: str, scheme: str) -> str:
    """Describe what is wrong with a proxy's address. The text does not show it: it may hold a password."""
    if not proxy:
        return ""
    try:
        parts = proxy_parts(proxy)
        usable = bool(parts.hostname and parse_url(parts.geturl()).host) and (parts.port is None or parts.port > 0)
    except (ValueError, LocationParseError):
        usable = False
    if not usable:
        return (
            f"the proxy in the environment (${scheme}_proxy or $all_proxy) does not have a usable address"
            " (example: http://user:password@proxy.example:3128, with %23 for # and %2F for / in the password)"
        )
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socks") is None:
        return (
            f"the proxy in the environment (${scheme}_proxy or $all_proxy) is a SOCKS proxy"
            " (install the package PySocks, or set an HTTP proxy)"
        )
    return ""


def shown_url(url: str) -> str:
    """A URL without the parts that may be secret: credentials, query, fragment."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an address that cannot be read"
    return f"{parts.scheme}://{bracketed(parts.hostname)}{port}{parts.path}"


def host_and_port(url: str) -> str:
    """Host and port of a URL, or of a proxy's address, as error messages show them."""
    parts = proxy_parts(url)
    return f"{bracketed(parts.hostname)}:{port_of(parts)}"


def host_header(url: str) -> str:
    """The `Host` header for a URL: with the port only if it is not the scheme's default (RFC 9110, section 7.2)."""
    parts = urlsplit(url)
    host = bracketed(parts.hostname) if parts.hostname else ""
    return host if parts.port in (None, _PORTS.get(parts.scheme)) else f"{host}:{parts.port}"


def bracketed(host: str | None) -> str:
    """A host in the form that is written before a colon and a port: an IPv6 address in brackets."""
    return f"[{host}]" if host and ":" in host else host or "?"


def port_of(parts: SplitResult) -> int:
    """The port of an address or of a proxy; the scheme's default if none is given."""
    return parts.port or _PORTS.get(parts.scheme, _SOCKS_PORT)


def proxy_parts(proxy: str) -> SplitResult:
    """The parts of a proxy's address, which may be written without a scheme."""
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")
