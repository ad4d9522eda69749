# ruff: noqa: INP001 - no package: Python finds it by its name
"""A wall clock that tests set: Python imports this before all else where its folder is on PYTHONPATH.

It is off by the seconds that the file `$CLOCK_OFFSET_FILE` holds. Monotonic time goes on as it is.
"""

import datetime as dt
import os
import time
from pathlib import Path

_wall = time.time
_offset_path = Path(os.environ["CLOCK_OFFSET_FILE"])


def _set_wall():
    return _wall() + float(_offset_path.read_text())


class _Datetime(dt.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(_set_wall(), tz)


time.time = _set_wall
dt.datetime = _Datetime
