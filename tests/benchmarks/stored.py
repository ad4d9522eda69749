"""Rows about data that exists when the daemon starts: stored events, and a file whose lines are not in the ledger."""

import hashlib
import math
import sqlite3
import statistics
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import requests
import structlog

from tests.benchmarks.consumers import Vodpoller, webhook_receiver
from tests.benchmarks.effort import fresh_system, in_turns, say, versions
from tests.benchmarks.measuring import cpu_secs, memory_bytes
from tests.benchmarks.report import Table, megabytes, number
from tests.polling import until
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.simulator.bodies import EventGenerator
from vodpoller.telemetry import Telemetry

_OLDEST_JOURNAL = Path(__file__).parent.parent / "data" / "journal-0.1.sql"
_TABLES = ("ledger", "letters", "marks", "positions")
HOUR_SECS = 3600.0


def make_journal(path, *, pending=0, dead=0, ledger=0, due_in_secs=-1.0):
    """Make a journal of version 0.1, which every version can open, with this number of rows.

    Args:
        path: Path of the journal.
        pending: Number of pending events of the sink `hook`.
        dead: Number of dead letters of the sink `hook`.
        ledger: Number of pairs that the sink has accepted, all confirmed an hour ago.
        due_in_secs: Time until the pending events are due; negative: they are due already.
    """
    generator, now = EventGenerator(1), time.time()
    states = ["pending"] * pending + ["dead"] * dead
    letters = (
        (_key(it), "hook", state, "sink_failed", "HTTP status 503", 3, now - HOUR_SECS, now + due_in_secs, 1, "before",
         "main", None, "CreateSnapshotByTimeOffsetComplete", generator.body(it, now))
        for it, state in enumerate(states)
    )  # fmt: skip
    pairs = ((_key(-it - 1), "hook", now - HOUR_SECS, now - HOUR_SECS) for it in range(ledger))
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(_OLDEST_JOURNAL.read_text())
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        for table in _TABLES:
            db.execute(f"DELETE FROM {table}")
        db.executemany(
            "INSERT INTO letters (key, sink, state, reason, error, attempts, stored_at, due_at, confirmed, run, source,"
            f" sub_app_id, event_type, body) VALUES ({','.join('?' * 14)})",
            letters,
        )
        db.executemany("INSERT INTO ledger VALUES (?, ?, ?, ?)", pairs)
        db.execute("COMMIT")


def _key(number_of_event):
    return hashlib.sha256(str(number_of_event).encode()).digest()


# --- a backlog that is delivered --------------------------------------------------------------------------------------


def backlog(effort):
    """Deliver stored events that are due to a webhook's receiver that is back."""
    consumers = versions(effort, Vodpoller())
    of_each = in_turns(effort, consumers, lambda consumer: _delivered(effort, consumer))
    baseline = _medians(of_each[-1]) if len(of_each) > 1 else None
    lines = []
    for consumer, runs in zip(consumers, of_each, strict=True):
        per_sec, cpu_us, peak_bytes, twice = _medians(runs)
        lines.append(
            [
                consumer.label,
                number(per_sec),
                number(cpu_us),
                megabytes(peak_bytes),
                number(twice),
                number(per_sec / baseline[0] if baseline else None, 2),
                number(cpu_us / baseline[1] if baseline else None, 2),
            ]
        )
    heads = (
        "consumer",
        "events/s",
        "CPU µs/event",
        "peak memory",
        "sent twice",
        "events/s relative to the baseline",
        "CPU/event relative to the baseline",
    )
    return [Table(f"{effort.stored_backlog:,} stored events to a webhook that is back", heads, lines)]


def _medians(runs):
    return [statistics.median(values) for values in zip(*runs, strict=True)]


def _delivered(effort, consumer):
    """Events per second, CPU µs per event, peak memory in bytes, and the number of events that were sent twice."""
    say(f"  {consumer.label} ...")
    total = effort.stored_backlog
    with fresh_system(effort) as system, webhook_receiver(system.folder, answer_secs=0) as url:
        make_journal(system.journal, pending=total)
        simulator = system.simulator()
        with (
            replace(consumer, sinks=f'[sinks.hook]\ntype = "webhook"\nurl = "{url}"\n').running(
                system, simulator.url
            ) as process,
            requests.Session() as session,
        ):
            session.trust_env = False

            def came():
                return session.get(url, timeout=60).json()

            began = until(lambda: (it := came())["requests"] and it, secs=120, every_secs=0.1)
            began_cpu_secs = cpu_secs(process.pid)
            ended = until(
                lambda: (it := came())["events"] == total and it, secs=60 + total / 100, every_secs=0.5, what=came
            )
            until(lambda: not _letters_bytes(system.journal), secs=60, every_secs=0.1, what="rows are left")
            return (
                total / (ended["last_at"] - ended["first_at"]),
                (cpu_secs(process.pid) - began_cpu_secs) / (total - began["requests"]) * 1e6,
                memory_bytes(process.pid, "VmHWM"),
                came()["requests"] - total,
            )


def _letters_bytes(path):
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as db:
        return db.execute("SELECT letters_bytes FROM totals").fetchone()[0]


# --- a large journal --------------------------------------------------------------------------------------------------


def stored(effort):
    """Seconds that the start, the commands and pruning take with many stored events."""
    return _table_of_secs(
        effort,
        f"{effort.stored_events:,} stored events, half of them dead letters, and as many rows to prune: seconds",
        _secs_of_steps,
    )


def recover(effort):
    """Seconds until the first pull if the daemon must recover a file whose lines are not in its ledger."""
    return _table_of_secs(effort, f"A file of {effort.stored_events:,} lines to recover: seconds", _recovery_secs)


def _table_of_secs(effort, title, measure):
    consumers = versions(effort, Vodpoller())
    of_each = in_turns(effort, consumers, lambda consumer: measure(effort, consumer))
    names = list(of_each[0][0])
    lines = [
        [consumer.label, *(number(statistics.median(run[name] for run in runs), 2) for name in names)]
        for consumer, runs in zip(consumers, of_each, strict=True)
    ]
    return [Table(title, ("consumer", *names), lines)]


def _secs_of_steps(effort, consumer):
    say(f"  {consumer.label} ...")
    half = effort.stored_events // 2
    hook = replace(consumer, sinks='[sinks.hook]\ntype = "webhook"\nurl = "http://127.0.0.1:9/"\n')
    with fresh_system(effort) as system:
        make_journal(system.journal, pending=half, dead=half, ledger=effort.stored_events, due_in_secs=880.0)
        simulator = system.simulator()
        _first_pull_secs(hook, system, simulator)  # it migrates the journal
        secs = {"start": _first_pull_secs(hook, system, simulator)}
        with hook.running(system, simulator.url):
            for command in ("status", "deadletters list", "deadletters list --pending"):
                secs[f"`{command}`"] = hook.command(*command.split(), "-c", system.config_path)
        # Another version may have another API, or another form of the journal.
        secs["all pruned"] = _pruning_secs(system.journal) if consumer.program is None else math.nan
        return secs


def _recovery_secs(effort, consumer):
    say(f"  {consumer.label} ...")
    generator, now = EventGenerator(1), time.time()
    with fresh_system(effort) as system:
        with system.archive.open("wb") as file:
            file.writelines(generator.body(it, now) + b"\n" for it in range(effort.stored_events))
        simulator = system.simulator()
        return {"until the first pull": _first_pull_secs(consumer, system, simulator)}


def _first_pull_secs(consumer, system, simulator):
    """Start a daemon, measure the seconds until its first pull, and kill it."""

    def pulls():
        return simulator.stats()["requests"].get("PullEvents", 0)

    before, began = pulls(), time.monotonic()
    with consumer.running(system, simulator.url):
        until(lambda: pulls() > before, secs=600, every_secs=0.01, what="no pull came")
        return time.monotonic() - began


def _pruning_secs(path):
    log = structlog.make_filtering_bound_logger("error")(None, [], {})
    journal = SqliteJournal(path, max_bytes=1 << 40, ledger_days=14, telemetry=Telemetry(log))
    try:
        began = time.monotonic()
        journal.prune()
        return time.monotonic() - began
    finally:
        journal.close()
