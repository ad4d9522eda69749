"""Texts and numbers that describe the result of an HTTP call."""

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
    """Connections to all addresses of the host are forbidden; the text is one of these addresses."""


class UnusableProxyError(OSError):
    """The proxy in the environment cannot be used, so no call can be made; the text gives the reason."""


class UnforeseenAnswerError(http.client.HTTPException):
    """An HTTP answer was received that does not fit the request; the text describes it."""


def failure_text(error: BaseException, timeout_secs: float) -> str:
    """Describe for the operator why a call failed. The text is printed after `HOST:PORT `.

    It does not contain the URL, whose query may be a secret. The text of the error itself may contain it.

    Args:
        error: The error that `send_within`, or reading a body, raised.
        timeout_secs: The time limit of the call in seconds.
    """
    # A NewConnectionError only wraps a more precise error, and is a TimeoutError merely by inheritance.
    relevant = (cause for cause in causes(error) if not isinstance(cause, NewConnectionError))
    texts = (_text_of_cause(cause, timeout_secs) for cause in relevant)
    return next(filter(None, texts), f"could not be called: {type(error).__name__}")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it wraps: requests and urllib3 keep them in `args`, `reason` or `__cause__`."""
    yield error
    for inner in (*error.args, getattr(error, "reason", None), error.__cause__):
        if isinstance(inner, BaseException):
            yield from causes(inner)


def _text_of_cause(cause: BaseException, timeout_secs: float) -> str:
    """Describe one of the causes; empty if it only wraps another one."""
    match cause:
        case http.client.HTTPException() | InvalidHeader():
            return _text_of_answer_error(cause)
        case ConnectTimeoutError():
            return f"could not be reached within {timeout_secs:g} s (is a firewall in between?)"
        case TimeoutError() | Urllib3TimeoutError():
            return f"did not answer within {timeout_secs:g} s"
        case OSError():
            return _text_of_os_error(cause)
        case _:
            return ""


def _text_of_os_error(cause: OSError) -> str:
    text = ""
    match cause:
        case RootsError() | UnusableProxyError():
            text = f"cannot be called: {cause}"
        case ForbiddenAddressError():
            text = f"is at {cause}, to which no connection may be made"
        case socket.gaierror():
            text = f"cannot be found: {cause.strerror} (is the name right, does DNS work?)"
        case ssl.SSLCertVerificationError():
            text = f"cannot be trusted: {cause.verify_message} ({_trust_hint(cause.verify_code)})"
        case ssl.SSLError():
            text = f"failed at TLS: {cause.reason or 'it closed the connection'} (does this port speak https?)"
        case ConnectionRefusedError():
            text = "refused the connection (is anything running there?)"
        case ConnectionError():
            text = _CUT_OFF
        case OSError(strerror=str(why)):
            text = f"cannot be reached: {why}"
        case _:
            text = _text_of_proxy_error(str(cause))
    return text


def _text_of_proxy_error(message: str) -> str:
    """Describe a proxy's refusal to connect: http.client has no type for this error."""
    refused = re.match(r"Tunnel connection failed: (\d+) ", message)
    if refused is None:
        return ""
    text = f"is behind a proxy that answered {status_text(int(refused[1]))}"
    wants_login = int(refused[1]) == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED
    return f"{text} (it requires a login: put user:password@ into its address)" if wants_login else text


_IS_THE_PORT_RIGHT: Final = "is the port right?"
_CUT_OFF: Final = "closed the connection without a whole answer"


def _text_of_answer_error(cause: http.client.HTTPException | InvalidHeader) -> str:
    """Describe what was received in place of a complete answer."""
    text = "answered with a head that is too long to be read"  # LineTooLong; more than 100 headers have no error type
    match cause:
        case UnforeseenAnswerError():
            text = str(cause)
        case http.client.RemoteDisconnected() | http.client.IncompleteRead():
            text = _CUT_OFF
        case http.client.BadStatusLine():
            # The line is not quoted: the server may echo a secret, or a part of it.
            line = str(cause.args[0])
            cut = not line.endswith("\n") and (line.startswith("HTTP/") or "HTTP/".startswith(line))
            hint = (
                "it speaks TLS: does the address begin with https?"
                if line.startswith("\x15\x03")
                else _IS_THE_PORT_RIGHT
            )
            text = _CUT_OFF if cut else f"sent an answer that is not HTTP ({hint})"
        case http.client.UnknownProtocol():
            text = f"answered with a version of HTTP other than 1 ({_IS_THE_PORT_RIGHT})"
        case InvalidHeader():
            text = "answered with several lengths that contradict each other"
    return text


def _trust_hint(code: int) -> str:
    """Advice for a verification error of OpenSSL (codes: x509_vfy.h)."""
    match code:
        case 9 | 10:  # not yet, or no longer valid
            return "is the clock of this machine right? if so, the owner of the server must renew the certificate"
        case 62 | 64:  # another host name, another address
            return "the certificate is for another host: is the address right?"
        case _:
            return (
                "if it belongs to a CA of your own, name that CA's certificate, a PEM file, in ca_file;"
                " $SSL_CERT_FILE does the same for all of vodpoller"
            )


def status_text(status: int) -> str:
    """A status code and its phrase in RFC 9110. The answer's own phrase is not used: it may echo a secret."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def retry_after_secs(headers: Mapping[str, str], now: float | None) -> float | None:
    """The time in seconds after which `Retry-After` permits the next request; None if there is none.

    RFC 9110, section 10.2.3: seconds or a date. More than a day counts as a day.

    Args:
        headers: The headers of the answer.
        now: The current Unix time in seconds, with which a date is compared; None if it is not known.
    """
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text), _RETRY_AFTER_MAX_SECS)
    at = http_date(text)
    return None if at is None or now is None else min(max(at - now, 0.0), _RETRY_AFTER_MAX_SECS)


def http_date(text: str | None) -> float | None:
    """The Unix time in seconds of a date in a header (RFC 9110, section 5.6.7); None if it is not a valid date.

    Args:
        text: The header's value; None without such a header.
    """
    try:
        date = parsedate_to_datetime(text) if text else None
    except (ValueError, OverflowError):
        return None
    if date is None:
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
