"""The parts of a server's URL. Not in `address`: reading a configuration must not import requests."""

from urllib.parse import SplitResult, urlsplit


def http_parts(url: str) -> SplitResult:
    """The parts of a URL to which a request can be sent.

    Args:
        url: A URL of http or https.

    Raises:
        ValueError: The scheme is another one, the host is missing, or the port is not a number from 1 to 65535.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError("not an address of http or https")
    return parts
