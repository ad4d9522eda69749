"""`python -m tests.failpoints ARGS`: vodpoller's command line, which kills itself at a step that `$FAILPOINT` names.

`FAILPOINT=sync:before:3` means SIGKILL right before the third sync. The steps are those of `STEPS`; "amid" a write is
after half of its bytes.
"""

import os
import signal
import threading

from vodpoller.cli.app import main
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.sinks.file.appending import Files
from vodpoller.sinks.file.sink import FileSink
from vodpoller.vod.client import VodClient

STEPS = {
    "open": (Files, "open"),
    "write": (Files, "write"),
    "sync": (Files, "fdatasync"),
    "cut": (Files, "ftruncate"),
    "reopen": (FileSink, "_reopen_now"),
    "ledger": (SqliteJournal, "accept"),
    "store": (SqliteJournal, "store"),
    "recover": (SqliteJournal, "recover"),
    "confirm": (VodClient, "confirm"),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # the signal may need a moment; nothing more may happen


def install(failpoint):
    step, when, number = failpoint.split(":")
    owner, name = STEPS[step]
    original = getattr(owner, name)
    lock = threading.Lock()
    calls = 0

    def failing(self, *args, **kwargs):
        nonlocal calls
        with lock:
            calls += 1
            is_now = calls == int(number)
        if is_now and when == "before":
            die()
        if is_now and when == "amid":
            fd, data = args
            half = bytes(data[: len(data) // 2]).rstrip(b"\n")  # torn within a line
            original(self, fd, memoryview(half))
            die()
        answer = original(self, *args, **kwargs)
        if is_now and when == "after":
            die()
        return answer

    setattr(owner, name, failing)


if __name__ == "__main__":
    install(os.environ["FAILPOINT"])
    main()
