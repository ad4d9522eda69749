# ruff: noqa: INP001 - not a package: Python finds it by its name
"""A wall clock that tests can set: Python imports this module at its start if the folder is on PYTHONPATH.

The file `$CLOCK_OFFSET_FILE` has the offset in seconds. Monotonic time does not change.
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
