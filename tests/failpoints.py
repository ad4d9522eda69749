"""`python -m tests.failpoints ARGS`: vodpoller's command line, which kills itself at the step that `$FAILPOINT` names.

`FAILPOINT=sync:before:3` means SIGKILL right before the third sync, `sync:after:3` right after the third successful
sync. `STEPS` lists the steps; `write:amid:1` kills after half of the bytes are written. `ledger:before:1:hook` counts
only the calls for the sink `hook`, and `write:after:1:events.jsonl` only those for the file of that name.
"""

import os
import signal
import threading
from pathlib import Path

from vodpoller.cli.app import main
from vodpoller.delivery.in_flight import InFlight
from vodpoller.delivery.retrier import Retrier
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.sinks.file.appending import Files
from vodpoller.sinks.file.sink import FileSink
from vodpoller.vod.client import VodClient

STEPS = {
    "identify": (SqliteJournal, "identify"),
    "open": (Files, "open"),
    "write": (Files, "write"),
    "sync": (Files, "fdatasync"),
    "cut": (Files, "ftruncate"),
    "rename": (Files, "rename"),
    "reopen": (FileSink, "_reopen_now"),
    "ledger": (SqliteJournal, "accept"),
    "store": (SqliteJournal, "store"),
    "recover": (SqliteJournal, "recover"),
    "confirm": (VodClient, "confirm"),
    "claim": (SqliteJournal, "claim_due"),
    "mark_dead": (SqliteJournal, "mark_dead"),
    "results": (Retrier, "write_results"),
    "forget": (InFlight, "forget"),
    "open-journal": (SqliteJournal, "__init__"),
    "close-journal": (SqliteJournal, "close"),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # the signal may arrive late; nothing else may run until then


def name_of(subject):
    """The name of a sink, or of the file that a descriptor belongs to."""
    return Path(f"/proc/self/fd/{subject}").readlink().name if isinstance(subject, int) else subject


def install(failpoint):
    step, when, number, *names = failpoint.split(":")
    owner, name = STEPS[step]
    original = getattr(owner, name)
    lock = threading.Lock()
    calls = returns = 0

    def failing(self, *args, **kwargs):
        nonlocal calls, returns
        with lock:
            counts = not names or name_of(args[0]) in names
            calls += counts
            is_now = counts and calls == int(number)
        if is_now and when == "before":
            die()
        if is_now and when == "amid":
            fd, data = args
            half = bytes(data[: len(data) // 2]).rstrip(b"\n")  # torn within a line
            original(self, fd, memoryview(half))
            die()
        answer = original(self, *args, **kwargs)
        with lock:  # a failed call, such as a refused confirm, does not count as a return
            returns += counts
            is_now = counts and returns == int(number)
        if is_now and when == "after":
            die()
        return answer

    setattr(owner, name, failing)


if __name__ == "__main__":
    install(os.environ["FAILPOINT"])
    main()
