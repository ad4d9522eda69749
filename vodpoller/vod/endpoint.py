"""The address of an API of Tencent Cloud in the configuration."""

from ipaddress import ip_address

from vodpoller.httpclient.url import http_parts


def bare_endpoint(value: str, example: str, *, may_be_plain: bool = False) -> str:
    """Check that an address is a URL of scheme, host and port, and that requests to it are encrypted.

    Args:
        value: The configured address.
        example: A valid address, for the message.
        may_be_plain: Whether plain http to another machine is permitted.

    Returns:
        The address without a slash at its end.

    Raises:
        ValueError: It cannot be used; the message gives the reason.
    """
    try:
        parts = http_parts(value)
    except ValueError:
        raise ValueError(f"is not an http or https address (for example {example})") from None
    if parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"has more than scheme, host and port (for example {example})")
    if parts.scheme == "http" and not (may_be_plain or is_loopback(parts.hostname or "")):
        raise ValueError("is not encrypted (write https://; plain http is for a simulator on this machine only)")
    return f"{parts.scheme}://{parts.netloc}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
