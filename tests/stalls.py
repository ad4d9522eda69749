"""A plugin of pytest that stalls threads at random, to find tests that pass only if other threads are quick enough.

`python -m pytest -p tests.stalls` needs Python 3.12 or later. At random lines of vodpoller, the thread that executes
the line sleeps; the main thread, which runs the test, does not. Processes that tests start are not stalled. A test of a
rate or of a short time limit may fail without being wrong. Environment:

STALLS_SHARE: Share of the executed lines at which a thread stalls (0.002).
STALLS_SECS: Maximum length of a stall, in seconds (0.03).
"""

import os
import random
import sys
import threading
import time
from pathlib import Path

SHARE = float(os.environ.get("STALLS_SHARE", "0.002"))
SECS = float(os.environ.get("STALLS_SECS", "0.03"))
PACKAGE = str(Path(__file__).resolve().parent.parent / "vodpoller") + os.sep


def pytest_configure():
    """Stall from now on."""
    monitoring, main, sleep, pick = sys.monitoring, threading.main_thread().ident, time.sleep, random.Random().random

    def on_line(code, _number):
        if not code.co_filename.startswith(PACKAGE):
            return monitoring.DISABLE
        if threading.get_ident() != main and pick() < SHARE:
            sleep(pick() * SECS)
        return None

    monitoring.use_tool_id(monitoring.PROFILER_ID, "stalls")
    monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.LINE, on_line)
    monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.LINE)


def pytest_unconfigure():
    """Stall no more."""
    sys.monitoring.set_events(sys.monitoring.PROFILER_ID, 0)
