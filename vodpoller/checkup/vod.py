"""Checks of VOD: key, rights, clock."""

from typing import Final

from vodpoller.checkup.finding import Finding
from vodpoller.config.tables import Source
from vodpoller.errors import OperatorError, RefusedHandlesError, VodpollerError
from vodpoller.vod.client import VodClient

CLOCK_TOLERANCE_SECS: Final = 60.0
IMPOSSIBLE_HANDLE: Final = "vodpoller-check"
_NO_ANSWER: Final = "VOD did not answer"


def check_source(vod: VodClient, source: Source) -> Finding:
    """Confirm a handle that cannot exist: VOD says that it is wrong only if key, rights and SubAppId are right."""
    what = f"source {source.name}"
    try:
        vod.confirm(source.sub_app_id, [IMPOSSIBLE_HANDLE])
    except RefusedHandlesError as error:
        return Finding(what=what, good=True, text=f"VOD takes the key and lets it confirm{_said_in(error)}")
    except OperatorError as error:
        return Finding(what=what, good=False, text=f"{error}{_said_in(error)}")
    except VodpollerError as error:
        hint = "" if error.request_id else " (is api.endpoint right, and this machine online?)"
        return Finding(what=what, good=False, text=f"{error}{_said_in(error)}{hint}")
    return Finding(what=what, good=True, text="VOD takes the key and lets it confirm")


def _said_in(error: VodpollerError) -> str:
    return f" (RequestId {error.request_id})" if error.request_id else ""


def check_clock(vod: VodClient) -> Finding:
    """Compare this machine's clock with that of VOD's last answer."""
    skew_secs = vod.skew_secs
    if skew_secs is None:
        why = "the answer has no Date that can be read (does a proxy take it out?)" if vod.has_answered else _NO_ANSWER
        return Finding(what="clock", good=False, text=f"not compared: {why}")
    text = f"this machine's clock is {abs(skew_secs):.0f} s {'behind' if skew_secs > 0 else 'ahead of'} VOD's"
    if abs(skew_secs) <= CLOCK_TOLERANCE_SECS:
        return Finding(what="clock", good=True, text=text)
    return Finding(
        what="clock", good=False, text=f"{text}: synchronize it (NTP). The daemon signs with VOD's time until then"
    )
