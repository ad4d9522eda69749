"""What came of an HTTP call, in words and numbers."""

import http.client
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final

from urllib3.exceptions import ConnectTimeoutError, InvalidHeader, NewConnectionError
from urllib3.exceptions import TimeoutError as Urllib3TimeoutError

from vodpoller.httpclient.trust import RootsError

SUCCESS: Final = range(200, 300)  # RFC 9110, section 15.3
REDIRECTS: Final = range(300, 400)  # section 15.4

_RETRY_AFTER_MAX_SECS: Final = 86_400.0


class ForbiddenAddressError(OSError):
    """The host has no address to which a connection may be made; holds the one it has."""


class UnusableProxyError(OSError):
    """The environment names a proxy that cannot be used, so that no call can be made; says why."""


class UnforeseenAnswerError(http.client.HTTPException):
    """What came is an answer of HTTP, but none to what was asked; says what it is."""


def failure_text(error: BaseException, timeout_secs: float) -> str:
    """What a person should know of a call that failed: the end of a sentence that begins with host and port.

    It holds nothing of the URL, whose query may be a secret; the text of the error itself may.

    Args:
        error: What `send_within`, or reading a body, raised.
        timeout_secs: What the call had.
    """
    # A NewConnectionError only wraps what says more, and is a TimeoutError merely by inheritance.
    telling = (cause for cause in causes(error) if not isinstance(cause, NewConnectionError))
    said = (_said_by(cause, timeout_secs) for cause in telling)
    return next(filter(None, said), f"could not be asked: {type(error).__name__}")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it wraps: requests and urllib3 keep them in `args`, `reason` or `__cause__`."""
    yield error
    for inner in (*error.args, getattr(error, "reason", None), error.__cause__):
        if isinstance(inner, BaseException):
            yield from causes(inner)


def _said_by(cause: BaseException, timeout_secs: float) -> str:
    """What one of the causes says; nothing if it only wraps another one."""
    match cause:
        case http.client.HTTPException() | InvalidHeader():
            return _said_by_answer(cause)
        case ConnectTimeoutError():
            return f"could not be reached within {timeout_secs:g} s (is a firewall in between?)"
        case TimeoutError() | Urllib3TimeoutError():
            return f"did not answer within {timeout_secs:g} s"
        case OSError():
            return _said_by_system(cause)
        case _:
            return ""


def _said_by_system(cause: OSError) -> str:
    said = ""
    match cause:
        case RootsError() | UnusableProxyError():
            said = f"cannot be asked: {cause}"
        case ForbiddenAddressError():
            said = f"is at {cause}, to which no connection may be made"
        case socket.gaierror():
            said = f"cannot be found: {cause.strerror} (is the name right, does DNS work?)"
        case ssl.SSLCertVerificationError():
            said = f"cannot be trusted: {cause.verify_message} ({_trust_hint(cause.verify_code)})"
        case ssl.SSLError():
            said = f"failed at TLS: {cause.reason or 'it hung up'} (does it speak https?)"
        case ConnectionRefusedError():
            said = "refused the connection (is anything running there?)"
        case ConnectionError():
            said = _CUT_OFF
        case OSError(strerror=str(why)):
            said = f"cannot be reached: {why}"
        case _:
            said = _said_by_proxy(str(cause))
    return said


def _said_by_proxy(text: str) -> str:
    """What the error of http.client says that has no type: a proxy refused to connect."""
    refused = re.match(r"Tunnel connection failed: (\d+) ", text)
    if refused is None:
        return ""
    said = f"is behind a proxy that answered {status_text(int(refused[1]))}"
    wants_login = int(refused[1]) == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED
    return f"{said} (it wants a login: put user:password@ into its address)" if wants_login else said


_IS_THE_PORT_RIGHT: Final = "is the port right?"
_CUT_OFF: Final = "closed the connection without a whole answer"


def _said_by_answer(cause: http.client.HTTPException | InvalidHeader) -> str:
    """What came in place of a whole answer."""
    said = "answered with a head that is too long to be read"  # LineTooLong, or over 100 headers, which has no type
    match cause:
        case UnforeseenAnswerError():
            said = str(cause)
        case http.client.RemoteDisconnected() | http.client.IncompleteRead():
            said = _CUT_OFF
        case http.client.BadStatusLine():
            # It is not quoted: it may be an echo of a secret, even half of one.
            line = str(cause.args[0])
            cut = not line.endswith("\n") and (line.startswith("HTTP/") or "HTTP/".startswith(line))
            hint = (
                "it speaks TLS: does the address begin with https?"
                if line.startswith("\x15\x03")
                else _IS_THE_PORT_RIGHT
            )
            said = _CUT_OFF if cut else f"answered with what is not HTTP ({hint})"
        case http.client.UnknownProtocol():
            said = f"answered with another version of HTTP than 1 ({_IS_THE_PORT_RIGHT})"
        case InvalidHeader():
            said = "answered with several lengths that contradict each other"
    return said


def _trust_hint(code: int) -> str:
    """What helps, by OpenSSL's code (x509_vfy.h)."""
    match code:
        case 9 | 10:  # not yet, or no longer valid
            return "is the clock of this machine right? if so, its owner must renew the certificate"
        case 62 | 64:  # another host name, another address
            return "the certificate is another host's: is the address right?"
        case _:
            return (
                "if it belongs to a CA of your own, name that CA's certificate, a PEM file, in ca_file;"
                " $SSL_CERT_FILE does the same for all of vodpoller"
            )


def status_text(status: int) -> str:
    """A status code with the words that RFC 9110 has for it, whatever the answer's own were: those may be an echo."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def retry_after_secs(headers: Mapping[str, str], now: float | None) -> float | None:
    """How long an answer asks to be left alone; None if it does not.

    RFC 9110, section 10.2.3: seconds or a date. More than a day counts as a day.

    Args:
        headers: Of the answer.
        now: Unix time, in seconds, that a date is compared with; None if it is not known.
    """
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text), _RETRY_AFTER_MAX_SECS)
    at = http_date(text)
    return None if at is None or now is None else min(max(at - now, 0.0), _RETRY_AFTER_MAX_SECS)


def http_date(text: str | None) -> float | None:
    """Unix time of a date in a header (RFC 9110, section 5.6.7), in seconds; None if it cannot be read as one.

    Args:
        text: The header's value, None if there is none.
    """
    try:
        date = parsedate_to_datetime(text) if text else None
    except (ValueError, OverflowError):
        return None
    if date is None:
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
