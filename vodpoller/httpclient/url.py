"""What the URL of a server is made of. Apart from `address`, since to read a configuration takes no requests."""

from urllib.parse import SplitResult, urlsplit


def http_parts(url: str) -> SplitResult:
    """The parts of a URL to which a request can go.

    Args:
        url: Of http or https.

    Raises:
        ValueError: It is of another scheme, or has no host, or has a port that is not one from 1 to 65535.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError("not an address of http or https")
    return parts
